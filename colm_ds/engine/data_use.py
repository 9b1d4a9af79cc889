"""Count the part of a dataset that a run has inspected and trained on so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DataUse:
    """Counts of rows inspected, rows trained on, and distinct rows trained on; the same on every rank.

    Attributes:
        seen: examples of large batches so far.
        trained: examples trained on so far.
    """

    def __init__(self, num_examples: int) -> None:
        """Start with none of a dataset's examples."""
        self.seen = 0
        self.trained = 0
        self._used = np.zeros(num_examples, dtype=bool)
        self._num_used = 0

    def note(self, num_seen: int, trained: Tensor) -> None:
        """Count a step.

        Args:
            num_seen: r.
            trained: dataset indices of the examples that changed the weights, int64 `[n]`.
        """
        self.seen += num_seen
        self.trained += len(trained)
        fresh = np.unique(trained.numpy())
        fresh = fresh[~self._used[fresh]]
        self._used[fresh] = True
        self._num_used += len(fresh)

    def as_dict(self) -> dict[str, float]:
        """Return passes over the data `seen` and `trained`, and `distinct`, the share of its rows trained on."""
        total = len(self._used)
        return {"seen": self.seen / total, "trained": self.trained / total, "distinct": self._num_used / total}

    def state_dict(self) -> dict[str, Any]:
        """Return both counts and a bit for every example."""
        return {"seen": self.seen, "trained": self.trained, "used": torch.from_numpy(np.packbits(self._used))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.seen, self.trained = state["seen"], state["trained"]
        self._used = np.unpackbits(state["used"].numpy(), count=len(self._used)).astype(bool)
        self._num_used = int(self._used.sum())
