"""The three sentences say what the numbers say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from colm_ds.report import Run, load_run
from colm_ds.report.arms import equal_budget, make_arms
from colm_ds.report.comparison import look
from colm_ds.report.facts import run_facts
from colm_ds.report.summary import caveats, three_sentences
from colm_ds.report.tables import listed
from tests.report.run_folders import ARMS, SMALL, SOURCES, write_run


def told(runs: Sequence[Run]) -> str:
    return three_sentences(look(runs))


def test_single_seeds(tmp_path: Path) -> None:
    runs = {name: load_run(write_run(tmp_path / name, name)) for name in ARMS}
    text = told(list(runs.values()))
    scope, quality, costs = text.split(". ", 1)[0], *text.split(". ", 1)[1].split(". A step ")
    assert scope == "5 arms with 1 seed each, 120 steps, 9,300 training examples from 6 sources (3 small)"
    losses = {name: run.summary["heldout"]["overall"] for name, run in runs.items()}
    assert quality.startswith(f"colm-sketch ends with a held-out loss of {losses['colm-sketch']:.4f}: ")
    for other, role in (("plain-128", "plain on r"), ("plain-64", "plain on b"), ("keep-random", "small kept")):
        gap = losses["colm-sketch"] - losses[other]
        word = "not measurably different" if abs(gap) < 0.01 * losses[other] else "better" if gap < 0 else "worse"
        sign = "−" if gap < 0 else "+"
        part = next(part for part in quality.split("; ") if f"{other} ({role}" in part)
        assert word in part
        assert f"({sign}{abs(gap):.4f})" in part
    ratio = runs["colm-sketch"].summary["step_s"]["median"] / runs["plain-128"].summary["step_s"]["median"]
    assert f"{ratio:.2f} × that of plain-128" in costs
    assert caveats(make_arms(list(runs.values())))[-1].startswith("Every arm has a single seed")


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
    assert "colm ends with a held-out loss of" in text
    assert "control (small kept, rest random)" in text
    assert "control ends" not in text


def test_several_seeds_give_errors(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{arm}{seed}", f"{arm}-{seed}", arm=arm, seed=seed))
        for arm in ("plain-128", "plain-64", "colm-spsa")
        for seed in range(3)
    ]
    text = told(runs)
    assert text.startswith("3 arms with 3 seeds each")
    assert "single seed" not in text
    assert not any("single seed" in caveat for caveat in caveats(make_arms(runs)))
    assert " ± 0.0" in text


def test_one_run(tmp_path: Path) -> None:
    text = told([load_run(write_run(tmp_path, "colm-spsa"))])
    assert text.startswith("1 arm with 1 seed, 120 steps")
    assert "colm-spsa ends with a held-out loss of" in text
    assert "there is no other arm to hold it against." in text


def test_no_plain_arm(tmp_path: Path) -> None:
    text = told([load_run(write_run(tmp_path / name, name)) for name in ("colm-spsa", "colm-sketch")])
    assert "no finished arm to hold it against" in text


def test_nothing_known(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert told([load_run(tmp_path / name) for name in ("a", "b")]) == (
        "2 arms with 1 seed each. No arm has results yet."
    )


def test_unfinished_arms_are_told_and_not_held_against(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, name, num_steps=100)) for name in ("plain-64", "colm-spsa")]
    runs.append(load_run(write_run(tmp_path / "cut", "plain-128", num_steps=50, finished=False)))
    quality = told(runs).split(". A step ")[0]
    assert "plain-64 (plain on b)" in quality
    assert "plain-128" not in quality
    found = caveats(make_arms(runs))
    assert found[0].startswith("plain-128 is not finished: it still runs or was stopped at step 50;")


def test_unequal_conditions_are_told(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / "a", "plain-64", num_steps=100)),
        load_run(write_run(tmp_path / "b", "plain-128", num_steps=60, config={"world_size": 2})),
    ]
    assert "Not the same in all arms: the number of steps and the number of ranks." in caveats(make_arms(runs))


def test_uneven_times_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a b", "plain-64", num_steps=20, config={"name": "a b"})
    found = json.loads((folder / "summary.json").read_text()) | {"step_s": {"median": 0.2, "p10": 0.1, "p90": 0.9}}
    (folder / "summary.json").write_text(json.dumps(found))
    assert caveats(make_arms([load_run(folder)]))[0].startswith("The time per step of “a b” varies more than twofold")


def test_a_last_loss_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    """An earlier one in its place would call a run better that has diverged."""
    broken = write_run(tmp_path / "broken", "colm-sketch")
    path = broken / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    last = [entry for entry in entries if "heldout" in entry][-1]
    last["heldout"] = {"overall": math.nan, "macro": math.nan, "per_source": dict.fromkeys(SOURCES, math.nan)}
    path.write_text("\n".join(map(json.dumps, entries)) + "\n")
    summary = json.loads((broken / "summary.json").read_text())
    (broken / "summary.json").write_text(json.dumps({**summary, "heldout": last["heldout"]}))
    run = load_run(broken)
    assert run.problems == [f"The held-out loss was not finite at step {last['step']}."]
    facts = run_facts(run, SMALL)
    assert not [key for key in facts.values if key.startswith("heldout.")]
    assert "better" not in told([run, load_run(write_run(tmp_path / "good", "plain-64"))]).split(" A step ")[0]


def test_a_seed_whose_loss_is_not_finite_is_left_out_and_said(tmp_path: Path) -> None:
    """And does not end the comparison at equal budgets where it was last finite."""
    runs = [
        load_run(write_run(tmp_path / f"{arm}{seed}", f"{arm}-{seed}", arm=arm, seed=seed))
        for arm in ("plain-64", "colm-spsa")
        for seed in (0, 1)
    ]
    broken = runs[-1]
    for step in [step for step in broken.heldout if step > 20]:
        broken.heldout[step] = {"overall": math.nan}
    broken.summary["heldout"] = {"overall": math.nan}
    plain, colm = make_arms(runs)
    assert colm.values["heldout.overall"].num_seeds == 1
    said = "colm-spsa: the held-out loss of 1 of 2 seeds was not finite at the end; its means are of the others."
    assert said in caveats([plain, colm])
    at_end = equal_budget(colm, plain, "steps")
    assert at_end is not None
    assert at_end.mean == pytest.approx(runs[2].heldout[120]["overall"] - runs[0].heldout[120]["overall"])


def test_listed() -> None:
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_arms_of_other_seeds_are_named(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"{arm}{seed}", f"{arm}-{seed}", arm=arm, seed=seed))
        for arm, seeds in (("plain-64", 3), ("colm-spsa", 2))
        for seed in range(seeds)
    ]
    (said,) = [caveat for caveat in caveats(make_arms(runs)) if "the same seeds" in caveat]
    assert said.startswith("Not every arm has the same seeds (colm-spsa has fewer): ")
