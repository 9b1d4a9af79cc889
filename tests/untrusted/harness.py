"""Run one thing in a forked process under a watchdog, and say how it ended: it worked, said one message, or neither."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from colm_ds.errors import CoLMError

WORKED, SAID, BROKE, HUNG, TOO_MUCH = "worked", "said", "broke", "hung", "took too much memory"
MOST_GIB = 2.0


@dataclass(frozen=True)
class End:
    """How it ended.

    Attributes:
        kind: WORKED, SAID (one message), BROKE (a traceback or a crash), HUNG or TOO_MUCH.
        text: what `work` returned, the message or the traceback.
        seconds: it took.
        peak_gib: largest memory of its process.
    """

    kind: str
    text: str
    seconds: float
    peak_gib: float

    @property
    def is_good(self) -> bool:
        """Whether it worked or said one message, in which a terminal has nothing to obey."""
        printable = all(character.isprintable() or character in "\n\t" for character in self.text)
        return self.kind == WORKED or (self.kind == SAID and bool(self.text.strip()) and printable)


def tried(work: Callable[[], str], limit_s: float) -> End:
    """Run `work` in a fork of this process.

    Args:
        work: returns what there is to compare; a `CoLMError` of it is a message, any other exception is a fault.
        limit_s: seconds until it counts as hung.
    """
    read, write = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _run(work, write)
    os.close(write)
    said, hung = b"", False
    while True:
        left = started + limit_s - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            hung = True
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(read, 1 << 16)
        if not part:
            break
        said += part
    os.close(read)
    _, status, usage = os.wait4(pid, 0)
    seconds, peak = time.monotonic() - started, usage.ru_maxrss / 2**20
    if hung:
        return End(HUNG, f"more than {limit_s} s", seconds, peak)
    if status or not said:
        return End(BROKE, f"ended with wait status {status}", seconds, peak)
    kind, text = json.loads(said)
    return End(TOO_MUCH if peak > MOST_GIB else kind, text, seconds, peak)


def _run(work: Callable[[], str], write: int) -> None:
    """Run in the fork; does not return."""
    faulthandler.disable()  # pytest's would print a crash beside the test's own words
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)
        try:
            kind, text = WORKED, work()
        except CoLMError as error:
            kind, text = SAID, str(error)
        except BaseException:
            kind, text = BROKE, traceback.format_exc()
        content = memoryview(json.dumps([kind, text]).encode())
        while content:
            content = content[os.write(write, content) :]
    finally:
        os._exit(0)
