"""Collectives that a selection needs between ranks, and the exchange of a single process."""

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
        kind: their purpose, such as "signals".
        num_bytes: bytes carried so far.
    """

    kind: str
    num_bytes: int = 0


class Exchange(Protocol):
    """Tensor collectives between the processes that share one large batch.

    Attributes:
        is_main: whether this process chooses (rank 0).
        num_processes: W.
    """

    is_main: bool
    num_processes: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place; return the tensor."""
        ...

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """Place every process's rows `[n, w]` at their `positions` `[n]` in a `[num_rows, w]` tensor of zeros."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast the main process's value, in place; return the tensor."""
        ...

    def counting(self, kind: str) -> AbstractContextManager[ByteCount]:
        """Count the bytes that the collectives of a block carry; for nested blocks the innermost counts."""
        ...


class SingleProcess:
    """Exchange of a single process that holds every example of the large batch."""

    is_main = True
    num_processes = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """Return the rows placed at their positions; `[num_rows, w]`."""
        gathered = rows.new_zeros(num_rows, *rows.shape[1:])
        gathered[positions] = rows
        return gathered

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    @contextmanager
    def counting(self, kind: str) -> Iterator[ByteCount]:
        """Count nothing: no bytes are carried."""
        yield ByteCount(kind)


SINGLE_PROCESS: Exchange = SingleProcess()
"""Shared instance: it has no state."""


def broadcast_coreset(
    coreset: Coreset | None, size: int, num_sources: int, exchange: Exchange, *, coherence: bool = True
) -> Coreset | None:
    """Broadcast rank 0's coreset to every rank, or None if it has none.

    It is sent as one int32 tensor: 8 bytes for each of its examples and for each source, and a header.

    Args:
        coreset: the choice; None on ranks other than 0, and on rank 0 if it could not choose.
        size: b, at least the size of the coreset.
        num_sources: c; carry is known by source id.
        exchange: the ranks.
        coherence: whether to send the coherence as well, 8 bytes more for each source and for the joint pool, -1.
    """
    if exchange.num_processes == 1:
        return coreset
    widths = [5 + NUM_NAMED, size, size, 2 * num_sources, 2 * (num_sources + 1) if coherence else 0]
    packed = torch.full((sum(widths),), -1, dtype=torch.int32)
    header, positions, weights, *floats = packed.split(widths)
    carried, agreeing = (torch.full((len(part) // 2,), torch.nan, dtype=torch.float64) for part in floats)
    if coreset is not None:
        numbers = [coreset.size, coreset.num_kept, coreset.num_dropped_small, coreset.num_nonfinite]
        header[:4] = torch.tensor(numbers, dtype=torch.int32)
        header[4] = int(coreset.carry is not None)
        header[5 : 5 + len(coreset.nonfinite)] = torch.tensor(coreset.nonfinite, dtype=torch.int32)
        positions[: coreset.size] = coreset.positions.int()
        weights.view(torch.float32)[: coreset.size] = coreset.weights
        for source, value in (coreset.carry or {}).items():
            carried[source] = value
        for source, value in coreset.coherence.items() if coherence else ():
            agreeing[1 + source] = value
        for part, values in zip(floats, (carried, agreeing), strict=True):
            part.copy_(values.view(torch.int32))
    exchange.broadcast(packed)
    count, num_kept, num_dropped, num_nonfinite, carries, *nonfinite = header.tolist()
    if count < 0:
        return None
    carried, agreeing = (part.clone().view(torch.float64) for part in floats)
    return Coreset(
        positions=positions[:count].long(),
        weights=weights.view(torch.float32)[:count].clone(),
        num_kept=num_kept,
        num_dropped_small=num_dropped,
        num_nonfinite=num_nonfinite,
        coherence={place - 1: value for place, value in enumerate(agreeing.tolist()) if value == value},
        nonfinite=tuple(value for value in nonfinite if value >= 0),
        carry={place: value for place, value in enumerate(carried.tolist()) if value == value} if carries else None,
    )
