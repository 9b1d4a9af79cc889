"""Interface of the estimators: observe a step's micro-batches, return signals, learn from the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from colm_ds.probe.tail import TailInput
from colm_ds.selection import Exchange, Signals
from colm_ds.selection.transfer import to_device
from colm_ds.types import Coreset


class Observer(Protocol):
    """Observer of the micro-batches of a probe."""

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        ...


class Estimator(Observer, Protocol):
    """Estimator of per-example gradients of the probed matrices.

    Attributes:
        is_local: whether signals stay on their rank, so that all ranks select together.
    """

    is_local: bool

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """Prepare for a step.

        Args:
            step: 1-based optimizer step.
            probed: positions that any rank probes, ascending, int64 `[n]` on the CPU.
            num_local: number of them that this rank probes.
            parts: factor from the gradient of every example's mean loss to its term in the step's sum: its labelled
                tokens if the step is a mean over tokens, float32 `[r]` on the CPU; None: 1.
        """
        ...

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """Probe one micro-batch, under no_grad.

        Args:
            tail: input of the last layer.
            positions: position in the large batch of every row, int64 `[batch]` on the CPU; rows beyond them are
                ignored (the placeholder of a rank that has nothing left to probe while others do).
            lengths: tokens of every row.
        """
        ...

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """Return the step's signals, exchanged as far as the estimator needs; all ranks call it together."""
        ...

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Learn from the selected examples of this step, if the estimator does; all ranks call it together."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later steps depend on, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        ...


def multiply_by_parts(rows: Tensor, parts: Tensor | None, positions: Tensor, power: int = 1) -> Tensor:
    """Multiply rows by the parts of their examples.

    Args:
        rows: `[n, w]`.
        parts: see `Estimator.begin`, `[r]` on the CPU; None: 1.
        positions: positions of the rows, int64 `[n]` on the CPU.
        power: exponent of the parts.
    """
    if parts is None:
        return rows
    return rows * to_device(parts[positions], rows.device).pow(power)[:, None]


class VectorRows:
    """Short signals of the probed examples, collected on every rank and gathered on all."""

    def __init__(self) -> None:
        self._probed = torch.empty(0, dtype=torch.int64)
        self._rows: list[Tensor] = []
        self._positions: list[Tensor] = []

    def begin(self, probed: Tensor) -> None:
        """Discard the last step."""
        self._probed, self._rows, self._positions = probed, [], []

    def add(self, positions: Tensor, vectors: Tensor) -> None:
        """Add one micro-batch's vectors, float32 `[batch, K]`."""
        self._positions.append(positions)
        self._rows.append(vectors)

    def gather(self, batch_size: int, width: int, device: torch.device, exchange: Exchange) -> Signals:
        """Gather the signals of every probed example on all ranks."""
        local = torch.cat(self._rows) if self._rows else torch.zeros(0, width, device=device)
        positions = torch.cat(self._positions) if self._positions else self._probed[:0]
        vectors = exchange.gather_rows(local, to_device(positions, device), batch_size)
        probed = to_device(self._probed, device)
        return Signals(self._probed, torch.isfinite(vectors).all(dim=1), vectors=vectors[probed])
