"""Runs gathered into arms, and what these are held against."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from colm_ds.report import Run, load_run
from colm_ds.report.arms import equal_budget, make_arms, references
from colm_ds.report.section import drawn_arms, main_arm
from tests.report.run_folders import ARMS, write_run


def bare_run(folder: Path, name: str, loss: float, seed: int = 0, **colm: Any) -> Run:
    """A finished run with nothing but a held-out loss."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": name, "seed": seed, "colm": colm}))
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "heldout": {"overall": loss}}))
    return load_run(folder)


def test_seeds_are_one_arm(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{arm}{seed}", f"{arm}-seed{seed}", arm=arm, seed=seed, num_steps=10))
        for seed in range(3)
        for arm in ("plain-64", "colm-spsa")
    ]
    arms = make_arms(runs)
    assert [arm.name for arm in arms] == ["plain-64", "colm-spsa"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1, 2], [0, 1, 2]]
    assert arms[0].facts[0].small == ["dates", "units", "logic"]
    measure = arms[0].values["heldout.overall"]
    values = [run.summary["heldout"]["overall"] for run in arms[0].runs]
    assert measure.mean == pytest.approx(sum(values) / 3)
    assert measure.num_seeds == 3
    assert measure.standard_error == pytest.approx(statistics.stdev(values) / 3**0.5)


def test_seeds_that_hold_out_other_numbers_are_one_arm(tmp_path: Path) -> None:
    """Of a recipe's held-out part, which the seed draws; without a recipe the counts say that the data are others."""
    for recipe, num_arms in (({"steps": 5}, 1), (None, 2)):
        runs = [
            load_run(
                write_run(
                    tmp_path / f"{num_arms}_{seed}",
                    f"run{seed}",
                    arm="plain-64",
                    seed=seed,
                    num_steps=5,
                    config={"sources": {"a": 30 - seed, "b": 60}, "recipe": recipe},
                )
            )
            for seed in range(2)
        ]
        assert len(make_arms(runs)) == num_arms


@pytest.mark.parametrize(
    "extra", [{"counted_gib": {"total": 1.0}}, {"coreset": {"gradient_variance": {"coreset": 1.0}}}]
)
def test_clocks_leave_out_measurements(extra: dict[str, Any], tmp_path: Path) -> None:
    """A step that measures something besides training takes as long as the median one."""
    run = bare_run(tmp_path / "run", "a", 1.0)
    entries = [
        {"step": step, "loss": 1.0, "tokens": 10, "time_s": {"total": 30.0 if step == 3 else 2.0}}
        for step in range(1, 6)
    ]
    entries[2] |= extra
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (arm,) = make_arms([load_run(run.folder)])
    assert arm.facts[0].clocks["seconds"][5] == pytest.approx(10.0)


def test_same_seed_twice_is_two_arms_of_different_names(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / str(place), "plain-64", num_steps=5)) for place in range(3)]
    assert [arm.name for arm in make_arms(runs)] == ["plain-64", "plain-64 (2)", "plain-64 (3)"]


def test_unfinished_seed_is_left_out_of_the_means(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / str(seed), "plain-64", seed=seed, num_steps=20, finished=seed != 1))
        for seed in range(3)
    ]
    (arm,) = make_arms(runs)
    assert len(arm.runs) == 3
    assert [found.run.seed for found in arm.used] == [0, 2]
    assert arm.values["heldout.overall"].num_seeds == 2


def test_plain_arms_are_recognised(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name, num_steps=3)) for name in ARMS]
    arms = make_arms(runs)
    roles = {arm.name: {role: other.name for role, other in references(arm, arms).items()} for arm in arms}
    plain = {"plain_r": "plain-128", "plain_b": "plain-64"}
    assert roles == {
        "plain-128": {"plain_b": "plain-64"},
        "plain-64": {"plain_r": "plain-128"},
        "keep-random": plain,
        "colm-spsa": plain | {"keep_random": "keep-random"},
        "colm-sketch": plain | {"keep_random": "keep-random"},
    }


