"""Memory in the report: phases and parts of runs that have them, both protocols, and the picture of all three costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colm_ds.report import Comparison, Run, compare, load_run
from colm_ds.report.arms import accumulation_steps, make_arms
from colm_ds.report.cost import time_section
from colm_ds.report.differences import references
from tests.report.run_folders import PROTOCOL_ARMS, SIZED_ARMS, measured_run, measured_runs, write_run


def loaded(folder: Path, arms: dict[str, tuple[int, int, int, float]], **options: Any) -> list[Run]:
    return [load_run(path) for path in measured_runs(folder, arms, **options)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("memory")
    return compare(loaded(folder / "a", PROTOCOL_ARMS), folder, sized=loaded(folder / "b", SIZED_ARMS))


def table(found: Comparison, key: str) -> list[dict[str, Any]]:
    numbers = json.loads(found.files["json"].read_text())["tables"][key]
    return [dict(zip(numbers["columns"], row, strict=True)) for row in numbers["rows"]]


def test_both_protocols_side_by_side(found: Comparison) -> None:
    steps, micro = "equal accumulation steps", "equal micro-batch"
    numbers = json.loads(found.files["json"].read_text())["tables"]["protocols"]
    rows = {row[0]: row[1:] for row in numbers["rows"]}
    assert list(rows) == ["plain 16", "plain 32", "16 of 32", "plain 64", "32 of 64"]
    places = [numbers["columns"].index(f"{name}: micro-batch") - 1 for name in ("equal steps", micro)]
    shown = {name: [rows[name][place : place + 3] for place in places] for name in rows}
    assert shown["16 of 32"] == [
        [2, 1.1, pytest.approx(1.1 / 1.6, rel=1e-4)],
        [2, 1.1, pytest.approx(1.1 / 1.05, rel=1e-4)],
    ]
    assert shown["32 of 64"] == [[4, 1.7, pytest.approx(1.7 / 2.9, rel=1e-4)], [None, None, None]]
    assert shown["plain 32"] == [[4, 1.6, None], [2, 1.05, None]]
    made = table(found, "micro_batches")
    assert [row["tokens of the largest"] for row in made] == [100 * row["micro-batch"] for row in made]  # where counted
    assert {row["accumulation steps"] for row in made if row["protocol"] == steps} == {4}
    assert {row["micro-batch"] for row in made if row["protocol"] == micro} == {2}
    section = next(section for section in found.sections if section.key == "protocols")
    assert [picture.title.rpartition(", ")[2] for picture in section.pictures] == [steps, micro]
    text = " ".join(section.text)
    assert "Equal accumulation steps: every batch" in text
    assert "Equal micro-batch: every pass" in text
    assert "takes 0.69 × the peak memory and" in text
    assert "allocations counted one by one" in text


def test_colm_is_compared_with_plain_training_and_not_its_control(tmp_path: Path) -> None:
    """The control keeps b of r as well; it stands before CoLM in a grid."""
    control = measured_run(tmp_path / "control", "control", 32, 16, 2, 1.3, selector="keep_random")
    plain = measured_runs(tmp_path / "rest", PROTOCOL_ARMS)
    found = compare([load_run(path) for path in (plain[0], control, *plain[1:])], tmp_path)
    text = " ".join(next(section for section in found.sections if section.key == "protocols").text)
    assert "CoLM 16 of 32" in text
    assert "control" not in text
    row = next(row for row in table(found, "protocols") if row["training"] == "16 of 32")
    assert row["equal micro-batch: peak, GiB"] == 1.1


def test_the_other_chapters_leave_out_arms_of_other_sizes(found: Comparison) -> None:
    assert [row["arm"].removesuffix(" (unfinished)") for row in table(found, "arms")] == list(PROTOCOL_ARMS)
    assert {row["run"] for row in table(found, "runs")} == {*PROTOCOL_ARMS, *SIZED_ARMS}


def test_phases_and_parts(found: Comparison) -> None:
    row = table(found, "memory")[1]
    assert (row["probe, GiB"], row["backward, GiB"], row["peak, GiB"]) == (0.4, 1.1, 1.1)
    assert row["accumulation steps"] == 4
    parts = table(found, "memory_parts")[0]
    assert parts["optimizer, GiB"] == 0.4
    assert parts["activations, GiB"] == pytest.approx(1.0 - 0.2 - 0.1 - 0.4 - 0.05 - 0.01)  # the parts are the peak
    assert "probe, GiB" not in parts  # of nobody's peak
    keys = {picture.key for section in found.sections for picture in section.pictures}
    assert {"memory", "parts", "tradeoff", "batch-0", "batch-1", "heldout-per-source"} <= keys


def test_counted_steps_are_not_timed(found: Comparison) -> None:
    rows = table(found, "phases")
    assert all(row["step in all, s"] < 3 for row in rows)
    for row in rows:
        parts = [value for label, value in row.items() if label.endswith(", s") and "in all" not in label]
        assert sum(value or 0.0 for value in parts) == pytest.approx(row["step in all, s"], rel=0.02)
    assert all(curve["seconds"][-1] < 30 for curve in _curves(found))


def test_parts_of_training_are_counted_once(tmp_path: Path) -> None:
    """A finished run's medians: training is its forward and backward, what else it took is `other`."""
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["phase_s"] = {"select": 0.01, "train": 1.0, "forward": 0.3, "backward": 0.6, "step": 0.05, "save": 9.0}
    summary["step_s"]["median"] = 1.1
    (folder / "summary.json").write_text(json.dumps(summary))
    arms, _ = make_arms([load_run(folder)])
    numbers = time_section(arms).tables[0].as_dict()
    row = dict(zip(numbers["columns"], numbers["rows"][0], strict=True))
    parts = {label: value for label, value in row.items() if label.endswith(", s") and "in all" not in label}
    assert not {"train, s", "save, s"} & set(parts)
    assert parts["other, s"] == pytest.approx(0.1 + 0.04)
    assert sum(parts.values()) == pytest.approx(1.1)


