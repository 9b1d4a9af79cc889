"""`exact`: per-example gradients of the probed matrices, held by the rank that has the example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.models.architecture import Architecture
from colm_ds.probe.factors import example_gradients, gradient_factors
from colm_ds.probe.tail import TailInput
from colm_ds.selection import DenseGradients, Exchange, Signals, finite_rows
from colm_ds.selection.transfer import to_device
from colm_ds.types import Coreset


class ExactEstimator:
    """Every rank keeps its examples' gradients `[n, d]` in the model's dtype and all ranks select together."""

    is_local = True

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        self._architecture = architecture
        self._device = device
        self._probed = torch.empty(0, dtype=torch.int64)
        self._positions: list[Tensor] = []
        self._matrix: Tensor | None = None
        self._parts: Tensor | None = None
        self._num_local = 0
        self._filled = 0

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`."""
        self._probed, self._num_local, self._parts = probed, num_local, parts
        self._positions, self._matrix, self._filled = [], None, 0

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        factors = gradient_factors(self._architecture, tail)
        if self._matrix is None:
            size, delta = (self._num_local, self._architecture.num_coordinates), factors[0][0]
            self._matrix = torch.empty(size, dtype=delta.dtype, device=delta.device)
        for row, length in enumerate(lengths):
            gradient = example_gradients(factors, row, length)
            part = 1.0 if self._parts is None else float(self._parts[positions[row]])
            self._matrix[self._filled] = gradient if part == 1.0 else gradient * part
            self._filled += 1
        self._positions.append(positions)

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`; only the finite flags are exchanged here."""
        matrix, positions = self.local_gradients()
        broken = torch.zeros(batch_size, device=self._device)
        broken[to_device(positions, self._device)] = (~finite_rows(matrix)).float()
        return Signals(positions, exchange.sum(broken) == 0, gradients=DenseGradients(matrix))

    def local_gradients(self) -> tuple[Tensor, Tensor]:
        """Return this rank's gradients `[n, d]` and their positions `[n]`, the latter on the CPU."""
        matrix = self._matrix
        if matrix is None:
            matrix = torch.zeros(0, self._architecture.num_coordinates, device=self._device)
        positions = torch.cat(self._positions) if self._positions else self._probed[:0]
        return matrix, positions

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Free the gradients' memory; there is nothing to learn."""
        self._matrix = None

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the selector keeps the history."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""
