"""Stop at the end of a step when asked to, and when the launcher is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

_LAUNCHER = b"deepspeed.launcher.launch"
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Request to stop: SIGTERM, SIGINT, SIGUSR1 or the end of the launcher; the ranks agree on it after every step.

    Attributes:
        reason: why this rank wants to stop; empty if it does not.
    """

    def __init__(self) -> None:
        """Start watching the launcher; until `listen`, signals end the process as usual."""
        self.reason = ""
        self._listening = False
        self._launcher = _launcher()
        self._launchers_parent = _parent(self._launcher) if self._launcher else None
        if self._launcher:
            _signal_when_parent_dies()
            threading.Thread(target=self._watch_launcher, name="colm_ds launcher watch", daemon=True).start()

    def listen(self) -> None:
        """Record signals from here on (main thread only); further ones change nothing.

        Before that there is nothing to save, and a handler in Python would not run while ranks wait for each other.
        """
        for number in _SIGNALS:
            signal.signal(number, self._note)
        self._listening = True

    def agreed(self, device: torch.device) -> bool:
        """Return whether any rank wants to stop; all ranks call it together.

        Args:
            device: where the backend's collectives expect their tensors.
        """
        wanted = torch.tensor(float(bool(self.reason)), device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return bool(wanted)

    def _watch_launcher(self) -> None:
        """Note when the launcher, or what started it, is gone; before training that ends the process."""
        assert self._launcher is not None
        while not self.reason:
            if os.getppid() != self._launcher:
                self.reason = "the launcher is gone"
            elif _parent(self._launcher) != self._launchers_parent:
                self.reason = "the launcher's parent is gone"
            else:
                time.sleep(1.0)
        if not self._listening:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"signal {signal.Signals(number).name}"


def _launcher() -> int | None:
    """Return the process id of DeepSpeed's launcher if it started this process."""
    parent = os.getppid()
    try:
        return parent if _LAUNCHER in Path(f"/proc/{parent}/cmdline").read_bytes() else None
    except OSError:
        return None


def _parent(process: int) -> int | None:
    """Return the process id of a process's parent; None if it is gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])


def _signal_when_parent_dies() -> None:
    """Ask Linux for a SIGTERM when the launcher ends, however it ends."""
    with suppress(OSError, AttributeError):  # not Linux: only the watching thread is left
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
