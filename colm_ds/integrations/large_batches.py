"""Read large batches in a `transformers.Trainer`: share them among ranks, and turn records into examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.gather import read_examples
from colm_ds.batching.mixture import MixtureSampler
from colm_ds.batching.row_facts import (
    LOOKED_AT,
    Labels,
    RowFacts,
    facts_of_columns,
    facts_of_rows,
    has_arrow_columns,
    hash_rows,
    hashes_of_columns,
    values_of_column,
)
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
        global_step: Callable[[], int],
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
            global_step: returns the optimizer steps taken so far.
            shuffle: False reads the dataset in order.
            rows: the dataset's index of each example, if some rows are left out.
        """
        self._rows = rows
        self._mixture = MixtureSampler(num_examples, large_batch_size, seed)
        self._num_parts, self._world_size = num_parts, world_size
        self._global_step, self._shuffle = global_step, shuffle
        self._begun: tuple[int, int] | None = None
        self.batch_size = large_batch_size // (num_parts * world_size)
        self.steps_per_epoch = self._mixture.steps_per_epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self._num_parts * self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        begun = self._begin()
        first = begun[0] * self.steps_per_epoch + 1
        for step in range(first, first + self.steps_per_epoch):
            self._begun = begun  # whoever only looked at the data in between has begun nothing
            indices = self._indices(step)
            rows = indices if self._rows is None else self._rows[indices]
            shares = rows.reshape(self._world_size, self._num_parts, self.batch_size)
            for part in range(self._num_parts):
                yield from shares[:, part].tolist()
        self._begun = begun

    def _begin(self) -> tuple[int, int]:
        """Return the 0-based epoch that begins, the next after one that a callback ended, and the steps taken."""
        steps = self._global_step()
        epoch = steps // self.steps_per_epoch
        if self._begun is not None:
            last, then = self._begun
            epoch = max(epoch, last + (steps > then))
        return epoch, steps

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


@dataclass(frozen=True)
class ExampleArrays:
    """An example as arrays, as it leaves a worker process: tensors need a file handle each.

    Attributes:
        input_ids: int64 `[T]`.
        labels: int64 `[T]`.
        source: id of its source.
        index: of its row in the dataset.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    source: int
    index: int

    def example(self) -> Example:
        """Return it as tensors."""
        return Example(torch.from_numpy(self.input_ids), torch.from_numpy(self.labels), self.source, self.index)


class ExampleCollator:
    """Turn numbered records into examples, each through the Trainer's data collator and without its padding."""

    def __init__(self, collator: Callable[[list[Any]], Any], source_ids: npt.NDArray[np.int64]) -> None:
        """Collate as the Trainer would.

        Args:
            collator: the Trainer's, without unused columns and sources.
            source_ids: source of every example of the dataset.
        """
        self.collator = collator
        self._source_ids = source_ids

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> list[Example]:
        """Return the examples of numbered records, in order."""
        return [self._example(index, record) for index, record in numbered]

    def arrays(self, numbered: Sequence[tuple[int, Any]]) -> list[ExampleArrays]:
        """Return the examples of numbered records as arrays, in order; the `collate_fn` of worker processes."""
        return [
            ExampleArrays(one.input_ids.numpy(), one.labels.numpy(), one.source, one.index) for one in self(numbered)
        ]

    def check(self, index: int, record: Any) -> None:
        """Raise if a record cannot be trained on once collated.

        Raises:
            ConfigError: if the collator returns more than text.
            DataError: if it cannot take the record, or returns no token ids.
        """
        collated = self._collated(index, record)
        others = sorted({str(key) for key in collated} - TEXT_INPUTS)
        if others:
            raise ConfigError(
                f"data_collator: gives {', '.join(others)} beside {', '.join(sorted(TEXT_INPUTS))}. CoLM pads and "
                "moves text only. Use a collator for causal language modelling, without packing or flattening."
            )
        self._example(index, record)

    def _collated(self, index: int, record: Any) -> Mapping[str, Any]:
        try:
            return self.collator([record])
        except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(f"example {index} of the dataset: the data collator cannot take it: {reason}") from error

    def _example(self, index: int, record: Any) -> Example:
        collated = self._collated(index, record)
        text = {key: value for key, value in collated.items() if key in TEXT_INPUTS - {"token_type_ids"}}
        try:
            (example,) = read_examples(text, ["all"], None)
        except (DataError, ValueError) as error:
            raise DataError(f"example {index} of the dataset: {error}") from None
        return Example(example.input_ids, example.labels, int(self._source_ids[index]), index)


def find_row_facts(dataset: Any, examples_of: ExampleCollator) -> RowFacts:
    """Find what is known of a dataset's rows as they are after the data collator.

    All rows of a Hugging Face dataset with `input_ids`, by its columns, as long as the collator leaves their tokens and
    labels as they are (or makes labels of the tokens but for padding); else the first `LOOKED_AT` rows, collated.

    Args:
        dataset: a Hugging Face dataset, or any with `len` and integer indexing.
        examples_of: makes examples of its rows.

    Raises:
        DataError: naming a row that cannot be read.
    """

    def read(row: int) -> tuple[torch.Tensor, torch.Tensor]:
        (example,) = examples_of([(row, dataset[row])])
        return example.input_ids, example.labels

    return facts_by_columns(dataset, examples_of) or facts_of_rows(read, len(dataset), LOOKED_AT)


