"""Tell how the rows of a recipe's files are read, and check them: without torch, a tokenizer or a model."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colm_ds.data.entries import DataEntry, stem
from colm_ds.data.formats import CHUNK_ROWS, HUB, ParsedRows, RowBatch, find_files, find_places, read_rows
from colm_ds.data.schemas import RowError, Sample, Schema, check_style, read_sample, recognise, text_problem
from colm_ds.errors import ConfigError, DataError, Problems

SOURCE = "source"  # key of a row's source by default, which rows need not have
ONE_SOURCE = "all"  # source of rows where no key is to name it
MAX_PROBLEMS = 20  # shown for one file
_LOOKED_AT = 100  # rows that tell the schema


@dataclass(frozen=True)
class DataFile:
    """One file or hub name, and how its rows are read.

    Attributes:
        place: from `find_places`.
        entry: number of the recipe's entry that it belongs to.
        schema: of its rows.
        style: of its prompts, from `check_style`.
        source_key: key of a row's source; None: all rows have the default.
        source: the default source.
        split: of a saved data set or hub name.
    """

    place: Path | str
    entry: int
    schema: Schema
    style: str
    source_key: str | None
    source: str
    split: str

    @property
    def may_lack_source(self) -> bool:
        """Return true where nobody named the key of the source, so that rows need none."""
        return self.source_key in (None, SOURCE)

    def source_of(self, row: Mapping[str, Any]) -> tuple[str | None, list[str]]:
        """Return a row's own source, if it has one, and the problems with it."""
        if self.source_key is None or (row.get(self.source_key) is None and self.may_lack_source):
            return None, []
        if self.source_key not in row:
            return None, [_lacks(self.source_key, row)]
        problem = text_problem(row, self.source_key)
        return (str(row[self.source_key]), []) if problem is None else (None, [problem])


@dataclass(frozen=True)
class RowProblem:
    """A problem of one row.

    Attributes:
        number: of the row among those it was read with, from 0.
        where: name of the row; empty: `what` has it.
        what: a sentence that says what is wrong and what to write instead.
    """

    number: int
    where: str
    what: str


@dataclass
class CheckedRows:
    """Some rows of a file, read by its schema.

    Attributes:
        part: number of the file.
        sources: source of each row, None where it has none of its own.
        samples: number, name and content of the rows that were asked for and have no problem.
        problems: of the rows.
        without: the same for rows that have no source, which is a problem if others of the file have one.
        more_without: how many rows more have a problem of `without`, by its sentence.
    """

    part: int
    sources: list[str | None] = field(default_factory=list)
    samples: list[tuple[int, str, Sample]] = field(default_factory=list)
    problems: list[RowProblem] = field(default_factory=list)
    without: list[RowProblem] = field(default_factory=list)
    more_without: Counter[str] = field(default_factory=Counter)


def check_rows(number: int, part: DataFile, rows: RowBatch, chosen: npt.NDArray[np.bool_] | None) -> CheckedRows:
    """Read some rows of a file and record their problems.

    Args:
        number: number of the file.
        part: the file.
        rows: some of its rows, `[n]`.
        chosen: rows to return as samples, bool `[n]`; None: all; empty: none.
    """
    checked = CheckedRows(number)
    for place, (where, row) in enumerate(rows):
        if isinstance(row, DataError):
            named, what = str(row).startswith(f"{where}: "), str(row).removeprefix(f"{where}: ")
            checked.problems.append(RowProblem(place, where if named else "", what))
            checked.sources.append(None)
            continue
        source, wrong = part.source_of(row)
        if part.source_key is not None and source is None and not wrong:
            if len(checked.without) < MAX_PROBLEMS:
                checked.without.append(RowProblem(place, where, _lacks(part.source_key, row)))
            else:
                checked.more_without[checked.without[-1].what] += 1
        checked.sources.append(source)
        try:
            sample = read_sample(row, part.schema, part.style)
        except RowError as error:
            wrong += error.problems
        else:
            if not wrong and (chosen is None or (len(chosen) and chosen[place])):
                checked.samples.append((place, where, sample))
        checked.problems += [RowProblem(place, where, problem) for problem in wrong]
    return checked


class RowCount:
    """Rows of all files so far: problems, sources and their numbers.

    Attributes:
        num_rows: rows that were looked at.
        read: of them by schema.
        names: sources in the order of their first rows.
    """

    def __init__(self, parts: Sequence[DataFile]) -> None:
        self._parts = parts
        self.num_rows = 0
        self.read: Counter[str] = Counter()
        self.names: dict[str, int] = {}
        self._part = -1
        self._before = 0  # rows of the files before this one
        self._has_source = False
        self._problems: list[RowProblem] = []
        self._without: list[RowProblem] = []
        self._more_without: Counter[str] = Counter()

    def add(self, some: CheckedRows) -> list[int]:
        """Add the next rows, and return the number of each one's source.

        Raises:
            DataError: if their file has come to its end, or to 20 problems.
        """
        if some.part != self._part:
            self.check()
            self._part, self._before, self._has_source = some.part, self.num_rows, False
        self._problems += [RowProblem(self.num_rows + one.number, one.where, one.what) for one in some.problems]
        self._without += [RowProblem(self.num_rows + one.number, one.where, one.what) for one in some.without]
        self._more_without += some.more_without
        self._has_source = self._has_source or any(source is not None for source in some.sources)
        self.num_rows += len(some.sources)
        part = self._parts[some.part]
        self.read[part.schema] += len(some.sources)
        if len(self._problems) >= MAX_PROBLEMS:
            self.check()
        return [self.names.setdefault(source or part.source, len(self.names)) for source in some.sources]

    def check(self) -> None:
        """Raise a DataError with the problems of the file, if there are any."""
        every = self._problems + (self._without if self._has_source else [])
        more = self._more_without if self._has_source else Counter()
        self._without, self._more_without = [], Counter()
        if every:
            lines = describe_problems(every, more)
            problems = Problems(str(self._parts[self._part].place), lines[:MAX_PROBLEMS])
            if len(every) >= MAX_PROBLEMS:
                left = f"; {len(lines) - MAX_PROBLEMS:,} more are left out" if len(lines) > MAX_PROBLEMS else ""
                problems.where += f" ({self.num_rows - self._before:,} rows were read{left})"
            problems.raise_if_any(DataError)


