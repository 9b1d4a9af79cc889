"""One run at a time in an output folder: a lock that the kernel releases whatever ends the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from colm_ds.errors import ConfigError
from colm_ds.run_folder.contents import LOCK


class RunLock:
    """Hold an output folder until `release` or the end of the process."""

    def __init__(self, folder: str | Path, option: str = "output_dir =", what: str = "a run") -> None:
        """Take the lock, making the folder if it is missing.

        Args:
            folder: of the run or the evaluation.
            option: what names it in messages.
            what: what is written there.

        Raises:
            ConfigError: if another process holds it, or the folder cannot be written.
        """
        self._path = Path(folder) / LOCK
        self._is_new = not self._path.parent.exists()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] | None = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{option} {folder}: cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"{option} {folder}: {holder} is writing {what} there. Wait for it, or choose another "
                f"{option.removesuffix(' =')}."
            ) from None
        except OSError:  # a file system without locks: nothing can be held
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let go of the folder; one that was made for the lock and is empty otherwise goes again."""
        if self._file is None:
            return
        if self._is_new and [path.name for path in self._path.parent.iterdir()] == [LOCK]:
            with contextlib.suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()
        self._file.close()
        self._file = None
