"""Gather a large batch from what each rank passes, records or a padded batch, in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.errors import DataError
from colm_ds.selection import Exchange
from colm_ds.types import Example, LargeBatch

NUM_SHOWN = 8
"""Examples or names that a message lists one by one."""


def read_examples(examples: Any, source_names: Sequence[str], source_key: str | None = "source") -> list[Example]:
    """Read unpadded examples from a list of records or from a collated batch.

    Args:
        examples: a list of `Example`s or of mappings with `input_ids`, and `labels` (default: `input_ids`),
            `attention_mask` (default: no padding), the source (not needed where there is only one) and `index`
            (default: the position in the large batch); or one mapping of these with a row for every example.
        source_names: names of the sources, by id.
        source_key: key of a record's source: its name or id; None: all belong to the first source.

    Raises:
        DataError: naming the example, if something is missing or inconsistent.
    """
    records: Sequence[Any] = _rows(examples) if isinstance(examples, Mapping) else examples
    return [
        record if isinstance(record, Example) else _example(record, place, source_names, source_key)
        for place, record in enumerate(records)
    ]


def gather_large_batch(read: Callable[[], list[Example]], step: int, rank: int, exchange: Exchange) -> LargeBatch:
    """Gather the ranks' examples into one large batch, in the order of the ranks; all ranks call it together.

    Args:
        read: returns this rank's examples; may raise a `DataError`. An `index` below 0 becomes the position.
        step: 1-based step.
        rank: this rank.
        exchange: the ranks.

    Raises:
        DataError: on every rank, if `read` raised one on any, or if an example has no label to train on.
    """
    examples: list[Example] = []
    failure: DataError | None = None
    try:
        examples = read()
    except DataError as error:
        failure = error
    counts = torch.zeros(exchange.num_processes, dtype=torch.int64)
    counts[rank] = -1 if failure else len(examples)
    counts = exchange.sum(counts)
    if failure is not None:
        raise failure
    if bool((counts < 0).any()):
        others = (counts < 0).nonzero().flatten().tolist()
        raise DataError(f"step {step}: rank {others[0]} could not read its examples; its message says why.")
    start, size = int(counts[:rank].sum()), int(counts.sum())
    positions = torch.arange(start, start + len(examples))
    mine = [
        (
            example.index if example.index >= 0 else start + place,
            example.source,
            len(example.input_ids),
            1 if example.candidates else int((example.labels[1:] != IGNORE_INDEX).sum()),
        )
        for place, example in enumerate(examples)
    ]
    facts = exchange.gather_rows(torch.tensor(mine, dtype=torch.int64).reshape(-1, 4), positions, size)
    indices, sources, lengths, labelled = facts.unbind(dim=1)
    if bool((labelled == 0).any()):
        empty = indices[labelled == 0][:NUM_SHOWN].tolist()
        raise DataError(
            f"step {step}: examples {empty} have no label that is not -100 after the first token, so there is nothing "
            "to train on. Take such examples out of the dataset."
        )
    return LargeBatch(
        step=step,
        indices=indices.clone(),
        sources=sources.clone(),
        lengths=lengths.clone(),
        num_label_tokens=labelled.clone(),
        home=torch.repeat_interleave(torch.arange(exchange.num_processes), counts),
        examples=dict(zip(positions.tolist(), examples, strict=True)),
    )


def source_id(value: Any, names: Sequence[str]) -> int:
    """Return the id of a source given by name, or by a number that is its name or else its id.

    Raises:
        DataError: if there is no such source.
    """
    value = value.item() if hasattr(value, "item") else value
    if str(value) in names:
        return names.index(str(value))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    shown = ", ".join(map(repr, names[:NUM_SHOWN])) + (", ..." if len(names) > NUM_SHOWN else "")
    raise DataError(f"source {value!r} is not among those counted before training: {shown}.")


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a collated batch into records."""
    columns = {key: values for key, values in batch.items() if values is not None}
    sizes = {key: len(values) if hasattr(values, "__len__") else None for key, values in columns.items()}
    if "input_ids" not in columns or any(size != sizes["input_ids"] for size in sizes.values()):
        shown = ", ".join(f"{key}: {size}" for key, size in sizes.items())
        raise DataError(f"a batch with {shown} rows. Give input_ids and the same number of rows for every other key.")
    return [{key: values[row] for key, values in columns.items()} for row in range(len(columns["input_ids"]))]


def _example(record: Any, place: int, names: Sequence[str], source_key: str | None) -> Example:
    if not isinstance(record, Mapping):
        raise DataError(f"example {place}: a {type(record).__name__}. Give mappings with input_ids, labels and source.")
    needed = ["input_ids"] if source_key is None or len(names) == 1 else ["input_ids", source_key]
    missing = [key for key in needed if record.get(key) is None]
    if missing:
        raise DataError(f"example {place}: no {missing[0]!r}. Its keys: {', '.join(map(str, record))}.")
    try:
        ids = _row(record["input_ids"])
        labels = ids if record.get("labels") is None else _row(record["labels"])
        if record.get("attention_mask") is not None:
            keep = _row(record["attention_mask"]).bool()
            ids, labels = ids[keep], labels[keep]
        index = -1 if record.get("index") is None else int(record["index"])
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"example {place}: {reason}. Give input_ids, labels and attention_mask of equal length; index is a number."
        ) from None
    if len(ids) != len(labels):
        raise DataError(f"example {place}: {len(ids)} tokens and {len(labels)} labels. Give one label per token.")
    has_source = source_key is not None and record.get(source_key) is not None
    source = source_id(record[source_key], names) if has_source else 0
    return Example(ids, labels, source, index)


def _row(values: Any) -> Tensor:
    """Return token ids on the CPU, int64 `[length]`."""
    row = torch.as_tensor(values, dtype=torch.int64).cpu()
    if row.dim() != 1:
        raise ValueError(f"shape {list(row.shape)} instead of one dimension")
    return row
