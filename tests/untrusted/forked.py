"""Run the program, or a part of it, in a fork of this process, in which everything is imported already."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from colm_ds.process.exit_codes import ExitCode


@dataclass(frozen=True)
class Ended:
    """How it ended.

    Attributes:
        code: exit code; None: it hung.
        said: what it wrote, to stdout and stderr.
    """

    code: int | None
    said: str


def forked(work: Callable[[], int | str | None], log: Path, limit_s: float = 240.0) -> Ended:
    """Run `work`, whose value or `SystemExit` is the exit code, in a fork that writes into a file."""
    pid = os.fork()
    if pid == 0:
        code: int | str | None = ExitCode.FAILED
        try:
            atexit._clear()  # what the parent does at its end, such as removing temporary folders
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (the process ends with it)
            try:
                code = work()
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            if isinstance(code, str):
                print(code, file=sys.stderr)
            sys.stderr.flush()
        finally:
            os._exit(ExitCode.FAILED if isinstance(code, str) else code or 0)
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace"))
        if time.monotonic() - begun > limit_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Ended(None, log.read_text(encoding="utf-8", errors="replace"))
        time.sleep(0.05)
