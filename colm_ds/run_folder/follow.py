"""Read metrics.jsonl while it grows; only its size is polled, so that a network folder will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colm_ds.run_folder.read import parse_entry

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
                content = file.read()
        except OSError:
            return [], False
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-_REMEMBERED:]
        lines = whole.decode("utf-8", errors="replace").split("\n")
        return [entry for line in lines if (entry := parse_entry(line)) is not None], replaced

    def _continues(self, file: Any) -> bool:
        """Return whether the file still holds what was read last: a resumed run drops later steps and writes others."""
        file.seek(self._offset - len(self._before))
        return bool(file.read(len(self._before)) == self._before)
