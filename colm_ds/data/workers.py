"""Work on parts of data in other processes, in order, with few parts in memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from time import monotonic
from typing import Any, TypeVar

from colm_ds.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_HERE = 15.0
"""Time for which this process works before others are started.

A fast tokenizer's threads use every core meanwhile, and the others' imports take 6 to 20 s.
"""

MAX_PROCESSES = 16
"""More than this one process cannot feed."""

_work: Callable[[Any], Any] | None = None


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], num_processes: int, preload: Sequence[str] = ()
) -> Iterator[Result]:
    """Map a function over items in parallel; results come in the order of the items.

    The processes are started from a fresh one, as this one may have threads and devices. They are not started where all
    items are done in `SECONDS_HERE`, and end when this one does, however it ends.

    Args:
        work: function or object that can be pickled; it is sent once to each process.
        items: read on demand, with at most three per process in memory.
        num_processes: number of processes; 1 works in this process.
        preload: modules that the processes share, besides that of `work`.

    Raises:
        DataError: if a process was killed.
    """
    items = iter(items)
    begun = monotonic()
    while num_processes == 1 or monotonic() - begun < SECONDS_HERE:
        item = next(items, None)
        if item is None:
            return
        yield work(item)
    following = next(items, None)
    if following is None:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, type(work).__module__])
    with ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(work,)) as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for item in itertools.chain([following], items):
                pending.append(pool.submit(_run, item))
                if len(pending) >= 3 * num_processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenises ended abruptly, as when memory runs out. Try fewer with data.num_processes."
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it and reports
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = work


def _end_with_parent() -> None:
    """Wait for the end of the process that asked for this one, which may be killed, and end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(item: Any) -> Any:
    assert _work is not None
    return _work(item)
