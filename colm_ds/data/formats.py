"""Read rows from files, folders and the Hugging Face hub, a few at a time; errors name the row.

JSON (one array), JSON lines, Parquet, CSV, folders of `datasets.save_to_disk`, and `hub:NAME:CONFIG:SPLIT`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from colm_ds.data.jsonl import array_items, parse_line, raw_lines
from colm_ds.data.token_cache import describe_files
from colm_ds.errors import DataError

HUB = "hub:"
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".json", *LINES, ".parquet", ".csv")

CHUNK_ROWS = 512  # read at once
_CHUNK_BYTES = 1 << 19  # or fewer rows, where they are long

PathLike = str | Path
Row = dict[str, Any]
Records = Iterable[tuple[str, Row]]


class RowBatch(Protocol):
    """Some rows of a place that lie together; parsed when iterated over, which may be in another process.

    Iterating yields each row with its name for messages, or the `DataError` that stands in its place.
    """

    def __iter__(self) -> Iterator[tuple[str, Row | DataError]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class LineRows:
    """Lines of a JSON lines file.

    Attributes:
        path: the file.
        first: number of the first line, from 1.
        lines: their bytes.
    """

    path: Path
    first: int
    lines: list[bytes]

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[tuple[str, Row | DataError]]:
        for number, line in enumerate(self.lines, start=self.first):
            where = f"{self.path}:{number}"
            try:
                if not line.strip():
                    raise DataError(f"{where}: a blank line. Write one JSON object per line, or remove the line.")
                yield where, parse_line(line, where, first=number == 1)
            except DataError as error:
                yield where, error


@dataclass(frozen=True)
class TableRows:
    """Rows of an Arrow table.

    Attributes:
        place: the file, folder or hub name.
        first: number of the first row, from 1.
        table: the rows in Arrow's stream format, which holds no more than them.
        num_rows: their number.
        kind: of their names, as in `file[row 3]`.
    """

    place: str
    first: int
    table: bytes
    num_rows: int
    kind: str

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[tuple[str, Row | DataError]]:
        import pyarrow as pa

        with pa.ipc.open_stream(self.table) as reader:
            for number, row in enumerate(reader.read_all().to_pylist(), start=self.first):
                yield f"{self.place}[{self.kind} {number}]", {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Leave out keys without a value inside a column's values: tables have them where another row has one."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class ParsedRows:
    """Rows that were parsed while they were read.

    Attributes:
        rows: each with its name.
    """

    rows: list[tuple[str, Row | DataError]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, Row | DataError]]:
        return iter(self.rows)


def find_places(paths: PathLike | Sequence[PathLike]) -> list[Path | str]:
    """Resolve files, folders and hub names, one or a list of them, to files and hub names.

    Raises:
        DataError: as `find_files`.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    places: list[Path | str] = [str(path) for path in given if str(path).startswith(HUB)]
    files = [path for path in given if not str(path).startswith(HUB)]
    return [*(find_files(files) if files or not places else []), *places]


