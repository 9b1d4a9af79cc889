"""The GPU measurements without a GPU: every part runs tiny, keeps its rows, and its tables are written."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import collect
from benchmarks.gpu.picture import OTHER, Profile, kind_of
from benchmarks.gpu.requirements import missing_of_wheels
from benchmarks.gpu.rows import Part, read_rows
from benchmarks.gpu.tests import read_report
from benchmarks.gpu.weights import hugging_face_name, interleaved
from tests.ranks import Ranks

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
def test_train_resumes(tmp_path: Path, repo_root: Path) -> None:
    """Two arms at once, a step, then on from their checkpoints to the second."""
    shutil.rmtree(repo_root / "runs" / "gpu_work" / "dry_train", ignore_errors=True)
    started = run_script(repo_root, tmp_path, "train", "--dry", "--seconds", "240", "--arms", "keep_random", "spsa")
    assert started.returncode == 0, started.stdout + started.stderr
    rows = read_rows(tmp_path / "dry_train.json")
    assert {row["arm"] for row in rows} == {"keep_random 4 of 8", "CoLM 4 of 8, spsa"}
    assert all(row["steps"] == 2 and row["whole"] and list(row["heldout"]) == ["1", "2"] for row in rows)
    assert all(len(row["losses"]) == 2 and row["at_once"] == 2 for row in rows)
    again = run_script(repo_root, tmp_path, "train", "--dry", "--arms", "keep_random", "spsa")
    assert again.returncode == 0
    assert read_rows(tmp_path / "dry_train.json") == rows


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
    for number, rows in enumerate(
        [
            [row("a", "1", steps=100), row("b", "1", steps=300)],
            [row("a", "2", steps=300), row("b", "2", steps=100), row("c", "2", steps=1)],
        ]
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(call(rows, str(number))))
        collect.merge(file, kept)
        collect.merge(file, kept)  # a second time changes nothing
    found = {one["key"]: (one["date"], one["steps"]) for one in read_rows(kept)}
    assert found == {"a": ("2", 300), "b": ("1", 300), "c": ("2", 1)}
    assert [one["date"] for one in json.loads(kept.read_text())["calls"]] == ["0", "1"]


def test_documents_have_the_tables_of_the_kept_results(tmp_path: Path, repo_root: Path) -> None:
    for name in ("benchmarks/README.md", "docs/MEMORY.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(repo_root / name, tmp_path / name)
    assert collect.main(["--root", str(tmp_path)]) == 0
    for name in ("benchmarks/README.md", "docs/MEMORY.md"):
        assert (tmp_path / name).read_text() == (repo_root / name).read_text(), f"{name}: run benchmarks.gpu.collect"


def test_held_out_losses_are_paired() -> None:
    base = {"heldout": {"25": {"overall": 2.0}, "50": {"overall": 1.5}}}
    shorter = {"heldout": {"25": {"overall": 1.9}}}
    assert collect.loss_cell(base, None) == "1.5000"
    assert collect.loss_cell(shorter, base) == "-0.1000"
    assert collect.loss_cell(None, base) == ""


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
    wheel(tmp_path, "big", "1.0", "small==2", "torch>=2", "rare", 'odd; extra == "more"')
    wheel(tmp_path, "small", "2.1")
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
