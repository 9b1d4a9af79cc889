"""Fail on all ranks together: report the error once and exit everywhere instead of hanging in a collective."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from colm_ds.errors import CoLMError, ConfigError, Problems
from colm_ds.process.exit_codes import ExitCode

Result = TypeVar("Result")

RANK_WAITS = timedelta(days=2)
"""For which ranks that have met wait for one that reads data or asks longer questions."""


def together(work: Callable[[], Result], device: torch.device | None = None) -> Result:
    """Run work that may raise a `CoLMError` on any rank; all ranks call it together.

    If it raises anywhere, the lowest rank that failed prints its message and all exit with `ExitCode.BAD_INPUT`.

    Args:
        work: a function without collectives.
        device: where the backend's collectives want their tensors.
    """
    result: Result | None = None
    message = None
    try:
        result = work()
    except CoLMError as error:
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
        dist.barrier()  # print the message before the launcher sees the first exit
        dist.destroy_process_group()
    sys.exit(ExitCode.BAD_INPUT)


def broadcast_text(text: str, source: int) -> str:
    """Send one rank's text to all ranks as a tensor of bytes; all ranks call it together.

    Args:
        text: the text; ignored on ranks other than `source`.
        source: the rank whose text is sent.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    said = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor(len(said), device=device)
    dist.broadcast(length, source)
    if dist.get_rank() != source:
        said = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(said, source)
    return bytes(said.tolist()).decode()


def wait_for_ranks() -> None:
    """Let collectives wait for `RANK_WAITS` from now on; how long ranks wait for each other to come stays as it was.

    A step that hangs is the watchdog's to end.
    """
    dist.distributed_c10d._set_pg_timeout(RANK_WAITS)


def first_failure(message: str | None) -> str | None:
    """Return the message of the lowest rank that failed, None if none did; all ranks call it together."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    world_size = dist.get_world_size()
    lowest = torch.tensor(world_size if message is None else dist.get_rank(), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    if int(lowest) == world_size:
        return None
    return broadcast_text(f"rank {dist.get_rank()}: {message}", int(lowest))


_STARTED_BY = (
    {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"},
)
"""Names that mpirun and srun give to a process's rank; without MASTER_ADDR it is a single process inside a job."""


def single_process_environment() -> None:
    """Take the rank that mpirun or srun gave this process; without a launcher, make it the only rank.

    Raises:
        ConfigError: if the environment has a rank, but not all that goes with one, or numbers that are none.
    """
    problems = Problems("the environment")
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "1")
        if not _is_number(text, 1, 1 << 20) and (text or name != "OMP_NUM_THREADS"):
            problems.add(name, text, "not a number that it can be", "Write one of 1 or more, or unset it.")
    problems.raise_if_any()
    if "RANK" in os.environ:
        _check_environment()
        return
    for names in _STARTED_BY:
        if "MASTER_ADDR" in os.environ and all(name in os.environ for name in names.values()):
            os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items()})
            _check_environment()
            return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def _is_number(text: str, least: int, most: int) -> bool:
    return text.isascii() and text.isdigit() and least <= int(text[:20]) <= most


def _check_environment() -> None:
    """Raise a `ConfigError` listing what is wrong with the variables that a launcher sets."""
    problems = Problems("the environment, which has RANK, as a launcher sets it")
    advice = "Start with deepspeed, torchrun, mpirun or srun, or unset RANK for a single process."
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])  # on one machine they are the same
    for name, most in (("RANK", 1 << 20), ("WORLD_SIZE", 1 << 20), ("LOCAL_RANK", 1 << 20), ("MASTER_PORT", 65535)):
        text = os.environ.get(name)
        if text is None:
            problems.add(name, None, "missing", advice)
        elif not _is_number(text, int(name == "WORLD_SIZE"), most):
            problems.add(name, text, "not a number that it can be", advice)
    if "MASTER_ADDR" not in os.environ:
        problems.add("MASTER_ADDR", None, "missing", advice)
    problems.raise_if_any()
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        size = os.environ["WORLD_SIZE"]
        problems.add("RANK", os.environ["RANK"], f"not less than WORLD_SIZE = {size}", advice)
    problems.raise_if_any()


def meet(join: Callable[[], object]) -> None:
    """Join the other ranks.

    Args:
        join: makes the process group.

    Raises:
        ConfigError: if they cannot be met where the environment says: the port is taken, the address unknown, or they
            do not come.
    """
    try:
        join()
    except (RuntimeError, ValueError, OSError) as error:
        where = f"MASTER_ADDR = {os.environ.get('MASTER_ADDR')}, MASTER_PORT = {os.environ.get('MASTER_PORT')}"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error)
        reason = "another process has that port" if taken else lines[0][:300] if lines else type(error).__name__
        advice = "Choose another port (deepspeed --master_port, torchrun --master-port)" if taken else "Check both"
        raise ConfigError(f"{where}: the ranks cannot meet there: {reason}. {advice}.") from None
