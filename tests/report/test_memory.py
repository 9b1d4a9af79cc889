"""Memory in the report: phases and parts of runs that have them, both protocols, and the picture of all three costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colm_ds.report import Comparison, Run, compare, load_run
from colm_ds.report.arms import accumulation_steps, make_arms
from colm_ds.report.differences import references
from tests.report.run_folders import write_run

PARTS = {"weights": 0.2, "gradients": 0.1, "optimizer": 0.4, "activations": 0.3, "replay": 0.05, "probe": 0.0}
PARTS |= {"selection": 0.01, "rest": 0.5}

# large, coreset, micro-batch, and the peak that was counted
ARMS = {
    "plain 16": (16, 16, 2, 1.0),
    "CoLM 16 of 32": (32, 16, 2, 1.1),
    "plain 32, same accumulation": (32, 32, 4, 1.6),
    "plain 32, same micro-batch": (32, 32, 2, 1.05),
}
SIZED = {"CoLM 32 of 64": (64, 32, 4, 1.7), "plain 64": (64, 64, 8, 2.9)}


def run(folder: Path, name: str, large: int, coreset: int, micro: int, peak: float, *, counted: bool = True) -> Run:
    """A run on two ranks whose memory was measured."""
    plain = large == coreset
    colm = {"large_batch_size": large, "coreset_size": coreset, "selector": "full" if plain else "colm"}
    changes: dict[str, Any] = {
        "world_size": 2,
        "colm": colm | ({} if plain else {"probe": {"estimator": "spsa", "num_probes": "auto"}}),
        "deepspeed": {"train_micro_batch_size_per_gpu": micro},
    }
    write_run(folder, name, arm="plain-64" if plain else "colm-spsa", num_steps=6, config=changes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peaks = {"probe": 0.9, "exchange": 0.9, "select": 0.8, "train": peak + 0.4, "forward": peak + 0.3}
    peaks |= {"backward": peak + 0.4, "step": 0.7, "save": 0.0, "peak": peak + 0.4}
    for line in lines[1:]:
        line |= {"memory_gib": peaks, "memory_kind": "resident", "memory_parts_gib": PARTS, "counted_gib": None}
        times = line["time_s"]
        times |= {"forward": 0.3 * times["train"], "backward": 0.6 * times["train"], "save": 5.0}
    if counted:
        lines[2]["counted_gib"] = {"probe": 0.4, "train": peak, "forward": peak - 0.2, "backward": peak, "total": peak}
        lines[2]["time_s"]["total"] = 1000.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").unlink()
    return load_run(folder)


def runs_of(folder: Path, arms: dict[str, tuple[int, int, int, float]], **options: Any) -> list[Run]:
    return [
        run(folder / f"run_{place}_{name}", name, *arm, **options) for place, (name, arm) in enumerate(arms.items())
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("memory")
    return compare(runs_of(folder / "a", ARMS), folder, sized=runs_of(folder / "b", SIZED))


def table(found: Comparison, key: str) -> list[dict[str, Any]]:
    numbers = json.loads(found.files["json"].read_text())["tables"][key]
    return [dict(zip(numbers["columns"], row, strict=True)) for row in numbers["rows"]]


def test_both_protocols_side_by_side(found: Comparison) -> None:
    rows = {(row["protocol"], row["arm"]): row for row in table(found, "protocols")}
    steps, micro = "equal accumulation steps", "equal micro-batch"
    assert rows[steps, "CoLM 16 of 32"]["× plain"] == pytest.approx(1.1 / 1.6, rel=1e-4)
    assert rows[micro, "CoLM 16 of 32"]["× plain"] == pytest.approx(1.1 / 1.05, rel=1e-4)
    assert rows[steps, "CoLM 32 of 64"]["× plain"] == pytest.approx(1.7 / 2.9, rel=1e-4)
    assert (micro, "plain 64") not in rows
    assert {row["accumulation steps"] for (name, _), row in rows.items() if name == steps} == {4}
    assert {row["micro-batch"] for (name, _), row in rows.items() if name == micro} == {2}
    section = next(section for section in found.sections if section.key == "protocols")
    assert [picture.title.rpartition(", ")[2] for picture in section.pictures] == [steps, micro]
    text = " ".join(section.text)
    assert "Equal accumulation steps: every batch" in text
    assert "Equal micro-batch: every pass" in text
    assert "takes against plain training on r = 32 0.69 × its memory" in text
    assert "allocations counted one by one" in text


def test_the_other_chapters_leave_out_arms_of_other_sizes(found: Comparison) -> None:
    assert [row["arm"].removesuffix(" (unfinished)") for row in table(found, "arms")] == list(ARMS)
    assert {row["run"] for row in table(found, "runs")} == {*ARMS, *SIZED}


def test_phases_and_parts(found: Comparison) -> None:
    row = table(found, "memory")[1]
    assert (row["probe, GiB"], row["backward, GiB"], row["peak, GiB"]) == (0.4, 1.1, 1.1)
    assert row["accumulation steps"] == 4
    parts = table(found, "memory_parts")[0]
    assert parts["optimizer, GiB"] == 0.4
    assert "probe, GiB" not in parts  # of nobody's peak
    keys = {picture.key for section in found.sections for picture in section.pictures}
    assert {"memory", "parts", "tradeoff", "batch-0", "batch-1", "heldout-per-source"} <= keys


def test_counted_steps_are_not_timed(found: Comparison) -> None:
    rows = table(found, "phases")
    assert all(row["step in all, s"] < 3 for row in rows)
    assert rows[0]["train, s"] < 0.2 * rows[0]["backward, s"]  # what it has beyond its parts
    assert all(curve["seconds"][-1] < 30 for curve in _curves(found))


def _curves(found: Comparison) -> list[dict[str, Any]]:
    arms = json.loads(found.files["json"].read_text())["arms"]
    return [curve for arm in arms for curve in arm["curves"]["train_loss_smoothed"]]


def test_references_of_both_protocols(tmp_path: Path) -> None:
    arms, _ = make_arms(runs_of(tmp_path, ARMS))
    roles = {role: arm.name for role, arm in references(arms[1], arms).items()}
    assert roles == {
        "plain_r": "plain 32, same micro-batch",
        "plain_r_steps": "plain 32, same accumulation",
        "plain_b": "plain 16",
    }
    assert [accumulation_steps(arm) for arm in arms] == [4, 4, 4, 8]


def test_peaks_are_of_one_kind(tmp_path: Path) -> None:
    """One run without counted steps: the resident memory of all."""
    some = runs_of(tmp_path / "some", dict(list(ARMS.items())[:2]))
    rest = runs_of(tmp_path / "rest", dict(list(ARMS.items())[2:]), counted=False)
    arms, _ = make_arms([*some, *rest])
    assert [arm.mean("peak_gib") for arm in arms] == pytest.approx([1.4, 1.5, 2.0, 1.45])
    assert {arm.memory_kind for arm in arms} == {"resident"}


def test_summary_and_caveats_know_both(found: Comparison) -> None:
    assert not any("the micro-batch" in caveat for caveat in found.caveats)
    assert "Peak memory, against that of" in found.summary
