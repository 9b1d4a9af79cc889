"""Parts of files through processes: few at a time in memory, results as they come."""

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
    """Do the same with every item; results come in any order.

    The processes end with this one, however it ends.

    Args:
        work: a module-level function, perhaps with some arguments bound.
        items: read as they are wanted: at most two for each process are held at a time.
        num_processes: how many; 1 works in this process.

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and says what happens
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
