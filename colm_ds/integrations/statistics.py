"""Selection statistics between two log entries of a trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from colm_ds.engine.coreset_selector import Selection
from colm_ds.memory.meter import Meter


class SelectionStatistics:
    """Averages over the optimizer steps since the last log entry."""

    def __init__(self, source_names: Sequence[str]) -> None:
        self._names = [*source_names, "joint"]  # the joint pool has source id -1
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._steps: defaultdict[str, int] = defaultdict(int)
        self._meters: list[Meter] = []

    def note(self, selection: Selection, meter: Meter) -> None:
        """Count one step.

        Args:
            selection: the step's.
            meter: timed its phases; read when the statistics are taken, as a GPU may still be at it.
        """
        self._meters.append(meter)
        coreset = selection.coreset
        sources = selection.batch.sources[coreset.positions]
        chosen = torch.bincount(sources, minlength=len(self._names) - 1).tolist()
        self._add(
            {
                "examples_probed": len(selection.probed),
                "kept_small": coreset.num_kept,
                "dropped_small": coreset.num_dropped_small,
                "nonfinite": coreset.num_nonfinite,
                **{f"chosen/{name}": count for name, count in zip(self._names, chosen, strict=False)},
                **{f"coherence/{self._names[source]}": value for source, value in coreset.coherence.items()},
            }
        )

    def _add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += float(value)
            self._steps[name] += 1

    def take(self) -> dict[str, float]:
        """Return means by name, `colm/` before each; the next ones start over."""
        for meter in self._meters:
            seconds = meter.seconds
            self._add({f"{phase}_s": seconds.get(phase, 0.0) for phase in ("probe", "exchange", "select")})
        means = {f"colm/{name}": total / self._steps[name] for name, total in self._sums.items()}
        self._meters.clear()
        self._sums.clear()
        self._steps.clear()
        return means
