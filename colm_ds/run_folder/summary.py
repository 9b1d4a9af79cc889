"""Totals and medians over the steps of a run: what summary.json holds of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from colm_ds.run_folder.coherence import coherence_summary


def summarise(
    entries: Sequence[Mapping[str, Any]], peaks_gib: Mapping[str, float], small: Collection[str] = ()
) -> dict[str, Any]:
    """Totals and medians over the steps of a run.

    Args:
        entries: `StepStats` as dictionaries, one per step; times leave out the first, which warms up, and those whose
            allocations or variances were measured.
        peaks_gib: largest peak of each phase over steps and ranks.
        small: names of the sources that are kept whole.
    """
    timed = [
        entry for entry in entries[1:] if not entry.get("counted_gib") and not _measures_variance(entry)
    ] or entries
    totals = [entry["time_s"]["total"] for entry in timed]
    phases = sorted({name for entry in timed for name in entry["time_s"]})
    return {
        "steps": entries[-1]["step"],
        "loss": _mean_loss(entries[-10:]),
        "step_s": {
            "median": float(np.median(totals)),
            "p10": float(np.percentile(totals, 10)),
            "p90": float(np.percentile(totals, 90)),
        },
        "phase_s": {name: float(np.median([entry["time_s"].get(name, 0.0) for entry in timed])) for name in phases},
        "data_loading_share": sum(entry["time_s"].get("data", 0.0) for entry in timed) / sum(totals),
        "peak_memory_gib": dict(peaks_gib),
        "examples_trained": sum(entry["examples_trained"] for entry in entries),
        "examples_probed": sum(entry["examples_probed"] for entry in entries),
        "data_use": entries[-1].get("data_use"),
        "tokens_trained": sum(entry["tokens"] for entry in entries),
        "padding_fraction": float(np.mean([entry["padding_fraction"] for entry in entries])),
        "skipped_steps": sum(bool(entry.get("skipped")) for entry in entries),
        "nonfinite_examples": sum(entry["coreset"].get("nonfinite", 0) for entry in entries),
        "coherence": coherence_summary(entries, small),
        **_means(entries, "label_tokens"),
        **_means(entries, "gradient_variance"),
    }


def _mean_loss(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean loss of the steps that have one; None if none has."""
    losses = [entry["loss"] for entry in entries if entry["loss"] is not None]
    return float(np.mean(losses)) if losses else None


def _measures_variance(entry: Mapping[str, Any]) -> bool:
    return bool(entry["coreset"].get("gradient_variance"))


def _means(entries: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Means of some numbers of the coreset, each over the steps that have it; nothing if none has."""
    found = [entry["coreset"][key] for entry in entries if entry["coreset"].get(key)]
    names = list(dict.fromkeys(name for each in found for name in each))
    means = {name: float(np.mean([each[name] for each in found if name in each])) for name in names}
    return {key: means} if found else {}
