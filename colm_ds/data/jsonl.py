"""Streaming readers of `.json`, `.jsonl`, `.jsonl.gz` and `.jsonl.zst` files, whose errors name file and line."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from colm_ds.errors import DataError
from colm_ds.untrusted.json_text import MAX_DEPTH, DoubledKeyError, check_depth, doubled_key, parse_json
from colm_ds.untrusted.lines import MAX_LINE_BYTES

_CHUNK_BYTES = 1 << 20
_ZSTD_PIECE_BYTES = 1 << 7  # one piece becomes at most 4 MiB: 4 bytes may stand for 128 KiB
_ZSTD_WINDOW_BYTES = 1 << 31  # needed by files compressed with `zstd --long=31`; costs nothing for small files
_BLANK = re.compile(r"[ \t\r\n]*")


def raw_lines(path: Path, on_read: Callable[[int], object] | None = None) -> Iterator[bytes]:
    """Yield the lines of a `.jsonl` file, decompressed but not parsed; they end at `\\n` only.

    Args:
        path: the file.
        on_read: called with the bytes of the file read so far.

    Raises:
        DataError: if compressed data is broken or cut off, or a line is longer than `MAX_LINE_BYTES`.
    """
    number = 0
    try:
        for line in split_lines(_read_chunks(path, on_read)):
            yield line
            number += 1
    except _LineTooLongError:
        raise DataError(
            f"{path}:{number + 1}: a line of more than {MAX_LINE_BYTES >> 20} MiB. Write one record per line, or cut "
            "long texts into several records."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdError) as error:
        kind = "zstd" if isinstance(error, _ZstdError) else "gzip"
        raise DataError(
            f"{path}: broken {kind} data after line {number} ({error}). Copy or compress the file again."
        ) from error


def parse_line(line: bytes, where: str, first: bool = False) -> dict[str, Any]:
    """Parse the JSON object of one line.

    Args:
        line: its bytes.
        where: name of the line in messages.
        first: whether it opens the file, where a byte order mark is allowed.

    Raises:
        DataError: if it is not UTF-8 or not a JSON object.
    """
    return _parse_object(where, _decode(line, where, first=first))


def _fault(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _parse_object(where: str, text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {_fault(error)}. Write one complete JSON object per line.") from error
    except DoubledKeyError as error:
        raise DataError(f"{where}: {error}. Keep one of them.") from error
    except ValueError as error:
        raise DataError(f"{where}: JSON that cannot be read: {error}. Write flat records.") from error
    if not isinstance(value, dict):
        raise DataError(f'{where}: a JSON {_kind(value)}, not an object. Write {{"key": value, ...}}.')
    return value


def array_items(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Yield the items of a file that holds one JSON array, without holding all of them in memory.

    Yields:
        `("file[item i]", object)`, items counted from 1; a `DataError` in place of an item that is no object.

    Raises:
        DataError: if the file is not UTF-8 or not one JSON array.
    """
    try:
        for number, item in enumerate(_stream_items(path), start=1):
            where = f"{path}[item {number}]"
            if isinstance(item, DoubledKeyError):
                yield where, DataError(f"{where}: {item}. Keep one of them.")
            elif isinstance(item, dict):
                yield where, item
            else:
                yield where, DataError(f"{where}: a JSON {_kind(item)}, not an object. Write {{...}}.")
    except (ValueError, RecursionError) as error:
        _explain_array(path)
        raise DataError(f"{path}: JSON that cannot be read: {error}") from error


