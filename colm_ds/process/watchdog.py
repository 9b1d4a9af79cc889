"""A thread that ends this rank when one phase of a step lasts too long: other ranks are gone or deadlocked."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.progress import close_bars


class Watchdog:
    """Track which phase this rank is in, and since when.

    A collective in which a rank does not take part blocks the others in C++ code, so an exception cannot reach them;
    the thread prints one message and ends the process, and the launcher then ends the other ranks.
    """

    def __init__(self, timeout_s: float, rank: int) -> None:
        """Prepare; the thread starts with the first phase.

        Args:
            timeout_s: maximum time in one phase; 0: no limit.
            rank: this rank, for the message.
        """
        self._timeout_s = timeout_s
        self._rank = rank
        self._phase: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, phase: str) -> Iterator[None]:
        """Run the block as a phase; phases may be nested, the innermost counts."""
        outer = self._phase
        self._phase = (phase, time.monotonic())
        if self._thread is None and self._timeout_s > 0:
            self._thread = threading.Thread(target=self._watch, name="colm_ds watchdog", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self._phase = None if outer is None else (outer[0], time.monotonic())

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._timeout_s / 4))
            phase = self._phase
            if phase is not None and time.monotonic() - phase[1] > self._timeout_s:
                self._end(phase[0])

    def _end(self, phase: str) -> None:
        close_bars()
        print(
            f"rank {self._rank}: {phase} has lasted more than {self._timeout_s:g} s. Another rank is gone or stuck, or "
            "this takes longer than expected: then raise colm.phase_timeout_s. Restarting resumes from the last "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitCode.PHASE_TIMEOUT)
