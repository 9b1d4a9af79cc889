"""Read metrics.jsonl while it grows; only its size is polled, so that a network folder will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colm_ds.run_folder.read import parse_entry
from colm_ds.untrusted.lines import bounded_lines

_REMEMBERED = 256


class MetricsTail:
    """Give the new entries of a metrics.jsonl at every call; a last line without its end is waited for."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of a file that need not be there yet.

        Args:
            path: the file.
        """
        self._path = path
        self._offset = 0
        self._before = b""  # what the file held just before the offset

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the entries since the last call, and whether the file was replaced (its entries start over then).

        A file that cannot be read at the moment, as in a network folder, has nothing new.
        """
        try:
            size = self._path.stat().st_size
            if size == self._offset:
                return [], False
            with self._path.open("rb") as file:
                replaced = size < self._offset or not self._continues(file)
                if replaced:
                    self._offset, self._before = 0, b""
                file.seek(self._offset)
                return self._entries(file), replaced
        except OSError:
            return [], False

    def _entries(self, file: Any) -> list[dict[str, Any]]:
        """Return the entries of the lines that are whole; a line that is too long is passed over."""
        entries = []
        for line in bounded_lines(file):
            if line is not None and not line.endswith(b"\n"):
                break
            self._offset = file.tell()
            self._before = b"" if line is None else (self._before + line)[-_REMEMBERED:]
            entry = None if line is None else parse_entry(line.decode("utf-8", errors="replace"))
            if entry is not None:
                entries.append(entry)
        return entries

    def _continues(self, file: Any) -> bool:
        """Return whether the file still holds what was read last: a resumed run drops later steps and writes others."""
        file.seek(self._offset - len(self._before))
        return bool(file.read(len(self._before)) == self._before)
