"""Find what can be known of a dataset's rows before training: lengths, labels, extreme ids; Arrow columns whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.errors import DataError
from colm_ds.types import SourcedDataset

LOOKED_AT = 10_000
"""Rows that are read before training where a dataset has no columns; the others are checked when they are read."""

_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 1 << 13, 1 << 20

Spot = tuple[int, int]
"""A row, and what was found in it."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowFacts:
    """Facts of a dataset's rows.

    Attributes:
        num_rows: rows of the dataset; the first `len(lengths)` of them were read.
        lengths: tokens of each row that was read, int32 `[num_read]`.
        num_label_tokens: labelled tokens of each after its first, int32 `[num_read]`.
        largest_id: the row with the largest token id, and that id; None without tokens.
        smallest_id: the same for the smallest.
        largest_label: the same for labels after a row's first that are not -100; None without any.
        smallest_label: the same for the smallest.
    """

    num_rows: int
    lengths: npt.NDArray[np.int32]
    num_label_tokens: npt.NDArray[np.int32]
    largest_id: Spot | None = None
    smallest_id: Spot | None = None
    largest_label: Spot | None = None
    smallest_label: Spot | None = None

    @property
    def num_read(self) -> int:
        """Rows that were read."""
        return len(self.lengths)

    @property
    def longest(self) -> Spot | None:
        """The first of the longest rows, and its tokens."""
        return (row := int(self.lengths.argmax()), int(self.lengths[row])) if self.num_read else None

    @property
    def without_label(self) -> Ints:
        """Rows among those read that have no label to train on, ascending."""
        return np.flatnonzero(self.num_label_tokens == 0)


@dataclass(frozen=True)
class Labels:
    """Place of the labels of an Arrow dataset's rows.

    Attributes:
        column: its column; None: the token ids are labels.
        ignored: a token id that is none, or None.
    """

    column: str | None = "labels"
    ignored: int | None = None


@dataclass
class _Extremes:
    largest: Spot | None = None
    smallest: Spot | None = None

    def note(self, values: Ints, row_of: Callable[[int], int]) -> None:
        """Take values in, each of the row that `row_of` its place is."""
        if not len(values):
            return
        high, low = int(values.argmax()), int(values.argmin())
        if self.largest is None or int(values[high]) > self.largest[1]:
            self.largest = row_of(high), int(values[high])
        if self.smallest is None or int(values[low]) < self.smallest[1]:
            self.smallest = row_of(low), int(values[low])


class _Reading:
    """Facts under way."""

    def __init__(self, num_rows: int, num_read: int) -> None:
        self._num_rows = num_rows
        self._ids, self._labels = _Extremes(), _Extremes()
        self._lengths, self._counts = np.zeros(num_read, dtype=np.int32), np.zeros(num_read, dtype=np.int32)

    def note(self, rows: Ints, sizes: Ints, ids: Ints, labels: Ints) -> None:
        """Take rows in: their numbers and lengths, and their tokens and labels one after another."""
        ends = np.cumsum(sizes)
        self._ids.note(ids, lambda place: int(rows[np.searchsorted(ends, place, side="right")]))
        is_label = labels != IGNORE_INDEX
        is_label[(ends - sizes)[sizes > 0]] = False
        places = np.flatnonzero(is_label)
        self._labels.note(labels[places], lambda place: int(rows[np.searchsorted(ends, places[place], side="right")]))
        before = np.concatenate([[0], np.cumsum(is_label)])
        self._lengths[rows] = sizes
        self._counts[rows] = before[ends] - before[ends - sizes]

    def facts(self) -> RowFacts:
        """Return what is known now."""
        ids, labels = self._ids, self._labels
        return RowFacts(
            *(self._num_rows, self._lengths, self._counts),
            *(ids.largest, ids.smallest, labels.largest, labels.smallest),
        )