def facts_by_columns(dataset: Any, examples_of: ExampleCollator) -> RowFacts | None:
    """Return what the columns of a Hugging Face dataset say of all of its rows, None if the collator changes that."""
    if not has_arrow_columns(dataset):
        return None
    for labels in _possible_labels(dataset, examples_of):
        if not _explains(dataset, labels, examples_of, _spread(len(dataset))):
            continue
        facts = facts_of_columns(dataset, labels)
        if _explains(dataset, labels, examples_of, _telling(facts)):
            return facts
    return None


def _possible_labels(dataset: Any, examples_of: ExampleCollator) -> list[Labels]:
    """Return where a collator may take labels from: their column, the token ids, or the token ids but padding."""
    collator = getattr(examples_of.collator, "data_collator", examples_of.collator)  # behind that of unused columns
    pad = getattr(getattr(collator, "tokenizer", None), "pad_token_id", None)
    named = [Labels("labels")] if "labels" in dataset.column_names else []
    return [*named, Labels(None), *([Labels(None, pad)] if isinstance(pad, int) else [])]


def _spread(num_rows: int) -> list[int]:
    """Return a few rows from all of a dataset."""
    return sorted({round(part * (num_rows - 1) / 7) for part in range(8)})


def _telling(facts: RowFacts) -> list[int]:
    """Return the rows that a collator would most likely change, and those that what is said depends on."""
    extremes = (facts.longest, facts.largest_id, facts.smallest_id, facts.largest_label, facts.smallest_label)
    rows = {spot[0] for spot in extremes if spot is not None} | set(facts.without_label[:4].tolist())
    return sorted(rows | {int(facts.lengths.argmin())})


def _explains(dataset: Any, labels: Labels, examples_of: ExampleCollator, rows: Sequence[int]) -> bool:
    """Return whether some rows are after the collator what their columns say."""
    for row in rows:
        (example,) = examples_of([(row, dataset[row])])
        try:
            facts = facts_of_columns(dataset.select([row]), labels)
        except DataError:
            continue  # raised with its number where all rows are read
        own = facts_of_rows(lambda _: (example.input_ids, example.labels), 1)  # noqa: B023 (called at once)
        if any(not np.array_equal(getattr(facts, each.name), getattr(own, each.name)) for each in fields(RowFacts)):
            return False
    return True


def has_label(example: Example) -> bool:
    """Return whether an example has a label to train on."""
    return bool((example.labels[1:] != IGNORE_INDEX).any())


def number_common(train: Any, heldout: Any) -> int:
    """Return how many rows of one dataset are rows of the other too, token by token.

    All rows of Hugging Face datasets with `input_ids` and of lists count; others, which may make their rows when they
    are read, are not looked at.
    """
    trained, held = _row_hashes(train), _row_hashes(heldout)
    return 0 if trained is None or held is None else int(np.isin(held, trained).sum())


def _row_hashes(dataset: Any) -> npt.NDArray[np.uint64] | None:
    if has_arrow_columns(dataset):
        return hashes_of_columns(dataset)
    if not isinstance(dataset, (list, tuple)) or not dataset:
        return None
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in dataset):
        return None
    rows = [np.asarray(row["input_ids"], dtype=np.int64) for row in dataset]
    return hash_rows(np.array([len(row) for row in rows]), np.concatenate(rows))


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
        is_plain = has_arrow_columns(dataset)
        values = (
            None if column not in columns else values_of_column(dataset, column) if is_plain else list(dataset[column])
        )
    else:
        first = dataset[0] if len(dataset) else None
        columns = list(first) if isinstance(first, Mapping) else []
        values = []
        for index in range(len(dataset)):  # records may hold all tokens: one at a time
            record = dataset[index]
            if not isinstance(record, Mapping) or column not in record:
                values = None
                break
            values.append(record[column])
    if values is None:
        raise ConfigError(
            f"train_dataset: no {column!r} column (it has {', '.join(map(str, columns))}) and no clusters. Add the "
            "column, name it with source_column, give sources=[...] (one for every example, such as its cluster), or "
            'write small_sources "none" and per_source false for one pool of all examples.'
        )
    wrong = next((row for row, value in enumerate(values) if not isinstance(_plain(value), (str, int))), None)
    if wrong is not None:
        raise ConfigError(f"train_dataset: source {values[wrong]!r} in example {wrong}. Give names or whole numbers.")
    return [_plain(value) for value in values]


def sources_if_any(dataset: Any, column: str) -> list[Any] | None:
    """Return the source of every example; None if not all have one that is a name or a whole number."""
    if not has_column(dataset, column):
        return None
    try:
        return dataset_sources(dataset, column, None)
    except (ConfigError, RuntimeError, ValueError):  # the latter of a tensor of several numbers
        return None


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