def find_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """Resolve a file, a folder or a list of these to data files.

    A folder stands for all of its files with a supported suffix, sorted by name (subfolders and hidden files are left
    out), or is one data set if `datasets.save_to_disk` wrote it; the order of a list is kept.

    Args:
        paths: a file, a folder, or a sequence of files and folders.

    Returns:
        The files and saved data sets, at least one.

    Raises:
        DataError: if a path is missing, not readable, has an unsupported suffix or is listed twice, or if a folder has
            no such file.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise DataError("no data files given. Name a file, a folder or a list of these.")
    files: list[Path] = []
    for path in map(Path, given):
        files.extend(_files_of_folder(path) if path.is_dir() and not is_saved_dataset(path) else [path])
    seen: set[Path] = set()
    for file in files:
        _check_file(file)
        if file.resolve() in seen:
            raise DataError(f"{file}: listed twice. Name every file once, or its folder alone.")
        seen.add(file.resolve())
    return files


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by `datasets.save_to_disk`, as one data set or as one with splits."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def read_rows(place: PathLike, split: str = "validation") -> Iterator[RowBatch]:
    """Read one place, a few rows at a time.

    Args:
        place: a file or a hub name from `find_places`.
        split: split of a saved data set that has several, and default split of a hub name.

    Raises:
        DataError: if it is missing, empty, damaged or cannot be loaded; problems of single rows are yielded instead.
    """
    empty = True
    for rows in _read_place(place, split):
        empty = empty and not len(rows)
        yield rows
    if empty:
        raise DataError(f"{place}: no records in the file. It must hold at least one.")


def read_records(path: PathLike, split: str = "validation") -> Iterator[tuple[str, Row]]:
    """Yield the rows of one file or hub name, each with its name for messages.

    Lines of JSON lines end at `\\n` only: other line separators, such as U+2028, are legal inside JSON strings. Blank
    lines are allowed at the end of the file.

    Args:
        path: a file, or a hub name from `find_places`.
        split: as for `read_rows`.

    Yields:
        `("file:line", row)`, lines counted from 1; for others `("file[item i]", row)` or `("file[row i]", row)`.

    Raises:
        DataError: as `read_rows`, and for the first row that cannot be read.
    """
    for rows in read_rows(path, split):
        for where, row in rows:
            if isinstance(row, DataError):
                raise row
            yield where, row


def read_place(place: PathLike, split: str = "validation") -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, of all files of a folder or of a hub name; see `read_records`."""
    for one in find_places(place):
        yield from read_records(one, split)


def describe_places(places: Sequence[Path | str], split: str = "validation") -> list[list[Any]]:
    """Describe the content of places from `find_places` for the key of a cache; a hub's rows are read for it."""
    contents: list[list[Any]] = []
    for place in places:
        if isinstance(place, Path) and place.is_dir():
            folder = place / split if (place / "dataset_dict.json").is_file() else place
            contents += [[place.name, *parts] for parts in describe_files(sorted(folder.glob("*.arrow")))]
            if (folder / "state.json").is_file():
                contents += describe_files([folder / "state.json"])
        elif isinstance(place, Path):
            contents += describe_files([place])
        else:
            digest = hashlib.sha256()
            for _, record in read_records(place, split):
                line = json.dumps(record, sort_keys=True, default=str)
                digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
            contents.append([place, digest.hexdigest()])
    return contents


def _read_place(place: PathLike, split: str) -> Iterator[RowBatch]:
    if str(place).startswith(HUB):
        return _read_hub(str(place), split)
    path = Path(place)
    _check_file(path)
    if path.is_dir():
        return _read_saved(path, split)
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith(".csv"):
        return _parsed(_csv_rows(path))
    if path.name.endswith(".json"):
        return _parsed(array_items(path))
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[RowBatch]:
    """Read JSON lines; blank lines at the end are left out."""
    first, lines, num_bytes, num_blank = 1, [], 0, 0
    for line in raw_lines(path):
        if not line.strip():
            num_blank += 1
            continue
        lines += [b""] * num_blank
        lines.append(line)
        num_blank, num_bytes = 0, num_bytes + len(line)
        if len(lines) >= CHUNK_ROWS or num_bytes >= _CHUNK_BYTES:
            yield LineRows(path, first, lines)
            first, lines, num_bytes = first + len(lines), [], 0
    if lines:
        yield LineRows(path, first, lines)


