"""Read large batches in a `transformers.Trainer`: share them among ranks, and turn records into examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyarrow.compute import list_value_length
from torch.utils.data import Dataset, Sampler

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.gather import read_examples
from colm_ds.batching.mixture import MixtureSampler
from colm_ds.errors import ConfigError, DataError
from colm_ds.types import Example

TEXT_INPUTS = {"input_ids", "labels", "attention_mask", "token_type_ids"}
"""Keys that a data collator may return; others would be lost in the selection."""


class ShareSampler(Sampler[list[int]]):
    """Dataset indices of every rank's parts of the large batches, in the order in which accelerate assigns them.

    Rank k reads positions k r/W to (k+1) r/W - 1 of each large batch, in as many parts as there are micro-batches.
    Every epoch has floor(n / r) large batches; the rest is not seen in that epoch.
    """

    drop_last = True

    def __init__(
        self,
        num_examples: int,
        large_batch_size: int,
        num_parts: int,
        world_size: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        shuffle: bool = True,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Prepare for a dataset.

        Args:
            num_examples: examples in the dataset.
            large_batch_size: r, divisible by the parts of all ranks.
            num_parts: micro-batches of an optimizer step on each rank.
            world_size: W.
            seed: seed of the order.
            epoch: returns the 0-based epoch when one begins.
            shuffle: False reads the dataset in order.
            rows: the dataset's index of each example, if some rows are left out.
        """
        self._rows = rows
        self._mixture = MixtureSampler(num_examples, large_batch_size, seed)
        self._num_parts, self._world_size = num_parts, world_size
        self._epoch, self._shuffle = epoch, shuffle
        self.batch_size = large_batch_size // (num_parts * world_size)
        self.steps_per_epoch = self._mixture.steps_per_epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self._num_parts * self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch() * self.steps_per_epoch + 1
        for step in range(first, first + self.steps_per_epoch):
            indices = self._indices(step)
            rows = indices if self._rows is None else self._rows[indices]
            shares = rows.reshape(self._world_size, self._num_parts, self.batch_size)
            for part in range(self._num_parts):
                yield from shares[:, part].tolist()

    def _indices(self, step: int) -> npt.NDArray[np.int64]:
        if self._shuffle:
            return self._mixture.indices(step)
        size = self._mixture.large_batch_size
        return np.arange(size, dtype=np.int64) + (step - 1) % self.steps_per_epoch * size


class NumberedDataset(Dataset[tuple[int, Any]]):
    """A dataset whose items come with their index.

    Attributes:
        total_dataset_length: examples read in an epoch; accelerate takes a remainder for an incomplete last batch.
    """

    def __init__(self, inner: Any, num_read: int) -> None:
        self._inner = inner
        self.total_dataset_length = num_read

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._inner[index]


class WithoutSource:
    """A data collator that hides the source column from its inner one."""

    def __init__(self, inner: Callable[[list[Any]], Any], source_column: str) -> None:
        self.inner = inner
        self.source_column = source_column

    def __call__(self, records: Sequence[Any]) -> Any:
        """Collate the records without their sources by the inner collator."""
        return self.inner([_without(record, self.source_column) for record in records])

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "source_column"):  # accessed before __init__, as copy and pickle do
            raise AttributeError(name)
        return getattr(self.inner, name)


class ExampleCollator:
    """Turn numbered records into examples, each through the Trainer's data collator and without its padding."""

    def __init__(self, collator: Callable[[list[Any]], Any], source_ids: npt.NDArray[np.int64]) -> None:
        """Collate as the Trainer would.

        Args:
            collator: the Trainer's, without unused columns and sources.
            source_ids: source of every example of the dataset.
        """
        self._collator = collator
        self._source_ids = source_ids

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> list[Example]:
        """Return the examples of numbered records, in order."""
        return [self._example(index, record) for index, record in numbered]

    def check(self, index: int, record: Any) -> None:
        """Raise if a record cannot be trained on once collated.

        Raises:
            ConfigError: if the collator returns more than text.
            DataError: if it returns no token ids.
        """
        collated = self._collator([record])
        others = sorted({str(key) for key in collated} - TEXT_INPUTS)
        if others:
            raise ConfigError(
                f"data_collator: gives {', '.join(others)} beside {', '.join(sorted(TEXT_INPUTS))}. CoLM pads and "
                "moves text only. Use a collator for causal language modelling, without packing or flattening."
            )
        self._example(index, record)

    def _example(self, index: int, record: Any) -> Example:
        collated: Mapping[str, Any] = self._collator([record])
        text = {key: value for key, value in collated.items() if key in TEXT_INPUTS - {"token_type_ids"}}
        try:
            (example,) = read_examples(text, ["all"], None)
        except (DataError, ValueError) as error:
            raise DataError(f"example {index} of the dataset: {error}") from None
        return Example(example.input_ids, example.labels, int(self._source_ids[index]), index)