def facts_of_rows(read: Callable[[int], tuple[Tensor, Tensor]], num_rows: int, most: int | None = None) -> RowFacts:
    """Read rows one by one.

    Args:
        read: returns token ids and labels of a row, int64 `[length]` each; may raise.
        num_rows: rows of the dataset.
        most: read no more than these; None: all.
    """
    num_read = num_rows if most is None else min(num_rows, most)
    reading = _Reading(num_rows, num_read)
    held: list[tuple[Ints, Ints]] = []  # noted many at a time, as a row alone costs as much
    num_tokens = 0
    for row in range(num_read):
        ids, labels = read(row)
        held.append((ids.numpy(), labels.numpy()))
        num_tokens += len(ids)
        if num_tokens >= _TOKENS_AT_ONCE or len(held) == _ROWS_AT_ONCE or row == num_read - 1:
            of_ids, of_labels = zip(*held, strict=True)
            sizes = np.array([len(each) for each in of_ids])
            rows = np.arange(row + 1 - len(held), row + 1)
            reading.note(rows, sizes, np.concatenate(of_ids), np.concatenate(of_labels))
            held, num_tokens = [], 0
    return reading.facts()


def facts_of_dataset(dataset: SourcedDataset) -> RowFacts:
    """Return what is known of a dataset that knows its lengths.

    Token ids are those of its array `tokens`, if it has one, else those of the first `LOOKED_AT` examples; labels are
    looked at in the latter case.
    """
    known = getattr(dataset, "row_facts", None)
    if isinstance(known, RowFacts):
        return known
    lengths, counts = (np.asarray(each).astype(np.int32) for each in (dataset.lengths, dataset.num_label_tokens))
    tokens: Any = getattr(dataset, "tokens", None)
    starts: Any = getattr(dataset, "starts", None)
    if isinstance(tokens, np.ndarray) and isinstance(starts, np.ndarray) and len(starts):
        ids = _Extremes()
        for begin in range(int(starts.min()), len(tokens), _TOKENS_AT_ONCE):
            ids.note(tokens[begin : begin + _TOKENS_AT_ONCE], partial(add, begin))
        return RowFacts(len(starts), lengths, counts, _in_row(ids.largest, starts), _in_row(ids.smallest, starts))

    def read(index: int) -> tuple[Tensor, Tensor]:
        example = dataset[index]
        return example.input_ids, example.labels

    some = facts_of_rows(read, len(dataset), LOOKED_AT)
    return RowFacts(
        *(len(dataset), lengths, counts),
        *(some.largest_id, some.smallest_id, some.largest_label, some.smallest_label),
    )


def is_looked_at(dataset: SourcedDataset) -> bool:
    """Return whether `facts_of_dataset` looks at every example's tokens."""
    whole = isinstance(getattr(dataset, "row_facts", None), RowFacts)
    return whole or isinstance(getattr(dataset, "tokens", None), np.ndarray) or len(dataset) <= LOOKED_AT


def _in_row(spot: Spot | None, starts: Ints) -> Spot | None:
    return None if spot is None else (int(np.where(starts <= spot[0], starts, -1).argmax()), spot[1])


def has_arrow_columns(dataset: Any) -> bool:
    """Return whether a dataset is a Hugging Face dataset whose rows are its columns, with lists of token ids."""
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "__len__") and len(dataset)):
        return False
    if "input_ids" not in (dataset.column_names or ()) or dataset.format["type"] == "custom":
        return False  # rows of a `set_transform` are made when they are read
    if not set(_text_columns(dataset)) <= set(dataset.format["columns"] or dataset.column_names):
        return False  # rows lack a column that the dataset's format hides
    return all(_is_list_of_integers(dataset, name) for name in _text_columns(dataset))


def _text_columns(dataset: Any) -> list[str]:
    return [name for name in ("input_ids", "labels", "attention_mask") if name in dataset.column_names]


def _is_list_of_integers(dataset: Any, name: str) -> bool:
    import pyarrow as pa

    kind = dataset.data.schema.field(name).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type))


def facts_of_columns(dataset: Any, labels: Labels) -> RowFacts:
    """Read a dataset of `has_arrow_columns` by its columns `input_ids`, labels, and `attention_mask` if it has one.

    Tokens with a mask of 0 do not count. Takes the memory of a million tokens, and a few bytes a row.

    Raises:
        DataError: naming a row without ids, or with more or fewer labels or mask values than ids.
    """
    reading = _Reading(len(dataset), len(dataset))
    names = [name for name in _text_columns(dataset) if name in ("input_ids", "attention_mask", labels.column)]
    for rows, table in _tables(dataset, names):
        sizes, ids = _lists(table, "input_ids", rows)
        values = ids.copy() if labels.column is None else _beside(table, labels.column, rows, sizes, ids)
        if labels.ignored is not None:
            values[values == labels.ignored] = IGNORE_INDEX
        if "attention_mask" in names:
            keep = _beside(table, "attention_mask", rows, sizes, np.ones_like(ids)) != 0
            if not keep.all():
                kept = np.concatenate([[0], np.cumsum(keep)])
                ends = np.cumsum(sizes)
                sizes, ids, values = kept[ends] - kept[ends - sizes], ids[keep], values[keep]
        reading.note(rows, sizes, ids, values)
    return reading.facts()