def _parsed(rows: Iterable[tuple[str, Row | DataError]]) -> Iterator[RowBatch]:
    iterator = iter(rows)
    while some := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield ParsedRows(some)


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    """Read a CSV file whose first line names the columns; all values are texts."""
    csv.field_size_limit(sys.maxsize)  # the library's default is shorter than many texts
    line_number = 0

    def lines() -> Iterator[str]:
        nonlocal line_number
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    bad = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
                    raise DataError(f"{path}:{line_number}: not UTF-8: {bad}. Save the file as UTF-8.") from error

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1 or not name.strip()})
        if repeated:
            named = ", ".join(map(repr, repeated))
            raise DataError(f"{path}:1: the header has {named} as names of columns. Give every column its own name.")
        while True:
            start = line_number + 1
            values = next(reader, None)
            if values is None:
                return
            where = f"{path}:{start}"
            if not values:
                continue  # a blank line
            if len(values) != len(header):
                yield (
                    where,
                    DataError(
                        f"{where}: {len(values)} values, but the header names {len(header)} columns. "
                        "Quote values that hold a comma, a quotation mark or a line break."
                    ),
                )
            else:
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{line_number}: not CSV: {error}. Close every quotation mark, and write one inside a value twice."
        ) from error


def _read_parquet(path: Path) -> Iterator[RowBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            batches = file.iter_batches(batch_size=CHUNK_ROWS)
            yield from _tables(str(path), (pa.Table.from_batches([batch]) for batch in batches), "row")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {_sentence(error)} Copy or write the file again.") from None


def _read_saved(path: Path, split: str) -> Iterator[RowBatch]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(
                    f"{path}: no split {split!r}. It has {', '.join(map(repr, data))}: name one, as in "
                    f"{{path: {path}, split: {next(iter(data), 'train')}}}."
                )
            data = data[split]
        yield from _tables(str(path), data.with_format("arrow").iter(batch_size=CHUNK_ROWS), "row")
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"{path}: not a whole data set: {_sentence(error)} Copy or save it again.") from None


def _read_hub(place: str, default_split: str) -> Iterator[RowBatch]:
    import datasets

    name, _, rest = place.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split or default_split)
    except Exception as error:  # the library raises whatever its loaders raise
        raise DataError(
            f"{place}: cannot be loaded: {_sentence(error)} Write hub:NAME:CONFIG:SPLIT, or give a file of your own; "
            "without a connection only what was loaded before is there."
        ) from None
    if isinstance(data, datasets.Dataset):
        yield from _tables(place, data.with_format("arrow").iter(batch_size=CHUNK_ROWS), "item")
    else:
        yield from _parsed((f"{place}[item {number}]", dict(row)) for number, row in enumerate(data, start=1))


def _tables(place: str, tables: Iterable[Any], kind: str) -> Iterator[RowBatch]:
    import pyarrow as pa

    first = 1
    for table in tables:
        try:
            _validate(table)  # pyarrow follows wrong offsets of a damaged file out of its memory
        except pa.ArrowInvalid as error:
            wrong = next((row for row in range(len(table)) if not _is_valid(table.slice(row, 1))), 0)
            raise DataError(
                f"{place}[{kind} {first + wrong}]: the file is damaged: {_sentence(error)} Write it again."
            ) from None
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        yield TableRows(place, first, sink.getvalue().to_pybytes(), len(table), kind)
        first += len(table)


def _sentence(error: BaseException) -> str:
    """Return the first line of an error's message, with a full stop."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if text[-1] in ".:?!" else f"{text}."


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
        if is_saved_dataset(path):
            return
        raise DataError(f"{path}: a folder, not a file. Name a file in it.")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unsupported kind of file. Use one ending in {', '.join(SUFFIXES)}.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: permission denied. Let this user read it (chmod), or name another file.")


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


def _is_valid(table: Any) -> bool:
    """Return whether all of an Arrow table can be read."""
    import pyarrow as pa

    try:
        _validate(table)
    except pa.ArrowInvalid:
        return False
    return True


def _validate(table: Any) -> None:
    """Raise `ArrowInvalid` if a column cannot be read; dates, which full validation wants to be whole days, can."""
    import pyarrow as pa

    names = [number for number, field in enumerate(table.schema) if not pa.types.is_date64(field.type)]
    table.select(names).validate(full=True)
