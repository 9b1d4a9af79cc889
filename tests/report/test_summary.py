"""The plain sentences say what the numbers say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from colm_ds.report import Run, load_run
from colm_ds.report.arms import make_arms
from colm_ds.report.summary import caveats, listed, summary
from tests.report.run_folders import ARMS, write_run


def told(runs: Sequence[Run]) -> str:
    arms, small = make_arms(runs)
    return summary(arms, small)


def test_single_seeds(tmp_path: Path) -> None:
    text = told([load_run(write_run(tmp_path / name, name)) for name in ARMS])
    assert text.startswith(
        "Five arms with one seed each, 120 steps, 9,300 training examples from 6 sources (three small)."
    )
    assert "The lowest held-out loss overall is that of plain-128" in text
    assert "The lowest mean loss on the small sources is that of colm-sketch" in text
    assert "Against plain-128 (plain training on r = 128) the loss of colm-sketch is" in text
    assert "against plain-64 (plain training on b = 64)" in text
    assert "Against keep-random, which keeps the small sources" in text
    assert "Time per step, against that of plain-128 and plain-64: colm-sketch 0.7" in text
    assert "Every arm ran with a single seed" in text


def test_a_control_with_the_lowest_loss_is_not_the_one_that_is_told_about(tmp_path: Path) -> None:
    arms = {"plain-128": "plain-128", "colm": "keep-random", "control": "colm-sketch"}  # the name's losses
    runs = []
    for name, losses in arms.items():
        selector = {"plain-128": "full", "colm": "colm", "control": "keep_random"}[name]
        folder = write_run(tmp_path / name, name, arm=losses)
        config = json.loads((folder / "config.json").read_text())
        config["colm"]["selector"] = selector
        (folder / "config.json").write_text(json.dumps(config))
        runs.append(load_run(folder))
    text = told(runs)
    assert "the loss of colm is" in text
    assert "Against control, which keeps the small sources and picks the rest at random, it is" in text
    assert "the loss of control is" not in text


def test_equal_arms_are_not_measurably_different(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name, arm="plain-64")) for name in ("first", "second")]
    text = told(runs)
    assert "first, " in text
    assert "; second is not measurably different." in text
    assert "% higher" not in text


def test_several_seeds_give_errors(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{arm}{seed}", f"{arm}-{seed}", arm=arm, seed=seed))
        for arm in ("plain-128", "plain-64", "colm-spsa")
        for seed in range(3)
    ]
    text = told(runs)
    assert text.startswith("Three arms with three seeds each")
    assert "single seed" not in text
    assert " ± 0.0" in text


def test_one_run(tmp_path: Path) -> None:
    text = told([load_run(write_run(tmp_path, "colm-spsa"))])
    assert "colm-spsa shows a held-out loss of" in text
    assert "There is no other arm to hold it against." in text
    assert "This is a single seed" in text


def test_no_plain_arm(tmp_path: Path) -> None:
    text = told([load_run(write_run(tmp_path / name, name)) for name in ("colm-spsa", "colm-sketch")])
    assert "There is no plain training on r or b among the arms" in text


def test_nothing_known(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    text = told([load_run(tmp_path / name) for name in ("a", "b")])
    assert "none is called the lowest" in text
    assert "a has no results yet." in told([load_run(tmp_path / "a")])


def test_unfinished_arms_are_told_and_not_ranked(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name, num_steps=100)) for name in ("plain-64", "keep-random")]
    runs.append(load_run(write_run(tmp_path / "cut", "plain-128", num_steps=50, finished=False)))
    arms, small = make_arms(runs)
    assert "The lowest held-out loss overall is that of keep-random" in summary(arms, small)
    found = caveats(arms)
    assert found[0].startswith("plain-128 is not finished: it still runs or was stopped at step 50;")


def test_unequal_conditions_are_told(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / "a", "plain-64", num_steps=100)),
        load_run(write_run(tmp_path / "b", "plain-128", num_steps=60, config={"world_size": 2})),
    ]
    assert caveats(make_arms(runs)[0]) == ["Not the same in all arms: the number of steps and the number of ranks."]


def test_uneven_times_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a b", "plain-64", num_steps=20, config={"name": "a b"})
    found = json.loads((folder / "summary.json").read_text()) | {"step_s": {"median": 0.2, "p10": 0.1, "p90": 0.9}}
    (folder / "summary.json").write_text(json.dumps(found))
    assert caveats(make_arms([load_run(folder)])[0])[0].startswith(
        "The time per step of “a b” varies more than twofold"
    )


def test_listed() -> None:
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
