"""What a selection needs of the other ranks, and the exchange of a single process."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """Tensor collectives between the processes that share one large batch.

    Attributes:
        is_main: whether this process chooses (rank 0).
        num_processes: W, how many there are.
    """

    is_main: bool
    num_processes: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place; returns the tensor."""
        ...

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """Every process's rows `[n, w]`, placed at their `positions` `[n]` of a `[num_rows, w]` result of zeros."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The main process's value, in place; returns the tensor."""
        ...


class SingleProcess:
    """The exchange where one process holds every example of the large batch."""

    is_main = True
    num_processes = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """The rows placed at their positions; `[num_rows, w]`."""
        gathered = rows.new_zeros(num_rows, *rows.shape[1:])
        gathered[positions] = rows
        return gathered

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


SINGLE_PROCESS: Exchange = SingleProcess()
"""Shared instance: it has no state."""
