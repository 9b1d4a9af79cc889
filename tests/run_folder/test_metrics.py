"""Metrics are declared once: sums against plain Python, and one that is added shows up everywhere."""

from __future__ import annotations

import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colm_ds.run_folder import metrics
from colm_ds.run_folder.metrics import METRICS, Metric, events, log_values, step_seconds, timed, with_computed
from colm_ds.run_folder.read import read_metrics
from colm_ds.run_folder.summary import summarise
from colm_ds.run_folder.write import RunFolder
from colm_ds.types import StepStats


def entry(step: int, **changes: Any) -> dict[str, Any]:
    """Return an entry of a step as training writes it."""
    values = {
        "step": step,
        "loss": 3.0 - 0.1 * step,
        "lr": 1e-3,
        "grad_norm": 1.0 + step,
        "skipped": step == 2,
        "tokens": 100 + step,
        "examples_probed": 16,
        "examples_trained": 8,
        "padding_fraction": 0.1 * step,
        "micro_batches": {"count": 2, "largest_tokens": 64 + step},
        "data_use": {"seen": 0.1 * step},
        "time_s": {"data": 0.5, "train": float(step), "total": 0.5 + step},
        "coreset": {
            "kept_small": 3,
            "nonfinite": step == 3,
            "per_source": {"a/b": 6, "c": 2},
            "coherence": {"c": 0.5, "d": float("nan")},
            "label_tokens": {"coreset": 10.0 * step},
        },
    }
    return {**values, **changes}


def test_a_runs_sums_are_those_of_plain_python() -> None:
    entries = [entry(step) for step in range(1, 15)]
    summary = summarise(entries, {"peak": 1.5})
    late = entries[-10:]
    assert summary["steps"] == 14
    assert summary["loss"] == pytest.approx(statistics.mean(each["loss"] for each in late))
    assert summary["tokens_trained"] == sum(100 + step for step in range(1, 15))
    assert summary["skipped_steps"] == 1
    assert summary["nonfinite_examples"] == 1
    assert summary["padding_fraction"] == pytest.approx(statistics.mean(0.1 * step for step in range(1, 15)))
    assert summary["data_use"] == {"seen": pytest.approx(1.4)}
    assert summary["label_tokens"] == {"coreset": pytest.approx(75.0)}
    assert summary["phase_s"]["train"] == statistics.median(range(2, 15))  # the first step warms up
    assert summary["step_s"]["p90"] == pytest.approx(np.percentile([0.5 + step for step in range(2, 15)], 90))
    assert summary["data_loading_share"] == pytest.approx(13 * 0.5 / sum(0.5 + step for step in range(2, 15)))
    assert "gradient_variance" not in summary
    json.dumps(summary)


def test_steps_that_measured_something_are_not_timed() -> None:
    entries = [entry(step) for step in range(1, 6)]
    entries[2]["counted_gib"] = {"total": 1.0}
    entries[3]["coreset"]["gradient_variance"] = {"kappa": 0.4}
    assert [each["step"] for each in timed(entries)] == [2, 5]
    assert step_seconds(entries)["median"] == 0.5 + 3.5
    assert timed(entries[:1]) == entries[:1]  # a run of one step
    assert step_seconds([{"step": 1, "loss": 2.0}]) == {}


def test_a_phase_that_a_step_did_not_have_took_no_time() -> None:
    entries = [entry(step) for step in range(1, 5)]
    entries[3]["time_s"]["save"] = 9.0
    by_name = {metric.name: metric for metric in METRICS}
    assert by_name["time_s"].over(entries)["save"] == 0.0


def test_events_have_shares_and_names_that_are_files() -> None:
    told = {name: value for name, value, samples in events(entry(4), 32) if samples == 32}
    assert told["Share/a_b"] == 0.75
    assert told["Train/skipped"] == 0.0
    assert told["Train/Samples/train_loss"] == pytest.approx(2.6)
    assert "Coherence/d" not in told  # it was not finite
    assert events({"heldout": {"overall": 1.0, "accuracy": 0.5}}, 64) == [
        ("Heldout/overall", 1.0, 64),
        ("Heldout/accuracy", 0.5, 64),
    ]


def test_a_trainers_log_is_short_unless_asked() -> None:
    step = entry(4, time_s={"probe": 0.1, "exchange": 0.2, "select": 0.3})
    brief, whole = (log_values(step, brief=brief) for brief in (True, False))
    assert len(brief) <= 8
    assert brief["colm/select_s"] == pytest.approx(0.3)
    assert whole.keys() > brief.keys()
    assert whole["colm/chosen/c"] == 2.0


def test_every_field_of_a_step_is_declared() -> None:
    declared = {metric.name.split(".")[0] for metric in METRICS} - {"heldout"}
    described = {"samples", "selected", "memory_kind", "counted_gib"}  # what the others are read by
    assert declared | described == {field.name for field in fields(StepStats)}
    assert not declared & described


def test_an_added_metric_is_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = Metric(
        "coreset.per_token",
        "loss per token of padding",
        "nats",
        total="mean",
        summary="per_token",
        tag="Mine/per_token",
        log="per_token",
        compute=lambda step: step["loss"] / step["tokens"],
    )
    monkeypatch.setattr(metrics, "METRICS", [*METRICS, added])
    monkeypatch.setattr("colm_ds.run_folder.summary.METRICS", metrics.METRICS)
    folder = RunFolder(tmp_path / "run")
    folder.log({"step": 0, "heldout": {"overall": 2.0}})
    for step in (1, 2, 3):
        folder.log(entry(step))
    folder.close()
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "coreset" not in entries[0]
    expected = [(3.0 - 0.1 * step) / (100 + step) for step in (1, 2, 3)]
    assert [each["coreset"]["per_token"] for each in entries[1:]] == pytest.approx(expected)
    assert entries[1]["coreset"]["per_source"] == {"a/b": 6, "c": 2}
    assert summarise(entries[1:], {})["per_token"] == pytest.approx(statistics.mean(expected))
    assert ("Mine/per_token", pytest.approx(expected[0]), 8) in events(entry(1), 8)
    assert log_values(entry(1), brief=False)["colm/per_token"] == pytest.approx(expected[0])


def test_what_is_computed_leaves_the_entry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", [Metric("coreset.one", "one", compute=lambda step: 1.0)])
    step = entry(1)
    assert with_computed(step)["coreset"]["one"] == 1.0
    assert step == entry(1) or "one" not in step["coreset"]
