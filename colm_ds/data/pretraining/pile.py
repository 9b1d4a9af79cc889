"""The Pile's format: documents with their source, files cut into independent parts, held-out documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_ds.data.jsonl import parse_line, raw_lines
from colm_ds.errors import DataError

PART_BYTES = 8 << 20
"""Decompressed bytes of a part; a process holds a small multiple at a time."""


@dataclass(frozen=True)
class Part:
    """Consecutive lines of one file; where parts begin depends on the file alone.

    Attributes:
        file: 0-based index of the file.
        number: 0-based index of the part in the file.
        path: the file.
        first_line: 1-based number of the first line.
        lines: the lines, undecoded.
    """

    file: int
    number: int
    path: Path
    first_line: int
    lines: tuple[bytes, ...]

    @property
    def key(self) -> tuple[int, int]:
        """File and number: the order of parts."""
        return self.file, self.number

    def digest(self) -> str:
        """Return a hash of the lines."""
        digest = hashlib.blake2b(digest_size=16)
        for line in self.lines:
            digest.update(line)
            digest.update(b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        source: name of its source.
        text: its text.
        num_bytes: bytes of the text in UTF-8.
        place: 0 to below 1, from a hash of seed and text: equal texts have equal places.
    """

    source: str
    text: str
    num_bytes: int
    place: float


@dataclass(frozen=True)
class BadLine:
    """A line that holds no document.

    Attributes:
        message: file, line and what is wrong.
    """

    message: str


def read_parts(
    file: int,
    path: Path,
    part_bytes: int = PART_BYTES,
    on_read: Callable[[int], object] | None = None,
    max_lines: int = 1 << 16,
) -> Iterator[Part]:
    """Cut a file into parts of about `part_bytes`; a longer line is a separate part."""
    lines: list[bytes] = []
    size, number, first = 0, 0, 1
    for line in raw_lines(path, on_read):
        if lines and (size + len(line) > part_bytes or len(lines) == max_lines):
            yield Part(file, number, path, first, tuple(lines))
            number, first, lines, size = number + 1, first + len(lines), [], 0
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield Part(file, number, path, first, tuple(lines))


def documents(part: Part, seed: int) -> Iterator[Document | BadLine]:
    """Yield the documents of a part; blank lines are skipped.

    Args:
        part: the lines.
        seed: seed of the documents' places.
    """
    for offset, line in enumerate(part.lines):
        if not line.strip():
            continue
        number = part.first_line + offset
        where = f"{part.path}:{number}"
        try:
            source, text = source_and_text(parse_line(line, where, first=number == 1), where)
            encoded = text.encode()
        except DataError as error:
            yield BadLine(str(error))
        except UnicodeEncodeError:
            yield BadLine(f"{where}: 'text' holds half of a surrogate pair. Write whole characters.")
        else:
            yield Document(source, text, len(encoded), _place(encoded, seed))


def source_and_text(record: dict[str, Any], where: str) -> tuple[str, str]:
    """Return the source and text of a record `{"text", "meta": {"pile_set_name"}}`; `source` names the source as well.

    Raises:
        DataError: if one is missing.
    """
    source = source_of(record, where)
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no text. Write 'text': DOCUMENT.")
    return source, text


def source_of(record: Mapping[str, Any], where: str) -> str:
    """Return the source of a record: `meta.pile_set_name`, or `source`.

    Raises:
        DataError: if there is neither.
    """
    meta = record.get("meta")
    source = meta.get("pile_set_name") if isinstance(meta, Mapping) else record.get("source")
    if not isinstance(source, str) or not source:
        raise DataError(f"{where}: no source. Write 'meta': {{'pile_set_name': NAME}}, or 'source': NAME.")
    return source


def total_bytes(files: Sequence[Path]) -> int:
    """Return the bytes of files as stored on disk."""
    return sum(file.stat().st_size for file in files)


def _place(encoded: bytes, seed: int) -> float:
    digest = hashlib.blake2b(encoded, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64