LOOKED_AT = 10_000
"""Rows of a dataset without a column of labels that are looked at before training; the others when they are read."""


def rows_with_labels(dataset: Any, examples_of: ExampleCollator) -> tuple[npt.NDArray[np.int64], int]:
    """Find the rows with a label to train on: all of a Hugging Face dataset with `labels`, else the first `LOOKED_AT`.

    Rows that are not looked at count as rows with labels.

    Args:
        dataset: a Hugging Face dataset, or any with `len` and integer indexing.
        examples_of: makes examples of its rows.

    Returns:
        Their indices, ascending int64, and how many rows were looked at.
    """
    total = len(dataset)
    if "labels" in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "with_format"):
        columns = dataset.with_format("arrow", columns=["labels"])
        parts = [columns[start : start + LOOKED_AT]["labels"] for start in range(0, total, LOOKED_AT)]
        return np.flatnonzero(np.concatenate([_has_label(part) for part in parts])), total
    looked_at = min(total, LOOKED_AT)
    labelled = [has_label(examples_of([(index, dataset[index])])[0]) for index in range(looked_at)]
    return np.concatenate([np.flatnonzero(labelled), np.arange(looked_at, total)]), looked_at


def has_label(example: Example) -> bool:
    """Return whether an example has a label to train on."""
    return bool((example.labels[1:] != IGNORE_INDEX).any())


def _has_label(column: Any) -> npt.NDArray[np.bool_]:
    """Return whether each list of an Arrow column has a label after its first, `[n]`."""
    rows = column.combine_chunks()
    sizes = list_value_length(rows).fill_null(0).to_numpy(zero_copy_only=False)
    values = rows.flatten().to_numpy(zero_copy_only=False)
    row_of = np.repeat(np.arange(len(sizes)), sizes)
    is_first = np.arange(len(values)) == (np.cumsum(sizes) - sizes)[row_of]
    return np.bincount(row_of[(values != IGNORE_INDEX) & ~is_first], minlength=len(sizes)) > 0


class CollatedExamples:
    """The examples of a dataset's rows, made by a collator."""

    def __init__(self, dataset: Any, collator: ExampleCollator, rows: npt.NDArray[np.int64]) -> None:
        self._dataset, self._collator, self._rows = dataset, collator, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self._rows[index])
        return self._collator([(row, self._dataset[row])])[0]


def dataset_sources(dataset: Any, column: str, given: Sequence[Any] | None) -> list[Any]:
    """Return the source of every example of a dataset, read once.

    Args:
        dataset: a Hugging Face dataset, or any with `len` and integer indexing.
        column: key of the source in a record.
        given: the sources, if the records do not have them (clusters, for example).

    Raises:
        ConfigError: if they are unknown, or their number is not that of the examples.
    """
    if given is not None:
        if len(given) != len(dataset):
            raise ConfigError(
                f"sources: {len(given)} for {len(dataset)} examples of train_dataset. Give one for every example."
            )
        return [_plain(value) for value in given]
    if hasattr(dataset, "column_names"):
        columns = list(dataset.column_names)
        values = list(dataset[column]) if column in columns else None
    else:
        records = [dataset[index] for index in range(len(dataset))]
        columns = list(records[0]) if records and isinstance(records[0], Mapping) else []
        has_all = all(isinstance(record, Mapping) and column in record for record in records)
        values = [record[column] for record in records] if has_all else None
    if values is None:
        raise ConfigError(
            f"train_dataset: no {column!r} column (it has {', '.join(map(str, columns))}) and no clusters. Add the "
            "column, name it with source_column, give sources=[...] (one for every example, such as its cluster), or "
            'write small_sources "none" and per_source false for one pool of all examples.'
        )
    wrong = next((value for value in values if not isinstance(_plain(value), (str, int))), None)
    if wrong is not None:
        raise ConfigError(f"train_dataset: source {wrong!r}. Give names or whole numbers.")
    return [_plain(value) for value in values]


def has_column(dataset: Any, column: str) -> bool:
    """Return whether the dataset's first record has a key."""
    return column in (dataset.column_names if hasattr(dataset, "column_names") else dataset[0])


def number_sources(values: Sequence[str | int]) -> tuple[dict[str, int], npt.NDArray[np.int64]]:
    """Count examples by source name, numbers first, and return every example's source id `[n]`; as `RecordDataset`."""
    by_name = {str(value): value for value in values}
    names = sorted(by_name, key=lambda name: (isinstance(by_name[name], str), by_name[name]))
    number = {name: source for source, name in enumerate(names)}
    ids = np.array([number[str(value)] for value in values], dtype=np.int64)
    counts = np.bincount(ids, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True)), ids


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, (torch.Tensor, np.generic)) else value


def _without(record: Any, column: str) -> Any:
    if not isinstance(record, Mapping) or column not in record:
        return record
    return {key: value for key, value in record.items() if key != column}
