"""Tensor collectives of one step over the ranks that share a large batch; no pickled objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from colm_ds.selection import SINGLE_PROCESS, ByteCount, Exchange
from colm_ds.selection.transfer import to_device


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
        return _copy_into(tensor, self._inner.sum(to_device(tensor, self._device)))

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """See `Exchange.gather_rows`."""
        rows_there, positions_there = (to_device(tensor, self._device) for tensor in (rows, positions))
        return self._inner.gather_rows(rows_there, positions_there, num_rows).to(rows.device)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """See `Exchange.broadcast`."""
        sent = self._inner.broadcast(to_device(tensor, self._device))
        return tensor if self.is_main else _copy_into(tensor, sent)

    def counting(self, kind: str) -> AbstractContextManager[ByteCount]:
        """See `Exchange.counting`."""
        return self._inner.counting(kind)


def _copy_into(tensor: Tensor, source: Tensor) -> Tensor:
    """Return `tensor` with the values of `source`, which may be the same tensor."""
    return tensor if source is tensor else tensor.copy_(source)


def make_exchange(device: torch.device, group: dist.ProcessGroup | None = None) -> Exchange:
    """Return the exchange of this process: none if it is alone, through the device if the backend requires that."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return SINGLE_PROCESS
    exchange = ProcessGroupExchange(group)
    return exchange if device.type == "cpu" else DeviceExchange(exchange, device)
