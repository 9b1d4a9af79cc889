"""What a selection needs of the other ranks, and the exchange of a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colm_ds.types import NUM_NAMED, Coreset


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


def broadcast_coreset(coreset: Coreset | None, size: int, num_sources: int, exchange: Exchange) -> Coreset:
    """Rank 0's coreset on every rank, as one float64 tensor.

    Args:
        coreset: the choice; None on other ranks than 0.
        size: b, at least the size of the coreset.
        num_sources: c; coherence is known by source id, or -1 for the joint pool.
        exchange: the ranks.
    """
    if exchange.num_processes == 1:
        assert coreset is not None
        return coreset
    header = 4 + NUM_NAMED
    packed = torch.full((header + 2 * size + num_sources + 1,), torch.nan, dtype=torch.float64)
    if coreset is not None:
        count = coreset.size
        packed[0], packed[1] = count, coreset.num_kept
        packed[2], packed[3] = coreset.num_dropped_small, coreset.num_nonfinite
        packed[4 : 4 + len(coreset.nonfinite)] = torch.tensor(coreset.nonfinite, dtype=torch.float64)
        packed[header : header + count] = coreset.positions.double()
        packed[header + size : header + size + count] = coreset.weights.double()
        for source, value in coreset.coherence.items():
            packed[header + 2 * size + 1 + source] = value
    exchange.broadcast(packed)
    count = int(packed[0])
    coherence = packed[header + 2 * size :].tolist()
    return Coreset(
        positions=packed[header : header + count].long(),
        weights=packed[header + size : header + size + count].float(),
        num_kept=int(packed[1]),
        num_dropped_small=int(packed[2]),
        num_nonfinite=int(packed[3]),
        coherence={index - 1: value for index, value in enumerate(coherence) if value == value},
        nonfinite=tuple(int(value) for value in packed[4:header].tolist() if value == value),
    )