def describe_problems(problems: Sequence[RowProblem], more: Mapping[str, int]) -> list[str]:
    """Return a line for each kind of problem, by its first row; the other rows that have it are counted.

    Args:
        problems: those that were kept.
        more: rows besides, by the sentence of their problem.
    """
    alike: dict[str, list[str]] = {}
    for problem in sorted(problems, key=lambda one: one.number):
        alike.setdefault(problem.what, []).append(problem.where)
    lines = []
    for what, (first, *others) in alike.items():
        count = len(others) + more.get(what, 0)
        same = f" The same problem in {count:,} more row{'s' * (count > 1)}." if count else ""
        lines.append((f"{first}: {what}" if first else what) + same)
    return lines


def first_rows(place: Path | str, split: str) -> list[dict[str, Any]]:
    """Return the first rows of a place, which tell its schema.

    Raises:
        DataError: if it cannot be read, or none of them can.
    """
    rows: list[dict[str, Any]] = []
    problems = Problems(str(place))
    for some in read_rows(place, split):
        for _, row in some:
            if isinstance(row, DataError):
                problems.messages.append(str(row))
            else:
                rows.append(row)
            if len(rows) == _LOOKED_AT or len(problems.messages) == MAX_PROBLEMS:
                break
        break
    if not rows:
        problems.raise_if_any(DataError)
    return rows


def find_parts(entries: Sequence[DataEntry]) -> list[DataFile]:
    """Return the files and hub names of entries with schema and style; files come before hub names.

    Raises:
        DataError: if one is missing, cannot be read, or is listed twice.
        ConfigError: if its schema or the style of its prompts cannot be told.
    """
    if not entries or any(not entry.path.startswith(HUB) for entry in entries):
        find_files([entry.path for entry in entries if not entry.path.startswith(HUB)])
    parts, problems = [], Problems("the data")
    for number, entry in enumerate(entries):
        for place in find_places(entry.path):
            rows = first_rows(place, entry.split)
            try:
                schema = recognise(str(place), rows) if entry.schema == "auto" else entry.schema
            except ConfigError as error:
                problems.messages.append(str(error))
                continue
            try:
                style = check_style(schema, entry.prompt, rows)
            except ConfigError as error:
                problems.messages.append(f"{place}: {error}")
                continue
            source = entry.name or (ONE_SOURCE if entry.source_key is None else stem(place))
            parts.append(DataFile(place, number, schema, style, entry.source_key, source, entry.split))
    problems.raise_if_any()
    return sorted(parts, key=lambda part: not isinstance(part.place, Path))


def rows_of(part: DataFile) -> Iterator[RowBatch]:
    """Read a file, a few rows at a time; one that breaks off ends with its error as a row."""
    try:
        yield from read_rows(part.place, part.split)
    except DataError as error:
        yield ParsedRows([(str(part.place), error)])


def check_entries(entries: Sequence[DataEntry], most: int) -> int | None:
    """Check the first rows of all files; hub names are left for later, when they are loaded.

    Args:
        entries: where the rows are.
        most: rows to look at in all files together, about, and fewer where they are long; a file's first rows are
            looked at in any case.

    Returns:
        The number of all rows; None if there are more than were looked at.

    Raises:
        ConfigError, DataError: as reading them for training would.
    """
    here = [entry for entry in entries if not entry.path.startswith(HUB)]
    parts = find_parts(here) if here else []
    count, whole = RowCount(parts), len(here) == len(entries)
    batches = -(-most // CHUNK_ROWS)
    for number, part in enumerate(parts):
        for place, rows in enumerate(rows_of(part)):
            if place and batches <= 0:
                whole = False
                break
            count.add(check_rows(number, part, rows, np.zeros(0, dtype=bool)))
            batches -= 1
    count.check()
    return count.num_rows if whole else None


def _lacks(source_key: str, row: Mapping[str, Any]) -> str:
    keys = ", ".join(map(repr, row)) or "no keys"
    advice = "name the right key in source_key (null: none)"
    if source_key in row:
        return f"the key {source_key!r} is null. Write a source, or {advice}."
    nearest = difflib.get_close_matches(source_key, map(str, row), n=1)
    meant = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"no key {source_key!r}. {meant}Add it, or {advice}; the record has {keys}."