def _stream_items(path: Path) -> Iterator[Any]:
    """Yield the items of an array as they are read, a `DoubledKeyError` in place of one that has a key twice.

    Raises:
        ValueError: if the file is not UTF-8 or not one array.
    """
    doubled: list[str] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            doubled.append(doubled_key(pairs))
        return made

    decoder, decode = json.JSONDecoder(object_pairs_hook=object_of), codecs.getincrementaldecoder("utf-8-sig")().decode
    text, place, size = "", 0, _CHUNK_BYTES

    with path.open("rb") as raw:

        def more() -> bool:
            """Read on, twice as much each time within an item; return whether there was anything."""
            nonlocal text, place, size
            data = raw.read(size)
            size *= 2
            text, place = text[place:] + decode(data, final=not data), 0
            return bool(data)

        def next_character() -> str:
            nonlocal place
            while True:
                match = _BLANK.match(text, place)
                place = match.end() if match else place
                if place < len(text) or not more():
                    return text[place : place + 1]

        first = next_character()
        if not first:
            return
        if first != "[":
            raise ValueError("not an array")
        place += 1
        if next_character() != "]":
            while True:
                next_character()
                while True:
                    doubled.clear()
                    try:
                        item, end = decoder.raw_decode(text, place)
                    except json.JSONDecodeError:
                        if not more():
                            raise
                        continue
                    except RecursionError:
                        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
                    if end < len(text) or not more():  # a number may continue behind what was read
                        break
                if text.count("[", place, end) + text.count("{", place, end) > MAX_DEPTH:
                    check_depth(item)
                yield DoubledKeyError(doubled[0]) if doubled else item
                place, size = end, _CHUNK_BYTES
                mark = next_character()
                if mark == "]":
                    break
                if mark != ",":
                    raise ValueError("neither a comma nor the end of the array")
                place += 1
        place += 1
        if next_character():
            raise ValueError("text behind the array")


def _explain_array(path: Path) -> None:
    """Raise a DataError that says where a file is not one JSON array; it is read whole for that."""
    text = _decode(path.read_bytes(), str(path), first=True)
    try:
        items = parse_json(text)
    except json.JSONDecodeError as error:
        fix = "Close the array." if text.lstrip().startswith("[") else "Write one array [{...}, {...}]."
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            fix = "It looks like one object per line: name the file .jsonl."
        raise DataError(f"{path}:{error.lineno}: not JSON: {_fault(error)}. {fix}") from error
    except ValueError as error:
        raise DataError(f"{path}: JSON that cannot be read: {error}. Write flat records.") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: a JSON {_kind(items)}, not an array. Write [{{...}}, {{...}}], or use .jsonl.")


def _decode(data: bytes, where: str, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")  # a byte order mark may open the file
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1}. Save the file as UTF-8."
        ) from error


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream of bytes into lines at `\\n` only; the line ends are left out.

    Args:
        chunks: pieces of the stream, of any size.

    Yields:
        The lines; the last one also without a line end, unless it is empty.

    Raises:
        _LineTooLongError: for a line that grows beyond `MAX_LINE_BYTES`, as soon as it does.
    """
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        pending.append(head)
        size += len(head)
        if size > MAX_LINE_BYTES:
            raise _LineTooLongError
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
            size = len(rest[-1])
    last = b"".join(pending)
    if last:
        yield last


class _LineTooLongError(Exception):
    """A line that nobody wrote by hand: damage, or a file made to fill the memory."""


class _ZstdError(Exception):
    """Compressed data that is cut off or not zstd."""


def _read_chunks(path: Path, on_read: Callable[[int], object] | None = None) -> Iterator[bytes]:
    with path.open("rb") as raw:
        if path.name.endswith(".zst"):
            chunks = _unzstd(iter(lambda: raw.read(_ZSTD_PIECE_BYTES), b""))
        elif path.name.endswith(".gz"):
            stream = gzip.open(raw)  # noqa: SIM115 (it holds nothing but `raw`)
            chunks = iter(lambda: stream.read1(_CHUNK_BYTES), b"")
        else:
            chunks = iter(lambda: raw.read(_CHUNK_BYTES), b"")
        for chunk in chunks:
            if on_read is not None:
                on_read(raw.tell())
            yield chunk


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress frame by frame: the library's own stream reader mistakes a truncated frame for the end of the file."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError("reading .zst files needs zstandard. Run: pip install 'colm_ds[data]'") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame = None
    for chunk in chunks:
        while chunk:
            frame = frame or decompressor.decompressobj()
            try:
                data = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise _ZstdError(str(error)) from error
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            if data:
                yield data
    if frame is not None:
        raise _ZstdError("the file ends in the middle of a frame")
