"""Real process groups for tests: W gloo processes that stay alive and run one function after the other.

Imports cost several seconds, so ranks are forked from one process that has imported everything (`tests.ranks_imports`),
and a pool is started once and runs many functions:

    with Ranks(2) as ranks:
        first, second = ranks.run(function, argument)

A function is found by module and name, arguments and results travel through files.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.ports import worker_port

REPO_ROOT = Path(__file__).resolve().parent.parent

BASE_PORT = worker_port(0)
"""Pools of W ranks meet at port BASE_PORT + W where that is free: DeepSpeed names its shared-memory files by port."""

_GRACE_S = 3.0
"""After the first failure the other ranks have this long to fail as well, so that all tracebacks are shown."""

_STOP_S = 20.0
"""Time to leave after the last function; then a rank is killed."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks_imports"])


class RankError(Exception):
    """A rank failed, died or took too long; the message holds its traceback or the end of its output."""


class Ranks:
    """A pool of W processes in one gloo process group.

    After a failure or a time-out all ranks are ended; the next `run` starts new ones.

    Attributes:
        world_size: W.
    """

    def __init__(self, world_size: int, timeout_s: float = 120.0) -> None:
        """Prepare a pool; its processes start with the first `run`.

        Args:
            world_size: W.
            timeout_s: longest time of one function, start included.
        """
        self.world_size = world_size
        self._timeout_s = timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="colm_ds_ranks_"))
        self._processes: list[ForkServerProcess] = []
        self._tasks: list[Connection] = []
        self._num_tasks = 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a function on every rank.

        Args:
            function: at the top level of a module that can be imported; sees the process group.
            args: its arguments, the same on every rank.
            timeout_s: longest time, instead of the pool's.

        Returns:
            What each rank returned.

        Raises:
            RankError: if a rank raised, died or did not come to an end in time.
        """
        if not self._processes:
            self._start()
        self._num_tasks += 1
        task = self._folder / f"task_{self._num_tasks}"
        _write(task, (function.__module__, function.__qualname__, args))
        for tasks in self._tasks:
            with suppress(OSError):  # dead: noticed below
                tasks.send_bytes(str(task).encode())
        results = self._wait(task, timeout_s or self._timeout_s)
        for path in self._folder.glob(f"{task.name}*"):
            path.unlink()
        return results

    def close(self) -> None:
        """End the processes and remove their files."""
        for tasks in self._tasks:
            tasks.close()
        for process in self._processes:
            process.join(_STOP_S)
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        port = _free_port(BASE_PORT + self.world_size)
        environment = dict(
            os.environ,
            WORLD_SIZE=str(self.world_size),
            LOCAL_SIZE=str(self.world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        )
        for rank in range(self.world_size):
            theirs, ours = _CONTEXT.Pipe(duplex=False)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _CONTEXT.Process(target=_serve, args=(theirs, str(self._log(rank)), environment | own))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._tasks.append(ours)

    def _wait(self, task: Path, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        files = [task.with_name(f"{task.name}.{rank}") for rank in range(self.world_size)]
        done: dict[int, tuple[bool, Any]] = {}
        failures: dict[int, str] = {}
        while len(done) + len(failures) < self.world_size:
            for rank, file in enumerate(files):
                if rank in done or rank in failures:
                    continue
                ended = self._processes[rank].exitcode  # before looking for the file: it may write and leave
                if file.exists():
                    ok, value = pickle.loads(file.read_bytes())
                    if ok:
                        done[rank] = ok, value
                    else:
                        failures[rank] = value
                elif ended is not None:
                    failures[rank] = f"ended with exit code {ended}. Its output:\n{self._output(rank)}"
                if failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        if len(done) == self.world_size:
            return [done[rank][1] for rank in range(self.world_size)]
        self._kill()
        missing = [rank for rank in range(self.world_size) if rank not in done and rank not in failures]
        parts = [f"rank {rank} of {self.world_size}: {text}" for rank, text in sorted(failures.items())]
        if not failures:
            parts = [f"no result after {timeout_s} s. Output of rank {rank}:\n{self._output(rank)}" for rank in missing]
        raise RankError("\n".join(parts))

    def _kill(self) -> None:
        for process in self._processes:
            assert process.pid is not None
            with suppress(ProcessLookupError):  # its whole session: what it started must not outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # has no session yet
            process.join()
            process.close()
        for tasks in self._tasks:
            tasks.close()
        self._processes, self._tasks = [], []

    def _log(self, rank: int) -> Path:
        return self._folder / f"output_{rank}.txt"

    def _output(self, rank: int) -> str:
        return self._log(rank).read_text(encoding="utf-8", errors="replace")[-4000:]


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last pool may linger
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


def _write(path: Path, value: Any) -> None:
    """Write and rename, so that a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(pickle.dumps(value))
    part.rename(path)


def _serve(tasks: Connection, log: str, environment: dict[str, str]) -> None:
    """Be one rank: run what the pipe names until it is closed."""
    os.setsid()  # a Ctrl-C reaches pytest only, which ends the ranks
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPO_ROOT)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    names: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_names, args=(tasks, names), daemon=True).start()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    while (name := names.get()) is not None:
        task, args, outcome = Path(name), (), None
        try:
            module, function, args = pickle.loads(task.read_bytes())
            outcome = True, getattr(importlib.import_module(module), function)(*args)
            encoded = pickle.dumps(outcome)
        except BaseException:
            encoded = pickle.dumps((False, traceback.format_exc()))
        part = task.with_name(f"{task.name}.{rank}.part")
        part.write_bytes(encoded)
        part.rename(task.with_name(f"{task.name}.{rank}"))
        del outcome, encoded, args
        gc.collect()  # of the task alone, as what is there since the ones before is frozen
        gc.freeze()
    dist.destroy_process_group()


def _read_names(tasks: Connection, names: queue.Queue[str | None]) -> None:
    """Hand on what is written to the pipe, also while a function runs."""
    with suppress(EOFError, OSError):
        while True:
            names.put(tasks.recv_bytes().decode())
    names.put(None)
    time.sleep(_STOP_S)  # whoever started this rank is gone, and it is stuck in a collective
    os._exit(1)