def test_padding_along_training(found: Comparison) -> None:
    rows = table(found, "padding")
    assert [row["arm"].removesuffix(" (unfinished)") for row in rows] == list(PROTOCOL_ARMS)
    for row in rows:
        assert 0.08 <= row["lowest"] <= row["first tenth"] <= row["highest"] <= 0.1
        assert row["lowest"] <= row["last tenth"] <= row["highest"]
    section = next(section for section in found.sections if section.key == "traffic")
    assert [picture.key for picture in section.pictures] == ["padding"]


def _curves(found: Comparison) -> list[dict[str, Any]]:
    arms = json.loads(found.files["json"].read_text())["arms"]
    return [curve for arm in arms for curve in arm["curves"]["train_loss_smoothed"]]


def test_references_of_both_protocols(tmp_path: Path) -> None:
    arms, _ = make_arms(loaded(tmp_path, PROTOCOL_ARMS))
    roles = {role: arm.name for role, arm in references(arms[1], arms).items()}
    assert roles == {
        "plain_r": "plain 32 (micro-batch 2)",
        "plain_r_steps": "plain 32 (micro-batch 4)",
        "plain_b": "plain 16",
    }
    assert [accumulation_steps(arm) for arm in arms] == [4, 4, 4, 8]


def test_peaks_are_of_one_kind(tmp_path: Path) -> None:
    """One run without counted steps: the resident memory of all."""
    some = loaded(tmp_path / "some", dict(list(PROTOCOL_ARMS.items())[:2]))
    rest = loaded(tmp_path / "rest", dict(list(PROTOCOL_ARMS.items())[2:]), counted=False)
    arms, _ = make_arms([*some, *rest])
    assert [arm.mean("peak_gib") for arm in arms] == pytest.approx([1.4, 1.5, 2.0, 1.45])
    assert {arm.memory_kind for arm in arms} == {"resident"}


def test_summary_and_caveats_know_both(found: Comparison) -> None:
    assert not any("the micro-batch" in caveat for caveat in found.caveats)
    assert "Peak memory, against that of" in found.summary