def values_of_column(dataset: Any, name: str) -> list[Any]:
    """Return a column of a Hugging Face dataset, as plain values in the order of its rows."""
    column = dataset.data.table.column(name)
    order = _order(dataset)
    return (column if order is None else column.take(order)).to_pylist()


def _order(dataset: Any) -> Any:
    """Return the place in its table of every row of a dataset that was shuffled or filtered, None of others."""
    indices = dataset._indices
    return None if indices is None else indices.column(0)


def _tables(dataset: Any, names: Sequence[str]) -> Iterator[tuple[Ints, Any]]:
    """Yield some columns in parts of about `_TOKENS_AT_ONCE` tokens, each with the numbers of its rows.

    Rows of a dataset that was shuffled come in the order of its table: a row is found much faster so.
    """
    order = _order(dataset)
    wanted = np.arange(len(dataset)) if order is None else order.to_numpy()
    row_of = np.argsort(wanted, kind="stable")
    wanted, first = wanted[row_of], 0
    for batch in dataset.data.table.select(list(names)).to_reader(max_chunksize=_ROWS_AT_ONCE):
        low, high = np.searchsorted(wanted, (first, first + len(batch)))
        places, rows = wanted[low:high] - first, row_of[low:high]
        first += len(batch)
        tokens = len(batch["input_ids"].flatten())
        for part in np.array_split(np.arange(len(rows)), max(1, min(len(rows), tokens // _TOKENS_AT_ONCE))):
            if len(part):
                yield rows[part], batch.take(places[part])


def _lists(table: Any, name: str, rows: Ints) -> tuple[Ints, Ints]:
    """Return the lengths of a column's lists, 0 where there is none, and their values one after another."""
    import pyarrow as pa
    from pyarrow.compute import list_value_length

    column = table[name]
    if name == "input_ids" and column.null_count:
        row = int(rows[column.is_null().to_pylist().index(True)])
        raise DataError(f"example {row}: input_ids = None. Give a list of token ids.")
    sizes = list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = column.flatten()
    if values.null_count:
        place = values.is_null().to_pylist().index(True)
        row = int(rows[np.searchsorted(np.cumsum(sizes), place, side="right")])
        raise DataError(f"example {row}: {name} has a None in its list. Give whole numbers.")
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return sizes, values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


def _beside(table: Any, name: str, rows: Ints, sizes: Ints, default: Ints) -> Ints:
    """Return the values of a column beside those of the token ids, `default` where a row has none."""
    own, values = _lists(table, name, rows)
    absent = table[name].is_null().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((own != sizes) & ~absent)
    if len(wrong):
        place = int(wrong[0])
        raise DataError(
            f"example {rows[place]}: {sizes[place]} tokens and {own[place]} values of {name}. Give one for every token."
        )
    if not absent.any():
        return values.copy()
    filled = default.copy()
    filled[np.repeat(~absent, sizes)] = values
    return filled


_WORD = np.uint64(0x9E3779B97F4A7C15)


def hashes_of_columns(dataset: Any) -> npt.NDArray[np.uint64]:
    """Return a hash of every row's token ids, `[num_rows]`, of a dataset of `has_arrow_columns`."""
    hashes = np.zeros(len(dataset), dtype=np.uint64)
    for rows, table in _tables(dataset, ["input_ids"]):
        hashes[rows] = hash_rows(*_lists(table, "input_ids", rows))
    return hashes


def hash_rows(sizes: Ints, ids: Ints) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each row of tokens: the sum over its places of a mix of place and token."""
    starts = np.cumsum(sizes) - sizes
    place = (np.arange(len(ids)) - np.repeat(starts, sizes)).astype(np.uint64)
    mixed = ids.astype(np.uint64) * _WORD + (place << np.uint64(32))
    for shift, word in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # the mixing of splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(word)
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return total[starts + sizes] - total[starts] + sizes.astype(np.uint64)
