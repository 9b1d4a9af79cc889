"""Sum up the steps of a run, as summary.json holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from colm_ds.run_folder.coherence import coherence_summary
from colm_ds.run_folder.metrics import METRICS, data_loading_share, step_seconds


def summarise(
    entries: Sequence[Mapping[str, Any]], peaks_gib: Mapping[str, float], small: Collection[str] = ()
) -> dict[str, Any]:
    """Return totals and medians over the steps of a run.

    Args:
        entries: of all steps, ascending; see `metrics.timed` for those whose time counts.
        peaks_gib: largest peak of each phase over steps and ranks.
        small: names of the sources that are kept whole.
    """
    summary: dict[str, Any] = {"steps": entries[-1]["step"], "loss": None, "step_s": step_seconds(entries)}
    for metric in METRICS:
        if metric.summary:
            values = metric.over(entries)
            if metric.by and values:
                summary[metric.summary] = values
            elif not metric.by:
                value = values.get("")
                summary[metric.summary] = int(value or 0) if metric.total == "sum" else value
    return {
        **summary,
        "data_loading_share": data_loading_share(entries),
        "peak_memory_gib": dict(peaks_gib),
        "coherence": coherence_summary(entries, small),
    }
