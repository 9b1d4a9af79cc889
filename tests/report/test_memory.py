"""Memory in the report: phases and parts of runs that have them, both protocols, and the picture of all three costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colm_ds.report import Comparison, Run, compare, load_run
from colm_ds.report.arms import make_arms, references
from colm_ds.report.facts import run_facts
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


def of_arm(found: Comparison, key: str, arm: str) -> dict[str, float]:
    """Column of an arm, by the first cells of the rows."""
    numbers = json.loads(found.files["json"].read_text())["tables"][key]
    return {row[0]: row[numbers["columns"].index(arm)] for row in numbers["rows"]}


WHOLE = ("a step", "fastest 10%", "slowest 10%")


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
    assert [row["accumulation steps"] for row in made] == [4, 4, 4, 8]
    section = next(section for section in found.sections if section.key == "costs")
    captions = {picture.title: picture.caption for picture in section.pictures if picture.key.startswith("batch")}
    assert [title.rpartition(", ")[2] for title in captions] == [steps, micro]
    text = " ".join(captions.values())
    assert "Equal accumulation steps: a larger batch has larger micro-batches" in text
    assert "Equal micro-batch: a larger batch takes more accumulation steps" in text
    assert "takes 0.69 × the peak memory and" in text
    assert "allocations counted one by one" in " ".join(section.text)


def test_colm_is_compared_with_plain_training_and_not_its_control(tmp_path: Path) -> None:
    """The control keeps b of r as well; it stands before CoLM in a grid."""
    control = measured_run(tmp_path / "control", "control", 32, 16, 2, 1.3, selector="keep_random")
    plain = measured_runs(tmp_path / "rest", PROTOCOL_ARMS)
    found = compare([load_run(path) for path in (plain[0], control, *plain[1:])], tmp_path)
    section = next(section for section in found.sections if section.key == "costs")
    text = " ".join(picture.caption for picture in section.pictures if picture.key.startswith("batch"))
    assert "CoLM 16 of 32" in text
    assert "control" not in text
    row = next(row for row in table(found, "protocols") if row["training"] == "16 of 32")
    assert row["equal micro-batch: peak, GiB"] == 1.1


def test_the_other_chapters_leave_out_arms_of_other_sizes(found: Comparison) -> None:
    assert [row["arm"].removesuffix(" (unfinished)") for row in table(found, "arms")] == list(PROTOCOL_ARMS)
    assert {row["run"] for row in table(found, "runs")} == {*PROTOCOL_ARMS, *SIZED_ARMS}


def test_phases_and_parts(found: Comparison) -> None:
    peaks = of_arm(found, "memory", "CoLM 16 of 32")
    assert (peaks["probe"], peaks["backward"], peaks["peak"]) == (0.4, 1.1, 1.1)
    parts = of_arm(found, "memory_parts", "plain 16")
    assert parts["optimizer"] == 0.4
    assert parts["activations"] == pytest.approx(1.0 - 0.2 - 0.1 - 0.4 - 0.05 - 0.01)  # the parts are the peak
    assert "probe" not in parts  # of nobody's peak
    keys = {picture.key for section in found.sections for picture in section.pictures}
    assert {
        "memory",
        "memory_parts",
        "tradeoff",
        "batch-0",
        "batch-1",
        "heldout-per-source",
    } <= keys  # the same pictures


def test_parts_of_an_unfinished_run_are_those_of_one_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        part, peak = ("probe", 11.0) if number % 2 else ("activations", 10.0)
        line |= {"memory_gib": {"peak": peak}, "memory_parts_gib": {"weights": 2.0, part: peak - 2.0}}
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    facts = run_facts(load_run(folder), ())
    parts = {key: value for key, value in facts.values.items() if key.startswith("peak_memory_parts_gib.")}
    assert parts == {"peak_memory_parts_gib.weights": 2.0, "peak_memory_parts_gib.probe": 9.0}


def test_counted_steps_are_not_timed(found: Comparison) -> None:
    for arm in PROTOCOL_ARMS:
        row = of_arm(found, "phases", arm)
        assert row["a step"] < 3
        parts = [value for label, value in row.items() if label not in WHOLE]
        assert sum(value or 0.0 for value in parts) == pytest.approx(row["a step"], rel=0.02)
    arms = json.loads(found.files["json"].read_text())["arms"]
    assert all(arm["curves"]["loss"]["seconds"][-1] < 30 for arm in arms)


def test_parts_of_training_are_counted_once(tmp_path: Path) -> None:
    """A finished run's medians: training is its forward and backward, what else it took is `other`."""
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["phase_s"] = {"select": 0.01, "train": 1.0, "forward": 0.3, "backward": 0.6, "step": 0.05, "save": 9.0}
    summary["step_s"]["median"] = 1.1
    (folder / "summary.json").write_text(json.dumps(summary))
    row = of_arm(compare([load_run(folder)], tmp_path / "report"), "phases", "plain-64")
    parts = {label: value for label, value in row.items() if label not in WHOLE}
    assert not {"train", "save"} & set(parts)
    assert parts["other"] == pytest.approx(0.1 + 0.04)
    assert sum(parts.values()) == pytest.approx(1.1)


def test_padding(found: Comparison) -> None:
    for row, arm in zip(table(found, "traffic"), found.arms, strict=True):
        steps = [step["padding_fraction"] for run in arm.runs for step in run.steps]
        assert row["padding"] == pytest.approx(sum(steps) / len(steps), rel=1e-5)
        assert row["signals, bytes per step"] == (2048 if "CoLM" in arm.name else 0)


def test_references_of_both_protocols(tmp_path: Path) -> None:
    arms = make_arms(loaded(tmp_path, PROTOCOL_ARMS))
    roles = {role: arm.name for role, arm in references(arms[1], arms).items()}
    assert roles == {
        "plain_r": "plain 32 (micro-batch 2)",
        "plain_r_steps": "plain 32 (micro-batch 4)",
        "plain_b": "plain 16",
    }
    assert [arm.accumulation_steps for arm in arms] == [4, 4, 4, 8]


def test_peaks_are_of_one_kind(tmp_path: Path) -> None:
    """One run without counted steps: the resident memory of all."""
    some = loaded(tmp_path / "some", dict(list(PROTOCOL_ARMS.items())[:2]))
    rest = loaded(tmp_path / "rest", dict(list(PROTOCOL_ARMS.items())[2:]), counted=False)
    arms = make_arms([*some, *rest])
    assert [arm.mean("peak_memory_gib.peak") for arm in arms] == pytest.approx([1.4, 1.5, 2.0, 1.45])
    assert {arm.used[0].memory_kind for arm in arms} == {"resident"}


def test_summary_and_caveats_know_both(found: Comparison) -> None:
    assert not any("the micro-batch" in caveat for caveat in found.caveats)
    assert "peak memory is 1.10 GiB, 1.05 × that of" in found.summary
