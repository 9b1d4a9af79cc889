"""Average the selection's metrics between two log entries of a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colm_ds.engine.coreset_selector import Selection
from colm_ds.engine.step_stats import describe_coreset
from colm_ds.memory.meter import Meter
from colm_ds.run_folder.metrics import log_values

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
        self._last: tuple[dict[str, Any], Meter] | None = None
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def note(self, selection: Selection, meter: Meter) -> None:
        """Count one step.

        Args:
            selection: the step's.
            meter: timed its phases; read a step later or when the statistics are taken, as a GPU may still be at work.
        """
        self._fold()
        coreset = describe_coreset(selection.batch, selection.coreset, self._source_names)
        self._last = {"examples_probed": len(selection.probed), "coreset": coreset}, meter

    def take(self) -> dict[str, float]:
        """Return means by name, `colm/` before each, and start over."""
        self._fold()
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def _fold(self) -> None:
        """Add the last step to the sums."""
        if self._last is None:
            return
        (entry, meter), self._last = self._last, None
        entry["time_s"] = {phase: meter.seconds.get(phase, 0.0) for phase in _PHASES}
        for name, value in log_values(entry, brief=self._brief).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
