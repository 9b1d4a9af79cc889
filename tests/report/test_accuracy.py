"""Accuracy of a classification task before and after training, in reports, sweeps and model cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colm_ds.report import format_table, load_run, result_tables
from colm_ds.report.comparison import look
from colm_ds.report.summary import three_sentences
from tests.report.run_folders import write_run


def classified(folder: Path, name: str, after: float) -> Path:
    """A run as one on a classification task leaves it."""
    path = write_run(folder / name, name)
    found = json.loads((path / "summary.json").read_text())
    found["heldout"]["accuracy"] = after
    found["heldout_before"] = {"overall": 1.1, "accuracy": 0.495}
    (path / "summary.json").write_text(json.dumps(found))
    return path


def test_report(tmp_path: Path) -> None:
    folders = [classified(tmp_path, name, value) for name, value in (("plain-64", 0.742), ("colm-spsa", 0.787))]
    runs = [load_run(folder) for folder in folders]
    text = format_table(runs)
    for part in ("accuracy", "before training", "74.2", "78.7", "49.5"):
        assert part in text
    plain = format_table([load_run(write_run(tmp_path / "other", "plain-64"))])
    assert "accuracy" not in plain
    assert "ends with an accuracy of 74.2%" in three_sentences(look(runs[:1]))


def test_sweep_table(tmp_path: Path) -> None:
    runs = {
        arm: [load_run(classified(tmp_path, name, value))]
        for arm, name, value in (("plain 64", "plain-64", 0.742), ("CoLM", "colm-spsa", 0.787))
    }
    (results, differences, _), text = result_tables(runs, ["plain 64"])
    assert results["rows"][1][results["columns"].index("accuracy")] == pytest.approx(0.787)
    (row,) = differences["rows"]
    assert row[:3] == ["CoLM", "plain 64", "better (single seed)"]
    assert row[differences["columns"].index("Δ accuracy")] == pytest.approx(0.045)
    assert "| accuracy before training |" in text


def test_averages_of_an_evaluation(tmp_path: Path) -> None:
    """As `colm-ds evaluate` writes them into a run's folder."""
    runs = []
    for name, value in (("plain-64", 0.25), ("colm-spsa", 0.5)):
        folder = write_run(tmp_path / name, name, num_steps=4)
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps({"averages": {"in domain": value}}))
        runs.append(load_run(folder))
    assert "in domain" in format_table(runs)
    (results, differences, _), _ = result_tables({run.name: [run] for run in runs}, ["plain-64"])
    assert [row[results["columns"].index("in domain")] for row in results["rows"]] == [0.25, 0.5]
    assert differences["rows"][0][differences["columns"].index("Δ in domain")] == 0.25
