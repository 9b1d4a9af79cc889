"""Perplexity in reports of pretraining: by source, against steps, tokens and seconds; absent elsewhere."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from colm_ds.report import Comparison, Run, compare, format_table, load_run
from tests.report.run_folders import SOURCES, write_run
from tests.report.test_comparison import check_page


def pretrained(folder: Path, name: str, seed: int = 0) -> Run:
    """A run whose held-out losses have perplexities beside them."""
    path = write_run(folder / f"{name} {seed}", name, seed=seed, num_steps=60)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "heldout" in line:
            add_perplexity(line["heldout"])
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((path / "summary.json").read_text())
    add_perplexity(summary["heldout"])
    (path / "summary.json").write_text(json.dumps(summary))
    return load_run(path)


def add_perplexity(heldout: dict) -> None:
    per_source = {source: math.exp(loss) for source, loss in heldout["per_source"].items()}
    heldout["perplexity"] = {"overall": math.exp(heldout["overall"]), "per_source": per_source}


def pictures(found: Comparison) -> list[str]:
    """Keys of the pictures of perplexity."""
    return [p.key for each in found.sections for p in each.pictures if p.key.startswith(("perplexity", "along-"))]


def test_one_run(tmp_path: Path) -> None:
    run = pretrained(tmp_path, "colm-spsa")
    found = compare([run], tmp_path / "report")
    assert pictures(found)[:3] == [f"perplexity-overall-{axis}" for axis in ("steps", "tokens", "seconds")]
    assert pictures(found)[3:] == ["perplexity", *(f"along-{place}-steps" for place in range(len(SOURCES)))]
    page = found.files["html"].read_text()
    check_page(page)
    last = run.summary["heldout"]["perplexity"]
    first, *others = found.tables["perplexity"].rows
    assert (first[0], first[2].mean) == ("overall", last["overall"])
    assert {row[0].removesuffix(" (small)"): row[2].mean for row in others} == last["per_source"]
    for value in (last["overall"], *last["per_source"].values()):
        assert f"{value:.2f}" in page
    along = found.tables["along"]
    assert [row[1] for row in along.rows] == [0, 20, 40, 60]
    tokens = [row["tokens"] for row in run.steps]
    assert [row[2] for row in along.rows] == [sum(tokens[:step]) for step in (0, 20, 40, 60)]
    trained = [row["time_s"]["total"] for row in run.steps if not row["coreset"].get("gradient_variance")]
    assert 0 < len(trained) < len(run.steps)  # those that also measure something count as the median one
    seconds = sum(trained) + statistics.median(trained) * (len(run.steps) - len(trained))
    assert along.rows[-1][3] == pytest.approx(seconds)
    assert f"ends with a perplexity of {last['overall']:.2f}" in found.summary
    assert f"{last['overall']:.2f}" in format_table([run])


def test_several_arms_and_seeds(tmp_path: Path) -> None:
    runs = [pretrained(tmp_path, name, seed) for name in ("plain-64", "colm-spsa") for seed in (0, 1)]
    found = compare(runs, tmp_path / "report")
    check_page(found.files["html"].read_text())
    values = [run.summary["heldout"]["perplexity"]["overall"] for run in runs[:2]]
    cell = found.tables["perplexity"].rows[0][2]
    assert cell.mean == pytest.approx(statistics.mean(values))
    assert cell.standard_error == pytest.approx(statistics.stdev(values) / 2**0.5)
    assert [row[0] for row in found.tables["along"].rows] == ["plain-64"] * 4 + ["colm-spsa"] * 4
    numbers = json.loads(found.files["json"].read_text())
    assert numbers["arms"][0]["numbers"]["heldout.perplexity.overall"]["mean"] == pytest.approx(
        statistics.mean(values), rel=1e-5
    )
    assert numbers["arms"][1]["curves"]["perplexity.overall"]["steps"] == [0, 20, 40, 60]


def test_a_run_without_tokens_or_perplexity(tmp_path: Path) -> None:
    path = pretrained(tmp_path, "plain-64").folder
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens", None)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare([load_run(path)], tmp_path / "report")
    assert pictures(found)[:2] == ["perplexity-overall-steps", "perplexity-overall-seconds"]
    assert {row[2] for row in found.tables["along"].rows} == {None}
    other = load_run(write_run(tmp_path / "other", "plain-64"))
    found = compare([other], tmp_path / "report")
    assert "perplexity" not in found.tables
    assert "perplexity" not in found.files["html"].read_text()
    assert "perplexity" not in format_table([other])
