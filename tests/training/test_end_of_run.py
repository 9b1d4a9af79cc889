"""What was trained outlives an evaluation that fails, and a run that trained nothing does not end as one that did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.stop_request import StopRequest
from colm_ds.recipes.recipe import load_recipe
from colm_ds.training.run import TrainingRun
from tests.finetune.test_entry import ROOT, recipe_of, start
from tests.ranks import Ranks

PROGRAM = "tests/training/ending_badly.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end")
    write_mixture(folder / "data", seed=1, scale=0.02)
    return folder


def recipe(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    made = recipe_of(data, output_dir=str(folder / "run"), overwrite=False, steps=2, **changes)
    made["data"]["heldout"] = str(data / "data" / "heldout.jsonl")
    return made


def alone(values: dict[str, Any], folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, PROGRAM, what, "0", str(path)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_weights_are_there_when_the_evaluation_fails(data: Path, tmp_path: Path) -> None:
    values = recipe(data, tmp_path)
    done = alone(values, tmp_path, "evaluation")
    assert done.returncode == ExitCode.EVALUATION_FAILED
    assert "the final evaluation failed: RuntimeError: the disk of the questions is gone" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "evaluation_error.txt").read_text()
    assert f"The trained weights are in {tmp_path / 'run' / 'model'}" in done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "not evaluated"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [0, 1, 2]
    again = alone(values, tmp_path, "nothing")  # there is no checkpoint to go on from, and nothing is thrown away
    assert again.returncode == ExitCode.BAD_INPUT
    assert "holds trained weights whose evaluation failed" in again.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_all_ranks_end_and_a_checkpoint_is_gone_on_from(data: Path, tmp_path: Path) -> None:
    values = recipe(data, tmp_path, save_every=1)
    done = start(tmp_path, values, program=(PROGRAM, "evaluation", "1"))
    assert done.code == ExitCode.EVALUATION_FAILED, done.output
    assert done.output.count("the final evaluation failed") == 1
    again = start(tmp_path, values, program=(PROGRAM, "nothing", "0"))
    assert again.code == 0, again.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_run_whose_every_step_was_skipped(data: Path, tmp_path: Path) -> None:
    """Fewer steps than `max_skipped_steps`: it is no success all the same, and no weights are written."""
    for what in ("gradients", "nothing"):  # also where the same command goes on after the last step
        done = alone(recipe(data, tmp_path), tmp_path, what)
        assert done.returncode == ExitCode.DIVERGED
        assert "not finite in any of the 2 steps, so nothing was trained" in done.stderr
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
        assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_what_is_lost_of_the_data_is_said(data: Path, tmp_path: Path) -> None:
    """At the start and in the summary: rows and ends of responses that `max_length` takes away, and a source gone."""
    rows = [{"source": "whole", "instruction": f"Add {n} and 1.", "output": str(n + 1)} for n in range(20)]
    rows += [{"source": "cut", "instruction": "Count.", "output": "1 2 3 4 5 6 7 8 9 " * 20} for _ in range(3)]
    rows += [{"source": "gone", "instruction": "What is this? " * 90, "output": "a"} for _ in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = recipe(data, tmp_path)
    values["data"] |= {"train": str(tmp_path / "rows.jsonl")}
    done = alone(values, tmp_path, "nothing")
    assert done.returncode == 0, done.stderr
    assert "2 rows were left out, as their prompt fills data.max_length = 96: 2 of gone." in done.stderr
    assert "3 responses were cut at data.max_length = 96: 3 of cut." in done.stderr
    assert "WARNING: nothing is left of gone." in done.stderr
    lost = json.loads((tmp_path / "run" / "summary.json").read_text())["lost_data"]
    assert lost == {"dropped": {"gone": 2}, "cut": {"cut": 3}, "sources": ["gone"]}


def test_bad_input_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    """The lock makes the folder of a run; one that never begins takes it away again."""
    values = recipe(data, tmp_path)
    values["tokenizer"] = str(tmp_path / "none")
    done = alone(values, tmp_path, "nothing")
    assert done.returncode == ExitCode.BAD_INPUT
    assert not (tmp_path / "run").exists()


def stopped_before_a_step(path: str, *overrides: str) -> int:
    """In a rank: SIGTERM comes while a run is set up."""
    run = TrainingRun(load_recipe(path, overrides), torch.device("cpu"), StopRequest())
    run.stop.reason = "signal SIGTERM"
    code = run.train()
    assert run.folder is not None
    run.folder.close()
    run.engine.destroy()
    return code


@pytest.mark.distributed
def test_a_run_that_is_stopped_before_its_first_step_has_done_none(
    data: Path, tmp_path: Path, pools: dict[int, Ranks]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, tmp_path)))
    assert pools[1].run(stopped_before_a_step, str(path)) == [ExitCode.STOPPED]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"status": "stopped", "steps": 0}


def end_of_a_resumed_run(path: str) -> dict[str, Any]:
    """In a rank: a run is stopped after its first step, an hour and 100 GiB are added to that, and it is resumed."""
    first = TrainingRun(load_recipe(path), torch.device("cpu"), StopRequest())
    step = first.engine.train_batch

    def train_batch(batch: Any = None) -> Any:
        stats = step(batch)
        first._started -= 3600
        first.stop.reason = "signal SIGTERM"
        peaks, parts = stats.memory_gib, stats.memory_parts_gib
        return replace(stats, memory_gib={**peaks, "probe": 100.0, "peak": 100.0}, memory_parts_gib={**parts, "x": 9.0})

    first.engine.train_batch = train_batch  # type: ignore[method-assign]
    assert first.train() == ExitCode.STOPPED
    assert first.folder is not None
    first.folder.close()
    assert first.lock is not None
    first.lock.release()
    first.engine.destroy()
    second = TrainingRun(load_recipe(path), torch.device("cpu"), StopRequest())
    assert second.first_step == 2
    assert second.train() == 0
    assert second.lock is not None
    second.lock.release()
    second.engine.destroy()
    summary: dict[str, Any] = json.loads((Path(second.recipe.output_dir) / "summary.json").read_text())
    return summary


@pytest.mark.distributed
def test_a_resumed_runs_summary_is_of_the_whole_run(data: Path, tmp_path: Path, pools: dict[int, Ranks]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, tmp_path)))
    (summary,) = pools[1].run(end_of_a_resumed_run, str(path))
    assert summary["peak_memory_gib"]["peak"] == summary["peak_memory_gib"]["probe"] == 100.0
    assert summary["peak_memory_gib_by_rank"] == [100.0]
    assert summary["peak_memory_parts_gib"]["x"] == 9.0
    assert 3600 < summary["wall_s"] < 3900
