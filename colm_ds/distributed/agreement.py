"""Stopping together: what fails on one rank is said once and ends all of them, before anybody waits for anybody."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from colm_ds.errors import ColmError

EXIT_CODE = 2
"""Exit code of a run that ended on bad input."""

Result = TypeVar("Result")


def together(work: Callable[[], Result], device: torch.device | None = None) -> Result:
    """Do something that may raise a `ColmError` on any rank; all ranks call it together.

    If it raises anywhere, the lowest rank that failed prints its message and every rank exits with `EXIT_CODE`.

    Args:
        work: what to do; no collectives in it.
        device: where the backend's collectives want their tensors.
    """
    result: Result | None = None
    message = None
    try:
        result = work()
    except ColmError as error:
        message = f"{type(error).__name__}: {error}"
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    failed = torch.full((), world_size if message is None else rank, device=device)
    if dist.is_initialized():
        dist.all_reduce(failed, op=dist.ReduceOp.MIN)
    if int(failed) == world_size:
        return result  # type: ignore[return-value]
    if int(failed) == rank:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()  # the message is out before the launcher sees the first exit
        dist.destroy_process_group()
    sys.exit(EXIT_CODE)


def single_process_environment() -> None:
    """Where no launcher started this process, let it be the only rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
