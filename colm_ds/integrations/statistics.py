"""Average the selection's metrics between two log entries of a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colm_ds.engine.coreset_selector import Selection
from colm_ds.engine.step_stats import describe_coreset
from colm_ds.memory.meter import Meter
from colm_ds.run_folder.metrics import log_means

_PHASES = ("probe", "exchange", "select")


class SelectionStatistics:
    """Averages over the optimizer steps since the last log entry."""

    def __init__(self, source_names: Sequence[str], *, brief: bool) -> None:
        """Start without a step.

        Args:
            source_names: by source id.
            brief: only the few metrics that `run_folder.metrics` declares to be brief.
        """
        self._source_names = list(source_names)
        self._brief = brief
        self._entries: list[dict[str, Any]] = []
        self._meters: list[Meter] = []

    def note(self, selection: Selection, meter: Meter) -> None:
        """Count one step.

        Args:
            selection: the step's.
            meter: timed its phases; read when the statistics are taken, as a GPU may still be at work.
        """
        self._meters.append(meter)
        coreset = describe_coreset(selection.batch, selection.coreset, self._source_names)
        self._entries.append({"examples_probed": len(selection.probed), "coreset": coreset})

    def take(self) -> dict[str, float]:
        """Return means by name, `colm/` before each, and start over."""
        for entry, meter in zip(self._entries, self._meters, strict=True):
            seconds = meter.seconds
            entry["time_s"] = {phase: seconds.get(phase, 0.0) for phase in _PHASES}
        means = log_means(self._entries, brief=self._brief)
        self._entries.clear()
        self._meters.clear()
        return means
