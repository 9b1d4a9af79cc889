"""Read lines of bounded length from a file that others wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

MAX_LINE_BYTES = 1 << 26
"""Of one record; a longer line is taken for damage or for an attack, and never held as a whole."""


def bounded_lines(file: IO[bytes], most: int = MAX_LINE_BYTES) -> Iterator[bytes | None]:
    """Yield the lines of an open file with their ends; None in the place of one that is longer than `most` bytes."""
    while line := file.readline(most + 1):
        if len(line) <= most or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(most)) and not rest.endswith(b"\n"):
            pass
        yield None
