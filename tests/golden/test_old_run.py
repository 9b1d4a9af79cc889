"""A run of version 0.1.0 resumes, reports and exports.

`run_0_1_0.tar.gz` holds what that version left (revision 423140d, one process): `recipe.yaml` with its `data/`, `run/`
(of 8 steps, killed after the fifth was logged, with a checkpoint after the fourth) and `whole/` (finished).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colm_ds.cli import main

ARCHIVE = Path(__file__).with_name("run_0_1_0.tar.gz")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked folder, which is also the working folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path / "run_0_1_0")
    return tmp_path / "run_0_1_0"


def logged(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    return [entry for entry in entries if "loss" in entry]


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("preset", [pytest.param(None, marks=pytest.mark.slow), "paper"])
def test_resumes_as_if_it_had_not_stopped(folder: Path, repo_root: Path, preset: str | None) -> None:
    """Also where the recipe names its preset by now: what that fills in is what the run had."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    command = [sys.executable, str(repo_root / "tests" / "training" / "counting_checks.py"), "recipe.yaml"]
    command += [f"colm.preset={preset}"] if preset else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "after step 4" in done.stderr
    (line,) = [line for line in done.stdout.split("\n") if line.startswith("CHECKED")]
    checked = json.loads(line.removeprefix("CHECKED"))
    before = {name: count for name, count in checked.items() if name.startswith("step_4/")}
    assert len(before) == 4
    assert set(before.values()) == {1}, "a resume reads the bytes of its checkpoint once to check them"
    resumed, whole = logged(folder / "run"), logged(folder / "whole")
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in whole]
    for now, then in zip(resumed, whole, strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)
        for key in ("lr", "tokens", "samples", "examples_probed", "examples_trained"):
            assert now[key] == then[key]
        for key in ("seen", "per_source", "kept_small", "label_tokens"):
            assert now["coreset"][key] == then["coreset"][key]
    adapters = [load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("run", "whole")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-5)


def test_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run", "whole", "--out", "report"]) == 0
    assert "run of version 0.1.0" in capsys.readouterr().out
    assert "run of version 0.1.0" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_exports_a_checkpoint_and_a_finished_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--out", "from_checkpoint"]) == 0
    assert main(["export", "whole", "--out", "from_end"]) == 0
    said = capsys.readouterr().out
    assert "after step 4" in said
    written, kept = (load_file(folder / name / "adapter_model.safetensors") for name in ("from_end", "whole/adapter"))
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)
    assert load_file(folder / "from_checkpoint" / "adapter_model.safetensors").keys() == kept.keys()


def test_watches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", "whole"]) == 0
    assert "8" in capsys.readouterr().out
