"""Reads metrics.jsonl while it grows: by its size alone, so that a folder mounted from elsewhere will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_REMEMBERED = 256


class MetricsTail:
    """New entries of a metrics.jsonl at every call; a last line without its end is waited for."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of a file that need not be there yet.

        Args:
            path: the file.
        """
        self._path = path
        self._offset = 0
        self._before = b""  # what the file held just before the offset

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Entries that came since the last call, and whether the file was begun anew (its entries start over then).

        A file that can not be read at the moment, as a network folder may be, has nothing new.
        """
        try:
            size = self._path.stat().st_size
            if size == self._offset:
                return [], False
            with self._path.open("rb") as file:
                anew = size < self._offset or not self._continues(file)
                if anew:
                    self._offset, self._before = 0, b""
                file.seek(self._offset)
                found = file.read()
        except OSError:
            return [], False
        whole = found[: found.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-_REMEMBERED:]
        return [entry for line in whole.splitlines() if (entry := _parse(line)) is not None], anew

    def _continues(self, file: Any) -> bool:
        """Whether the file still holds what was read last: a resumed run drops later steps and writes others."""
        file.seek(self._offset - len(self._before))
        return bool(file.read(len(self._before)) == self._before)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:  # what a killed run left
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
