"""Tensor collectives of one step over the ranks that share a large batch; no pickled objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from colm_ds.selection import SINGLE_PROCESS, ByteCount, Exchange
from colm_ds.selection.transfer import to_device
from colm_ds.types import NUM_NAMED, Coreset, Example, LargeBatch


class ProcessGroupExchange:
    """`Exchange` over a process group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.num_processes = dist.get_world_size(group)
        self.is_main = dist.get_rank(group) == 0
        self._main = dist.get_global_rank(group, 0) if group is not None else 0
        self._counts: list[ByteCount] = []

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Exchange.sum`."""
        self._count(tensor)
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """See `Exchange.gather_rows`.

        A sum in which every row has one contributor: no positions travel, and x + 0 is exact.
        """
        gathered = rows.new_zeros(num_rows, *rows.shape[1:])
        gathered[positions] = rows
        return self.sum(gathered)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """See `Exchange.broadcast`."""
        self._count(tensor)
        dist.broadcast(tensor, self._main, group=self._group)
        return tensor

    @contextmanager
    def counting(self, kind: str) -> Iterator[ByteCount]:
        """See `Exchange.counting`."""
        self._counts.append(ByteCount(kind))
        try:
            yield self._counts[-1]
        finally:
            self._counts.pop()

    def _count(self, tensor: Tensor) -> None:
        if self._counts:
            self._counts[-1].num_bytes += tensor.numel() * tensor.element_size()


class DeviceExchange:
    """Carries CPU tensors over a backend that only takes the device's (NCCL); other tensors pass through.

    Copies to the device do not wait for it; a CPU tensor comes back with one wait, and of a broadcast only where it is
    received.
    """

    def __init__(self, inner: ProcessGroupExchange, device: torch.device) -> None:
        self._inner = inner
        self._device = device
        self.num_processes = inner.num_processes
        self.is_main = inner.is_main

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Exchange.sum`."""
        return _into(tensor, self._inner.sum(to_device(tensor, self._device)))

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """See `Exchange.gather_rows`."""
        rows_there, positions_there = (to_device(tensor, self._device) for tensor in (rows, positions))
        return self._inner.gather_rows(rows_there, positions_there, num_rows).to(rows.device)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """See `Exchange.broadcast`."""
        sent = self._inner.broadcast(to_device(tensor, self._device))
        return tensor if self.is_main else _into(tensor, sent)

    def counting(self, kind: str) -> AbstractContextManager[ByteCount]:
        """See `Exchange.counting`."""
        return self._inner.counting(kind)


def _into(tensor: Tensor, found: Tensor) -> Tensor:
    """Return `tensor` with the values of `found`, which may be itself."""
    return tensor if found is tensor else tensor.copy_(found)


def make_exchange(device: torch.device, group: dist.ProcessGroup | None = None) -> Exchange:
    """The exchange for this process: none where it is alone, through the device where the backend wants that."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return SINGLE_PROCESS
    exchange = ProcessGroupExchange(group)
    return exchange if device.type == "cpu" else DeviceExchange(exchange, device)


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


def move_examples(
    batch: LargeBatch, moves: Sequence[tuple[int, int, int]], rank: int, exchange: Exchange
) -> dict[int, Example]:
    """Send the tokens of examples that are trained on another rank than the one that holds them.

    Args:
        batch: the large batch as this rank sees it.
        moves: (position, from rank, to rank), the same list on every rank.
        rank: this rank.
        exchange: the ranks.

    Returns:
        The examples that came to this rank, by position.
    """
    if not moves:
        return {}
    lengths = batch.stored_lengths
    sizes = [int(lengths[position]) for position, _, _ in moves]
    tokens = torch.zeros(2, sum(sizes), dtype=torch.int32)
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for (position, source, _), start, size in zip(moves, starts, sizes, strict=False):
        if source == rank:
            example = batch.examples[position]
            tokens[0, start : start + size] = example.input_ids
            tokens[1, start : start + size] = example.labels
    exchange.sum(tokens)
    arrived = {}
    for (position, _, target), start, size in zip(moves, starts, sizes, strict=False):
        if target == rank:
            ids, labels = tokens[:, start : start + size].long()
            candidates = None if batch.candidates is None else batch.candidates.of(position)
            facts = int(batch.sources[position]), int(batch.indices[position])
            arrived[position] = Example(ids, labels, *facts, candidates)
    return arrived
