"""Streaming readers of `.json`, `.jsonl`, `.jsonl.gz` and `.jsonl.zst` files, whose errors name file and line."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from colm_ds.errors import DataError
from colm_ds.untrusted.json_text import parse_json
from colm_ds.untrusted.lines import MAX_LINE_BYTES

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK_BYTES = 1 << 20
_ZSTD_PIECE_BYTES = 1 << 7  # one piece becomes at most 4 MiB: 4 bytes may stand for 128 KiB
_ZSTD_WINDOW_BYTES = 1 << 31  # needed by files compressed with `zstd --long=31`; costs nothing for small files

PathLike = str | Path


def find_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """Resolve a file, a folder or a list of these to data files.

    A folder stands for all of its files with a supported suffix, sorted by name (subfolders and hidden files are left
    out); the order of a list is kept.

    Args:
        paths: a file, a folder, or a sequence of files and folders.

    Returns:
        The files, at least one.

    Raises:
        DataError: if a path is missing, has an unsupported suffix or is listed twice, or if a folder has no such file.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise DataError("no data files given. Name a file, a folder or a list of these.")
    files: list[Path] = []
    for path in map(Path, given):
        files.extend(_files_of_folder(path) if path.is_dir() else [path])
    seen: set[Path] = set()
    for file in files:
        _check_file(file)
        if file.resolve() in seen:
            raise DataError(f"{file}: listed twice. Name every file once, or its folder alone.")
        seen.add(file.resolve())
    return files


def read_records(path: PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the JSON objects of one file, one line at a time.

    Lines end at `\\n` only: other line separators, such as U+2028, are legal inside JSON strings. Blank lines are
    allowed at the end of the file. A `.json` file is one array of objects and is read whole.

    Args:
        path: file ending in `.json`, `.jsonl`, `.jsonl.gz` or `.jsonl.zst`.

    Yields:
        `("file:line", object)`, lines counted from 1; for `.json` `("file[item i]", object)`, items counted from 1.

    Raises:
        DataError: if the file is missing, empty, cut off or not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    _check_file(path)
    records = _read_array(path) if path.name.endswith(".json") else _read_lines(path)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: no records in the file. It must hold at least one JSON object.")


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and file.name.endswith(SUFFIXES) and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"{folder}: no data files in the folder. It must hold files ending in {', '.join(SUFFIXES)}.")
    return files


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file. {_similar_names(path)}")
    if path.is_dir():
        raise DataError(f"{path}: a folder, not a file. Name a file in it.")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unsupported kind of file. Use one ending in {', '.join(SUFFIXES)}.")


def _similar_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either."
    names = sorted(file.name for file in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    if not names:
        return f"The folder {path.parent} is empty."
    return f"The folder holds {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}."


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    blank = 0
    for number, line in enumerate(raw_lines(path), start=1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise DataError(f"{path}:{blank}: a blank line. Write one JSON object per line, or remove the line.")
        where = f"{path}:{number}"
        yield where, parse_line(line, where, first=number == 1)


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


def _parse_object(where: str, text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno}. Write one complete JSON object per line."
        ) from error
    except ValueError as error:
        raise DataError(f"{where}: JSON that cannot be read: {error}. Write flat records.") from error
    if not isinstance(value, dict):
        raise DataError(f'{where}: a JSON {_kind(value)}, not an object. Write {{"key": value, ...}}.')
    return value


def _read_array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _decode(path.read_bytes(), str(path), first=True)
    if not text.strip():
        return
    try:
        items = parse_json(text)
    except json.JSONDecodeError as error:
        fix = "Close the array." if text.lstrip().startswith("[") else "Write one array [{...}, {...}]."
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            fix = "It looks like one object per line: name the file .jsonl."
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}. {fix}") from error
    except ValueError as error:
        raise DataError(f"{path}: JSON that cannot be read: {error}. Write flat records.") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: a JSON {_kind(items)}, not an array. Write [{{...}}, {{...}}], or use .jsonl.")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise DataError(f"{path}[item {number}]: a JSON {_kind(item)}, not an object. Write {{...}}.")
        yield f"{path}[item {number}]", item


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