def test_plain_on_a_batch_of_b_is_plain_b(tmp_path: Path) -> None:
    runs = [
        bare_run(tmp_path / "a", "all of 64", 1.0, selector="full", large_batch_size=64),
        bare_run(tmp_path / "b", "all of 128", 1.0, selector="full", large_batch_size=128),
        bare_run(tmp_path / "c", "colm", 1.0, selector="colm", large_batch_size=128, coreset_size=64),
    ]
    arms = make_arms(runs)
    found = {role: other.name for role, other in references(arms[2], arms).items()}
    assert found == {"plain_r": "all of 128", "plain_b": "all of 64"}


def test_arms_may_be_named(tmp_path: Path) -> None:
    """As a sweep names them: also where configurations are equal or missing."""
    runs = [load_run(write_run(tmp_path / str(place), "plain-64", seed=0, num_steps=2)) for place in range(2)]
    arms = make_arms({"one": runs[:1], "none": [], "other": runs[1:]})
    assert [arm.name for arm in arms] == ["one", "other"]


def curve_run(folder: Path, name: str, seconds: float, losses: list[float], seed: int = 0) -> Run:
    """A finished run evaluated at its start and after every step."""
    folder.mkdir()
    steps = [{"step": 0, "heldout": {"overall": losses[0]}}]
    steps += [
        {"step": step, "tokens": 10, "time_s": {"total": seconds}, "heldout": {"overall": loss}}
        for step, loss in enumerate(losses[1:], start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "config.json").write_text(json.dumps({"name": name, "seed": seed, "colm": {"selector": name}}))
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
    return load_run(folder)


def test_equal_budgets(tmp_path: Path) -> None:
    """The quicker arm has half the steps of the other in as many seconds; curves are straight between evaluations."""
    quick = curve_run(tmp_path / "quick", "quick", 1.0, [5.0, 4.0, 3.0, 2.5])
    slow = curve_run(tmp_path / "slow", "slow", 2.0, [5.0, 3.0, 2.0])
    arms = make_arms([quick, slow])
    found = {axis: equal_budget(arms[1], arms[0], axis) for axis in ("steps", "tokens", "seconds")}
    assert found["steps"] is not None
    assert found["tokens"] is not None
    assert found["seconds"] is not None
    assert found["steps"].mean == pytest.approx(2.0 - 3.0)
    assert found["tokens"].mean == pytest.approx(2.0 - 3.0)
    assert found["seconds"].mean == pytest.approx((3.0 + 2.0) / 2 - 2.5)  # after 3 s
    assert equal_budget(arms[1], arms[0], "seconds", "small") is None


def test_equal_budgets_are_paired_by_seed(tmp_path: Path) -> None:
    runs = []
    for seed, (one, other) in enumerate([(2.0, 2.1), (2.5, 2.62), (3.0, 3.11)]):
        runs.append(curve_run(tmp_path / f"a{seed}", "a", 1.0, [5.0, one], seed))
        runs.append(curve_run(tmp_path / f"b{seed}", "b", 1.0, [5.0, other], seed))
    arms = make_arms(runs)
    found = equal_budget(arms[0], arms[1], "seconds")
    assert found is not None
    assert found.mean == pytest.approx(-0.11)
    assert found.standard_error == pytest.approx(0.01 / 3**0.5)


def test_of_plain_arms_of_one_size_the_one_with_as_many_steps_is_meant(tmp_path: Path) -> None:
    steps = {"half": ("plain-128", 5), "whole": ("plain-128", 10), "b": ("plain-64", 10), "mine": ("colm-spsa", 10)}
    runs = [
        load_run(write_run(tmp_path / name, name, arm=arm, num_steps=count)) for name, (arm, count) in steps.items()
    ]
    arms = {arm.name: arm for arm in make_arms(runs)}
    assert references(arms["mine"], list(arms.values()))["plain_r"] is arms["whole"]
    assert references(arms["mine"], [arms["half"], arms["b"], arms["mine"]])["plain_r"] is arms["half"]


def test_pictures_show_what_selects_before_the_rest(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name, num_steps=3)) for name in ARMS]
    arms = make_arms(runs)
    drawn = [arm.name for arm in drawn_arms(arms, 5)]
    assert len(drawn) == 5
    assert {"colm-spsa", "colm-sketch"} <= set(drawn)
    assert drawn_arms(arms, 1) == [main_arm(arms)]
