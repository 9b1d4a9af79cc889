"""Accuracy of a classification task before and after training, in reports, sweeps and model cards."""

from __future__ import annotations

import json
from pathlib import Path

from colm_ds.report import format_table, load_run
from colm_ds.report.arms import make_arms
from colm_ds.report.summary import summary
from colm_ds.sweep.table import format_markdown, table_rows
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
    arms, small = make_arms(runs[:1])
    assert "an accuracy of 74.2" in summary(arms, small)


def test_sweep_table(tmp_path: Path) -> None:
    folders = {
        (arm, 0): classified(tmp_path, name, value)
        for arm, name, value in (("plain 64", "plain-64", 0.742), ("CoLM", "colm-spsa", 0.787))
    }
    rows = table_rows(["plain 64", "CoLM"], "plain 64", folders)
    assert abs(rows[1]["accuracy, %"]["mean"] - 78.7) < 1e-9
    assert abs(rows[1]["accuracy, %"]["difference"]["mean"] - 4.5) < 1e-9
    text = format_markdown({"rows": rows}, "plain 64")
    assert "accuracy, %" in text
    assert "before, %" in text
