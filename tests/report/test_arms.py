"""Runs gathered into arms, what they are held against, and which differences count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colm_ds.report import Run, load_run
from colm_ds.report.arms import Arm, make_arms
from colm_ds.report.differences import difference, ratio, references
from tests.report.run_folders import ARMS, write_run


def bare_run(folder: Path, name: str, loss: float, seed: int = 0, **colm: Any) -> Run:
    """A finished run with nothing but a held-out loss."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": name, "seed": seed, "colm": colm}))
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "heldout": {"overall": loss}}))
    return load_run(folder)


def arms_of(tmp_path: Path, losses: dict[str, list[float]]) -> list[Arm]:
    """Arms with these held-out losses, one for each seed."""
    runs = [
        bare_run(tmp_path / f"{name}{seed}", f"{name}-seed{seed}", loss, seed, selector=name)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return make_arms(runs)[0]


def test_seeds_are_one_arm(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{arm}{seed}", f"{arm}-seed{seed}", arm=arm, seed=seed, num_steps=10))
        for seed in range(3)
        for arm in ("plain-64", "colm-spsa")
    ]
    arms, small = make_arms(runs)
    assert [arm.name for arm in arms] == ["plain-64", "colm-spsa"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1, 2], [0, 1, 2]]
    assert small == ["dates", "units", "logic"]
    measure = arms[0].scalars["heldout_overall"]
    values = [run.summary["heldout"]["overall"] for run in arms[0].runs]
    assert measure.mean == pytest.approx(sum(values) / 3)
    assert measure.num_seeds == 3
    assert measure.standard_error is not None


def test_same_seed_twice_is_two_arms_of_different_names(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / str(place), "plain-64", num_steps=5)) for place in range(3)]
    assert [arm.name for arm in make_arms(runs)[0]] == ["plain-64", "plain-64 (2)", "plain-64 (3)"]


def test_unfinished_seed_is_left_out_of_the_means(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / str(seed), "plain-64", seed=seed, num_steps=20, finished=seed != 1))
        for seed in range(3)
    ]
    arm = make_arms(runs)[0][0]
    assert len(arm.runs) == 3
    assert [run.seed for run, _ in arm.counted] == [0, 2]
    assert arm.scalars["heldout_overall"].num_seeds == 2


def test_plain_arms_are_recognised(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name, num_steps=3)) for name in ARMS]
    arms = make_arms(runs)[0]
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
    arms = make_arms(runs)[0]
    found = {role: other.name for role, other in references(arms[2], arms).items()}
    assert found == {"plain_r": "all of 128", "plain_b": "all of 64"}


def test_paired_difference_of_several_seeds(tmp_path: Path) -> None:
    # The seeds' own scatter (0.5) hides the difference unless it is taken seed by seed.
    arms = arms_of(tmp_path, {"a": [2.0, 2.5, 3.0], "b": [2.1, 2.62, 3.11]})
    found = difference(arms[0], arms[1], "heldout_overall")
    assert found is not None
    assert found.mean == pytest.approx(-0.11)
    assert found.standard_error == pytest.approx(0.01 / 3**0.5)
    assert found.verdict == "lower"


def test_scatter_makes_a_difference_unmeasurable(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, {"a": [2.0, 2.1, 2.2], "b": [2.15, 2.05, 2.35]})
    found = difference(arms[0], arms[1], "heldout_overall")
    assert found is not None
    assert found.verdict == "not measurably different"


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [(2.01, "not measurably different"), (2.2, "higher (single seed)"), (1.5, "lower (single seed)")],
)
def test_single_seed(tmp_path: Path, loss: float, verdict: str) -> None:
    arms = arms_of(tmp_path, {"a": [loss], "b": [2.0]})
    found = difference(arms[0], arms[1], "heldout_overall")
    assert found is not None
    assert found.is_single
    assert found.verdict == verdict


def test_one_shared_seed_is_compared_on_that_seed(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, {"a": [2.0], "b": [1.9, 5.0]})
    found = difference(arms[0], arms[1], "heldout_overall")
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.is_single


def test_unknown_numbers_have_no_difference(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, {"a": [2.0], "b": [1.9]})
    assert difference(arms[0], arms[1], "heldout_small") is None
    assert ratio(arms[0], arms[1], "step_s") is None
