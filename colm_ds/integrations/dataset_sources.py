"""Give the rows of a framework's datasets their sources: a column, or the name of the dataset that they come from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from colm_ds.config.colm import CoLMSection
from colm_ds.config.section import validate_section
from colm_ds.errors import CoLMError, ConfigError, DataError, Problems
from colm_ds.integrations.arguments import Given, pop_log, read_section, with_normalization
from colm_ds.process.exit_codes import ExitCode

logger = logging.getLogger(__name__)

DEFAULT_COLUMN = "source"
"""Column that is read where a dataset has it; any other name must be a column of every dataset."""

PARTS_OF_A_NAME = ("name", "data_dir", "data_files", "split", "type")
"""Keys of a dataset that tell it from another one with the same path."""

BUILDERS = {"json", "csv", "parquet", "arrow", "text"}
"""Paths that say how files are read and not which."""

ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt"}
"""Endings of files that datasets are read from."""


PACKED = "a packed row holds documents of several sources, so it has no source of its own"
STREAM = "examples of a stream are not numbered"
OWN_LOSS = "is not called for a coreset, as CoLM weighs the losses of examples by itself. Remove it"
NO_LOSS = "has no loss per example that CoLM knows"
"""Reasons why selection does not go along with an option."""


def add_refused(values: Mapping[str, Any], refused: Mapping[str, str], problems: Problems) -> None:
    """Record the options that are set and selection does not go along with.

    Args:
        values: values of a framework's options.
        refused: the options, and why and what to do, in words without a full stop.
        problems: collects problems.
    """
    for key, why in refused.items():
        if values.get(key):
            problems.add(key, values[key], f"{why}.")


def check_block(given: Given | None, where: str, problems: Problems) -> str:
    """Check the keys of a `colm:` block before a model is loaded, and return its source column.

    Args:
        given: the block.
        where: file or key that should hold it, for the message.
        problems: collects problems.
    """
    if given is None:
        problems.messages.append(f'{where}: no colm block. Add "colm:" with large_batch_size in it.')
        return DEFAULT_COLUMN
    try:
        section = read_section(given)
        column = str(section.pop("source_column", DEFAULT_COLUMN))
        pop_log(section)
    except ConfigError as error:
        problems.messages.append(str(error))
        return DEFAULT_COLUMN
    if not section.get("large_batch_size"):
        problems.add("colm.large_batch_size", section.get("large_batch_size"), "missing", "Write r, such as twice b.")
    else:
        validate_section(CoLMSection, with_normalization(section), "colm", problems)
    return column


def dataset_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the datasets of a list: by path, and by what tells one from others with the same path.

    Of a file the name without folder and ending is enough, unless two datasets would then have the same.

    Args:
        entries: keys of every dataset, `path` among them.
    """
    parts = []
    for entry in entries:
        same = [other for other in entries if other.get("path") == entry.get("path")]
        keys = [key for key in PARTS_OF_A_NAME if any(other.get(key) != entry.get(key) for other in same)]
        apart = [str(entry[key]) for key in keys if entry.get(key) is not None]
        path = str(entry.get("path"))
        parts.append(apart if apart and path in BUILDERS else [path, *apart])
    whole = [":".join(each) for each in parts]
    short = [":".join(Path(part).stem if Path(part).suffix in ENDINGS else part for part in each) for each in parts]
    return short if len(set(short)) == len(set(whole)) else whole


def row_sources(dataset: Dataset, name: str, column: str) -> list[str]:
    """Return the source of every row `[n]`: its column, or the dataset's name if it has none.

    Raises:
        ConfigError: if a column was asked for that the dataset does not have.
        DataError: if a row has no source in the column.
    """
    if column in dataset.column_names:
        values = list(dataset[column])
        if None in values:
            raise DataError(f"dataset {name}: row {values.index(None)} has no {column}. Write a name or a number.")
        return [str(value) for value in values]
    if column != DEFAULT_COLUMN:
        raise ConfigError(
            f"colm.source_column = {column!r}: dataset {name} has no such column (it has "
            f"{', '.join(dataset.column_names)}). Add it, or remove source_column for the dataset's name instead."
        )
    return [name] * len(dataset)


def with_sources(dataset: Dataset, name: str, column: str) -> Dataset:
    """Return a dataset with a column of sources, as texts."""
    return _with_column(dataset, column, row_sources(dataset, name, column))


def process_by_source(
    dataset: Dataset, sources: Sequence[str], column: str, process: Callable[[Dataset], Dataset]
) -> Dataset:
    """Process a dataset so that every row that comes out has its source, however many rows come out.

    The rows of one source are processed together, apart from the others'. The order is kept if each part keeps its
    number of rows; otherwise one source follows another.

    Args:
        dataset: the rows, with any columns.
        sources: of every row, `[n]`.
        column: of the sources in what is returned.
        process: turns rows into others, such as tokens; it may drop the columns that there are.
    """
    rows_of: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows_of.setdefault(source, []).append(row)
    parts = []
    for source, rows in rows_of.items():
        part = process(dataset if len(rows_of) == 1 else dataset.select(rows))
        parts.append(_with_column(part, column, [source] * len(part)))
    if len(parts) == 1:
        return parts[0]
    whole = concatenate_datasets([part for part in parts if len(part)] or parts[:1])
    if [len(part) for part in parts] != [len(rows) for rows in rows_of.values()]:
        return whole
    return whole.select(np.argsort([row for rows in rows_of.values() for row in rows]))


def by_source(
    function: Callable[[dict[str, list[Any]]], Mapping[str, list[Any]]], column: str = DEFAULT_COLUMN
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """Return a function for `Dataset.map(..., batched=True)` that works on the rows of each source by themselves.

    So texts may be joined and cut into blocks, each of one source, which the column names: `by_source(group_texts)`.
    What does not fill a block of its source is dropped in every batch, so sort the dataset by the column first. A
    source whose rows of a batch make no row is warned of, once.

    Args:
        function: makes a batch of any number of rows of a batch; it does not see the column.
        column: of the sources.
    """

    warned: set[Any] = set()

    def on_each_source(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {}
        for source in dict.fromkeys(batch[column]):
            rows = [row for row, other in enumerate(batch[column]) if other == source]
            part = {key: [values[row] for row in rows] for key, values in batch.items() if key != column}
            result = dict(function(part))
            result[column] = [source] * len(next(iter(result.values())))
            if not result[column] and source not in warned:
                warned.add(source)
                logger.warning(
                    "by_source: %d rows of %r in a batch of map make no row, so they are lost. Sort the dataset by %r "
                    "before map, or raise its batch_size.",
                    len(rows),
                    source,
                    column,
                )
            for key, values in result.items():
                made.setdefault(key, []).extend(values)
        return made

    return on_each_source


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Replace names of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def exit_with_message(main: Callable[[Sequence[str]], None]) -> None:
    """Run a program on its command line; an error of ours is shown without a traceback."""
    try:
        main(sys.argv[1:])
    except CoLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)


def _with_column(dataset: Dataset, column: str, values: Sequence[str]) -> Dataset:
    if column in dataset.column_names:
        dataset = dataset.remove_columns(column)
    return dataset.add_column(column, list(values))
