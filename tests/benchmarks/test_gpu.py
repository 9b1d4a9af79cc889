"""The GPU measurements without a GPU: every part runs tiny, keeps its rows, and its tables are written."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import collect, step, train
from benchmarks.gpu.picture import OTHER, Profile, kind_of
from benchmarks.gpu.requirements import missing_of_wheels
from benchmarks.gpu.rows import Part, read_rows
from benchmarks.gpu.tests import read_report
from benchmarks.gpu.weights import hugging_face_name, interleaved
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from tests.probe.oracles import make_examples
from tests.ranks import Ranks
from tests.tiny_models import tiny_model

STEP_KEYS = {"median_s", "tokens_per_s", "share_of_peak", "share_of_peak_with_all_passes", "forwards", "memory_gib"}
STEP_KEYS |= {"exchange_and_selection_share", "phase_s", "steps_s", "padding_fraction", "device", "date"}


def run_part(name: str, arguments: list[str]) -> tuple[int, str]:
    """In a rank: run a part as its command does; its exit code, and what there is to say if that is not 0."""
    import importlib

    code = importlib.import_module(f"benchmarks.gpu.{name}").main(arguments)
    return code, json.dumps(read_failures(Path(arguments[arguments.index("--out") + 1])))


def read_failures(folder: Path) -> dict[str, Any]:
    """Return what failed, by file."""
    return {file.name: json.loads(file.read_text())["failed"] for file in folder.glob("dry_*.json")}


def dry(pools: dict[int, Ranks], folder: Path, name: str, *more: str) -> list[dict[str, Any]]:
    """Run a part dry and return its rows."""
    arguments = ["--dry", "--out", str(folder), "--kept", str(folder / "none"), *more]
    ((code, failures),) = pools[1].run(run_part, name, arguments, timeout_s=250.0)
    assert code == 0, failures
    return read_rows(folder / f"dry_{name}.json")


def test_losses_by_cut_cross_entropy_stand_in_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a package that is made up here, which forms the logits all the same; Phi's head has a bias."""

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return functional.cross_entropy(hidden @ weight.T, targets, reduction=reduction)

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=linear_cross_entropy))
    for family in ("phi", "llama"):
        model = tiny_model(family)
        batch = make_micro_batch(make_examples())
        ours = example_loss_sums(model, find_loss_head(model), batch)
        with step.cut_cross_entropy(model):
            theirs = example_loss_sums(model, find_loss_head(model), batch)
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("off", ["losses", "gradients", "softmax"])
def test_losses_that_are_not_ours_are_not_measured(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a number that changes no gradient, or with the right losses and gradients that are not."""

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = hidden @ weight.T
        losses = functional.cross_entropy(logits, targets, reduction=reduction)
        if off == "softmax":  # half of its gradient is left out
            half = logits.logsumexp(-1) / 2
            return losses - half + half.detach()
        return losses + 1.0 if off == "losses" else 1.1 * losses - 0.1 * losses.detach()

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=linear_cross_entropy))
    with pytest.raises(RuntimeError, match="losses are off by"):
        step.cut_cross_entropy(tiny_model("phi"))


@pytest.mark.distributed
@pytest.mark.slow
def test_step_runs_dry(pools: dict[int, Ranks], tmp_path: Path) -> None:
    rows = dry(pools, tmp_path, "step", "--shapes", "Phi-2", "--arms", "plain 8", "spsa, replay", "matched")
    found = {row["arm"]: row for row in rows}
    assert found["CoLM 4 of 8, spsa, replay"]["replays"]
    assert found["CoLM 4 of 8, spsa, replay, no dropout"]["replays"]
    assert not found["plain 8"]["exchange_and_selection_share"] > 0.5
    assert all(row.keys() >= STEP_KEYS for row in rows)
    assert all(len(row["steps_s"]) == 1 and row["median_s"] > 0 for row in rows)
    assert found["plain 8"]["forwards"] == 8 * 3
    assert found["plain 8"]["share_of_peak_with_all_passes"] == pytest.approx(1.5 * found["plain 8"]["share_of_peak"])
    picture = dry(pools, tmp_path, "step", "--profile")[-1]
    assert (tmp_path / picture["picture"]).stat().st_size > 10_000
    assert 0 < picture["busy_share"] <= 1
    table = collect.steps_table(collect.Results.read(tmp_path, dry=True))
    assert "| plain 8 | " in table
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.split("\n")}
    assert lines["plain 8, once more"].count(collect.NONE) == 0  # a switch: Llama's part of the line is empty
    assert lines["plain 8"].count(collect.NONE) == 1  # Llama's
    assert lines["plain 4"].count(collect.NONE) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_pretrain_runs_dry(pools: dict[int, Ranks], tmp_path: Path) -> None:
    rows = dry(pools, tmp_path, "pretrain")
    assert len(rows) == 7
    assert all(row.keys() >= STEP_KEYS and not row["replays"] for row in rows if "CoLM" in row["arm"])
    assert collect.NONE not in collect.pretraining_table(collect.Results.read(tmp_path, dry=True))


@pytest.mark.distributed
@pytest.mark.slow
def test_memory_runs_dry(pools: dict[int, Ranks], tmp_path: Path) -> None:
    rows = dry(pools, tmp_path, "memory")
    assert len(rows) == 2
    assert all(abs(row["error"]["total"]) < 0.1 for row in rows)
    assert "Largest error of a peak" in collect.memory_text(collect.Results.read(tmp_path, dry=True))


@pytest.mark.slow
def test_train_runs_dry(tmp_path: Path, repo_root: Path) -> None:
    """Two runs, the questions after the first, and what they wrote in an archive; a second call finds all done."""
    shutil.rmtree(repo_root / "runs" / "gpu_work" / "dry_train", ignore_errors=True)
    ran = run_script(repo_root, tmp_path, "train", "--dry", "--seconds", "240")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = {row["key"]: row for row in read_rows(tmp_path / "dry_train.json")}
    assert list(rows) == ["b 8: plain 8, seed 0", "b 8: tokens 8 of 32, seed 0", "questions: b 8: plain 8, seed 0"]
    assert rows["questions: b 8: plain 8, seed 0"]["questions"]["svamp"]["n"] == 2
    assert all(row["heldout"]["overall"] > 0 for row in list(rows.values())[:2])
    with tarfile.open(tmp_path / "dry_train_runs.tar.gz") as archive:
        names = archive.getnames()
    place = "runs/gpu_work/dry_train/tokens_8_of_32/seed_0"
    assert {f"{place}/metrics.jsonl", f"{place}/summary.json", f"{place}/config.json"} <= set(names)
    assert not any("safetensors" in name for name in names)
    table = collect.training_table(collect.Results.read(tmp_path, dry=True))
    assert "| b 8: tokens 8 of 32 | 1 | " in table
    again = run_script(repo_root, tmp_path, "train", "--dry")
    assert "0 of 3 processes to run" in again.stdout


def test_processes_fit_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No more run at once than there are slots and memory; what follows a failure is not started."""
    together: list[float] = []
    running: dict[str, float] = {}

    class Process:
        """Ends at its second look, with an error where its key says so."""

        def __init__(self, task: train.Task) -> None:
            self.task, self.looks = task, 0
            running[task.key] = task.gib
            together.append(sum(running.values()))

        def poll(self) -> int | None:
            """Return the exit code, or None while it runs."""
            self.looks += 1
            if self.looks < 2:
                return None
            running.pop(self.task.key, None)
            return int("fails" in self.task.key)

    started: list[str] = []

    def start(task: train.Task) -> Process:
        started.append(task.key)
        return Process(task)

    monkeypatch.setattr(train, "start", start)
    monkeypatch.setattr(train, "row_of", lambda task: {})
    keys = [("a", "", 30.0), ("b fails", "", 30.0), ("c", "", 30.0), ("after a", "a", 4.0), ("after b", "b fails", 4.0)]
    tasks = [train.Task(key, ("x",), tmp_path / key / "run", after, gib) for key, after, gib in keys]
    for task in tasks:
        task.log.parent.mkdir(parents=True)
        task.log.write_text("why")
    part = part_in(tmp_path)
    train.run(part, tasks, 3)
    assert max(together) <= train.DEVICE_GIB
    assert set(started) == {"a", "b fails", "c", "after a"}
    assert {row["key"] for row in part.rows} == {"a", "c", "after a"}
    assert part.close() == 1


@pytest.mark.slow
def test_tests_run_on_a_cpu(tmp_path: Path, repo_root: Path) -> None:
    """What of `tests/gpu` means something without a GPU, run there as a rehearsal."""
    ran = run_script(repo_root, tmp_path, "tests", "--dry", "--seconds", "250")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    outcomes = [row["outcome"] for row in read_rows(tmp_path / "dry_tests.json")]
    assert outcomes.count("passed") > 50
    assert "failed" not in outcomes


def test_script_says_what_it_does_not_know(tmp_path: Path, repo_root: Path) -> None:
    ran = run_script(repo_root, tmp_path, "stepp")
    assert ran.returncode == 2
    assert "stepp: no such part. Choose of tests step" in ran.stderr


def run_script(root: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `run.sh` without what may have been packed here."""
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(folder), "PACK": str(folder / "none")}
    command = ["bash", str(root / "benchmarks" / "gpu" / "run.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290, check=False)


def part_in(folder: Path, seconds: float = 100.0) -> Part:
    """A part without anything to measure."""
    return Part("step", argparse.Namespace(dry=True, seconds=seconds, out=folder, kept=folder / "kept"))


def test_rows_are_measured_once(tmp_path: Path) -> None:
    part = part_in(tmp_path)
    assert part.measure("a", lambda: {"value": 1}) is not None
    assert part.measure("a", lambda: {"value": 2}) is None
    later = part_in(tmp_path)
    assert later.measure("a", lambda: {"value": 3}) is None
    (tmp_path / "kept").mkdir()
    (tmp_path / "dry_step.json").rename(tmp_path / "kept" / "dry_step.json")
    assert part_in(tmp_path).known("a") is not None
    other = part_in(tmp_path)
    other.device_name = "another"
    assert other.measure("a", lambda: {"value": 4}) is not None


def test_what_does_not_fit_is_left_and_what_fails_is_noted(tmp_path: Path) -> None:
    part = part_in(tmp_path, seconds=10.0)

    def fails() -> dict[str, Any]:
        raise ValueError("no good")

    assert part.measure("long", lambda: {}, estimate_s=60.0) is None
    assert part.measure("bad", fails) is None
    assert part.measure("good", lambda: {"value": 1}) is not None
    assert part.close() == 1
    written = json.loads((tmp_path / "dry_step.json").read_text())
    assert written["left"] == ["long"]
    assert "ValueError: no good" in written["failed"]["bad"]
    assert [row["key"] for row in written["rows"]] == ["good"]
    assert {"command", "date", "device", "versions"} <= written.keys()


def call(rows: list[dict[str, Any]], date: str) -> dict[str, Any]:
    """A part's file as a call leaves it."""
    facts = dict.fromkeys(collect.CALL, "")
    return {"part": "train", "peak_flops": 1.0, **facts, "date": date, "rows": rows}


def row(key: str, date: str, **more: Any) -> dict[str, Any]:
    """A training run's row."""
    return {"key": key, "device": "H100", "date": date, **more}


def test_calls_are_merged(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    for number, rows in enumerate([[row("a", "1"), row("b", "3")], [row("a", "2"), row("b", "2"), row("c", "2")]]):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(call(rows, str(number))))
        collect.merge(file, kept)
        collect.merge(file, kept)  # a second time changes nothing
    found = {one["key"]: one["date"] for one in read_rows(kept)}
    assert found == {"a": "2", "b": "3", "c": "2"}
    assert [one["date"] for one in json.loads(kept.read_text())["calls"]] == ["0", "1"]


def test_documents_have_the_tables_of_the_kept_results(tmp_path: Path, repo_root: Path) -> None:
    for name in ("benchmarks/README.md", "docs/MEMORY.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(repo_root / name, tmp_path / name)
    assert collect.main(["--root", str(tmp_path)]) == 0
    for name in ("benchmarks/README.md", "docs/MEMORY.md"):
        assert (tmp_path / name).read_text() == (repo_root / name).read_text(), f"{name}: run benchmarks.gpu.collect"


def test_held_out_losses_are_paired() -> None:
    """Differences to plain training on b with the same seed, their mean and its standard error."""
    losses = {("chosen", 0): 1.9, ("chosen", 1): 0.7, ("plain 8", 0): 0.0, ("plain 4", 0): 2.0}
    losses |= {("plain 4", 1): 1.0, ("plain 4", 2): 9.0}
    rows = [
        row(f"b 8: {arm}, seed {seed}", "1", seed=seed, heldout={"overall": loss, "macro": 2 * loss})
        for (arm, seed), loss in losses.items()
    ]
    table = collect.training_table(collect.Results({"train": {one["key"]: one for one in rows}}, "H100"))
    assert "| b 8: plain 4 | 3 | 4.0000 ± 2.5166 | 8.0000 ± 5.0332 |" in table
    assert "| b 8: chosen | 2 | -0.2000 ± 0.1000 | -0.4000 ± 0.2000 |" in table


def test_reports_of_pytest_are_read() -> None:
    text = """<testsuites><testsuite><testcase classname="tests.gpu.test_a" name="one" time="0.5"/>
    <testcase classname="tests.gpu.test_a" name="two" time="1"><failure message="no">why</failure></testcase>
    <testcase classname="tests.gpu.test_b" name="three" time="0"><skipped message="none here"/></testcase>
    </testsuite></testsuites>"""
    found = {case["key"]: case["outcome"] for case in read_report(text)}
    assert found == {"test_a: one": "passed", "test_a: two": "failed", "test_b: three": "skipped"}


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """A wheel that holds its metadata alone."""
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))


def test_wheels_cover_what_they_need(tmp_path: Path) -> None:
    for folder in ("wheels", "cache"):
        (tmp_path / folder).mkdir()
    wheel(tmp_path / "wheels", "big", "1.0", "small==2", "torch>=2", "rare", 'odd; extra == "more"')
    wheel(tmp_path / "wheels", "small", "2.1")
    wheel(tmp_path / "cache", "source", "1.0", "unknown")  # of the weights: not installed there
    assert missing_of_wheels(tmp_path) == [
        "big needs small==2: 2.1 is packed",
        "big needs rare: neither packed nor expected",
    ]


def test_rows_of_weights_are_put_in_order() -> None:
    """GGUF has the two halves of a head's rotation in turns, transformers one after the other."""
    rows = np.arange(8)[:, None] * np.ones((1, 3))
    turned = interleaved(rows, heads=2)[:, 0].tolist()
    assert turned == [0, 2, 1, 3, 4, 6, 5, 7]
    assert hugging_face_name("blk.7.ffn_down.weight") == "model.layers.7.mlp.down_proj.weight"
    with pytest.raises(SystemExit, match="no such tensor"):
        hugging_face_name("blk.7.other.weight")


def test_pictures_know_what_was_busy() -> None:
    found = Profile([(0.0, 4.0, "ampere_gemm"), (2.0, 6.0, "flash_fwd"), (8.0, 9.0, "vectorized_kernel")], 10.0)
    assert found.busy_us == 7.0
    assert [name for name, _, _ in found.by_name()] == ["ampere_gemm", "flash_fwd", "vectorized_kernel"]
    assert found.by_kind()["matrix products"] == 4.0
    assert kind_of("Memcpy HtoD (Pinned -> Device)") == "copies"
    assert kind_of("vectorized_kernel") == OTHER
