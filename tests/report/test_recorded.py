"""Real runs: what they log is what a recorded one has, and reports are made of both."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from colm_ds.cli import main
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.report import Comparison, compare, load_run
from colm_ds.run_folder.contents import remove_own
from colm_ds.run_folder.metrics import METRICS, Metric
from colm_ds.types import StepStats
from tests.report.run_folders import RECORDED, recorded_file, recorded_steps, write_run
from tests.report.test_comparison import check_page
from tests.training.test_bad_input import recipe_of


def keys_of(*entries: Any) -> set[str]:
    """Dotted keys of all entries, without those that name sources or pools of them."""
    found = set()
    for entry in entries:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if "/" not in key and key != "joint":
                found |= {key, *(f"{key}.{inner}" for inner in keys_of(value))}
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    runs = [load_run(RECORDED / name) for name in ("plain", "colm")]
    return compare(runs, tmp_path_factory.mktemp("recorded"))


def test_recorded_steps_have_the_fields_of_step_stats(tmp_path: Path) -> None:
    """Whoever adds a field records anew: `recorded/colm/config.json` has the recipe."""
    fields = {field.name for field in dataclasses.fields(StepStats)}
    entries = [step for name in ("colm", "plain") for step in recorded_steps(name) if step["step"] > 0]
    made = load_run(write_run(tmp_path, "colm-spsa", num_steps=3)).steps
    for entry in [*entries, *made]:
        assert set(entry) - {"heldout"} == fields


def test_nothing_of_the_machine_is_recorded() -> None:
    text = "".join(path.read_text() for path in sorted(RECORDED.rglob("*.json*")))
    assert not re.search(r'"/|/(home|root|tmp|work)/|hostname', text)
    assert len(text) < 100_000


def test_report_of_recorded_runs(recorded: Comparison) -> None:
    """Numbers of the page are those of the files."""
    check_page(recorded.files["html"].read_text(encoding="utf-8"))
    for name, arm in zip(("plain", "colm"), recorded.arms, strict=True):
        steps = [step for step in recorded_steps(name) if step["step"] > 0]
        summary = recorded_file(name, "summary.json")
        expected = {
            "heldout.overall": summary["heldout"]["overall"],
            "step_s.median": summary["step_s"]["median"],
            "examples_probed": sum(step["examples_probed"] for step in steps),
            "tokens_trained": sum(step["tokens"] for step in steps),
            "padding_fraction": np.mean([step["padding_fraction"] for step in steps]),
            "peak_memory_gib.peak": max(step["counted_gib"]["total"] for step in steps if step["counted_gib"]),
            "label_tokens.coreset": np.mean([step["coreset"]["label_tokens"]["coreset"] for step in steps]),
            "phase_s.backward": summary["phase_s"]["backward"],
        }
        found = {key: arm.mean(key) for key in expected}
        assert found == pytest.approx(expected, rel=1e-4)
        trained: dict[str, int] = {}
        for step in steps:
            for source, count in step["coreset"]["per_source"].items():
                trained[source] = trained.get(source, 0) + count
        shares = {source: share.mean for source, share in arm.group("coreset_share").items()}
        assert shares == pytest.approx({source: count / sum(trained.values()) for source, count in trained.items()})


def test_everything_measured_is_drawn(recorded: Comparison) -> None:
    keys = {picture.key for section in recorded.sections for picture in section.pictures}
    assert keys >= {
        *(f"loss-overall-{axis}" for axis in ("steps", "tokens", "seconds")),
        *("loss-small-steps", "loss-small-seconds", "train-steps", "train-seconds", "tradeoff"),
        *("phases", "memory", "memory_parts", "padding", "heldout-per-source", "exact-match-per-source"),
        *("shares", "coherence-1", "variance", "kappa", "lengths", "source-losses"),
    }


def test_a_new_metric_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever declares one changes nothing here."""
    monkeypatch.setattr(
        "colm_ds.report.setup.METRICS", [*METRICS, Metric("news.fresh", "fresh news", "kg", total="mean")]
    )
    monkeypatch.setattr(
        "colm_ds.report.facts.METRICS", [*METRICS, Metric("news.fresh", "fresh news", "kg", total="mean")]
    )
    folder = write_run(tmp_path / "run", "colm-spsa", num_steps=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["news"] = {"fresh": 2.0 + line["step"]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare([load_run(folder)], tmp_path / "report")
    (row,) = [row for row in found.tables["metrics"].rows if row[0] == "fresh news"]
    assert row[1:3] == ["kg", "mean"]
    assert row[3].mean == pytest.approx(4.5)
    assert ">fresh news<" in found.files["html"].read_text(encoding="utf-8")


def test_every_metric_of_the_steps_is_in_the_report(recorded: Comparison) -> None:
    titles = {row[0] for row in recorded.tables["metrics"].rows}
    for metric in METRICS:
        known = [metric.over(arm.runs[0].steps) for arm in recorded.arms]
        names = {name for found in known for name in found} - {"total", "save", "train"}  # of a step's phases
        assert all(metric.title + (f", {name}" if name else "") in titles for name in names), metric.name


def test_a_run_from_training_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], repo_root: Path) -> None:
    """Its files have the keys of the recorded ones, and its report the numbers of its files."""
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    recipe = recipe_of(tmp_path) | {"name": "trained now", "evaluation": {"every": 2, "exact_match": False}}
    recipe["data"] |= {"heldout": str(tmp_path / "data" / "heldout.jsonl")}
    recipe["colm"] |= {"preset": "paper", "variance_every": 2, "memory": {"count_steps": [2]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "colm_ds.cli", "train", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    now = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert keys_of(*now) == keys_of(*recorded_steps("colm"))
    summary = json.loads((run / "summary.json").read_text())
    without_answers = {key for key in keys_of(recorded_file("colm", "summary.json")) if "exact_match." not in key}
    assert keys_of(summary) == without_answers
    assert main(["report", str(run), str(RECORDED / "plain"), "--out", str(tmp_path / "report")]) == 0
    assert f"{summary['heldout']['overall']:.4f}" in capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    check_page(page)
    for number in (f"{summary['heldout']['overall']:.4f}", f"{summary['padding_fraction']:.1%}", "trained now"):
        assert f">{number}<" in page


def test_a_report_of_one_run_lies_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    runs = [str(shutil.copytree(RECORDED / name, tmp_path / name)) for name in ("plain", "colm")]
    files = {"report.html", "report.md", "report.json"}
    assert main(["report", runs[0]]) == 0
    assert f"{runs[0]}/report.html" in capsys.readouterr().out
    assert files <= {path.name for path in Path(runs[0]).iterdir()}
    assert not list(here.iterdir())
    assert main(["report", runs[1], "--out", "there"]) == 0
    assert not (Path(runs[1]) / "report.html").exists()
    assert {path.name for path in (here / "there").iterdir()} == files
    assert main(["report", *runs]) == 0
    assert files <= {path.name for path in here.iterdir()}
    remove_own(Path(runs[0]))  # a run that starts over takes the report of the old one away
    assert not list(Path(runs[0]).iterdir())
