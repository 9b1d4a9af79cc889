"""Work for other processes that does not come to its end; imports little, as each of them imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


class WaitInWorker:
    """Leaves its process's number in a folder and waits."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, item: int) -> None:
        Path(self.folder, f"{os.getpid()}.pid").touch()
        time.sleep(600)


class KillWorker:
    """Kills its process, but for the first items."""

    def __call__(self, item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item
