"""Selection statistics between two log entries of a trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from colm_ds.types import Coreset, LargeBatch


class SelectionStatistics:
    """Averages over the optimizer steps since the last log entry."""

    def __init__(self, source_names: Sequence[str]) -> None:
        self._names = [*source_names, "joint"]  # the joint pool has source id -1
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._steps: defaultdict[str, int] = defaultdict(int)

    def note(self, batch: LargeBatch, coreset: Coreset, probed: int, seconds: Mapping[str, float]) -> None:
        """Count one step.

        Args:
            batch: the large batch.
            coreset: what was chosen of it.
            probed: examples that the probe ran on.
            seconds: of each phase.
        """
        chosen = torch.bincount(batch.sources[coreset.positions], minlength=len(self._names) - 1).tolist()
        values = {
            "examples_probed": probed,
            "kept_small": coreset.num_kept,
            "dropped_small": coreset.num_dropped_small,
            "nonfinite": coreset.num_nonfinite,
            **{f"{phase}_s": seconds.get(phase, 0.0) for phase in ("probe", "exchange", "select")},
            **{f"chosen/{name}": count for name, count in zip(self._names, chosen, strict=False)},
            **{f"coherence/{self._names[source]}": value for source, value in coreset.coherence.items()},
        }
        for name, value in values.items():
            self._sums[name] += float(value)
            self._steps[name] += 1

    def take(self) -> dict[str, float]:
        """Means by name, `colm/` before each; the next ones start anew."""
        means = {f"colm/{name}": total / self._steps[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._steps.clear()
        return means
