"""Process parts of files in parallel: few at a time in memory, results in order of completion."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from colm_ds.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


def map_parts(work: Callable[[Item], Result], items: Iterable[Item], num_processes: int) -> Iterator[Result]:
    """Map a function over items in parallel; results come in any order.

    The processes end when this one does, however it ends.

    Args:
        work: a module-level function, perhaps with some arguments bound.
        items: read on demand, with at most two per process in memory.
        num_processes: number of processes; 1 works in this process.

    Raises:
        DataError: if a process was killed.
    """
    if num_processes == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_processes, context, initializer=_end_with_parent) as pool:
        pending: set[Future[Result]] = set()
        try:
            for item in items:
                if len(pending) >= 2 * num_processes:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                pending.add(pool.submit(work, item))
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise DataError(
                "a process ended abruptly, as when memory runs out. The same command resumes from the finished parts; "
                "fewer --processes take less memory."
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it and reports
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
