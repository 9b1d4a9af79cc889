"""What a selection needs of the other ranks, and the exchange of a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class ByteCount:
    """Payload of the collectives of one block.

    Attributes:
        kind: what they were for, such as "signals".
        num_bytes: carried so far.
    """

    kind: str
    num_bytes: int = 0


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

    def counting(self, kind: str) -> AbstractContextManager[ByteCount]:
        """Count the bytes that the collectives of a block carry; of blocks within each other the innermost counts."""
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

    @contextmanager
    def counting(self, kind: str) -> Iterator[ByteCount]:
        """Nothing is carried."""
        yield ByteCount(kind)


SINGLE_PROCESS: Exchange = SingleProcess()
"""Shared instance: it has no state."""
