"""Pack examples into rows: which share a row, and the micro-batch that the rows make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from colm_ds.batching.assign import micro_batches
from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import ConfigError

PackedBatches = list[list[list[int]]]
"""Micro-batches of one rank, as lists of rows, as lists of positions; an empty micro-batch is a placeholder."""


@dataclass(frozen=True)
class Packing:
    """Layout of rows for a model.

    Attributes:
        row_tokens: tokens that a row may hold; a longer example has a row to itself.
        one_row: join the rows of a micro-batch into one, for attention that tells documents apart in a single row only.
    """

    row_tokens: int
    one_row: bool = False


def pack_first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Pack examples into few rows: first-fit decreasing.

    The longest comes first (ties by index); each goes into the first row that has room for it.

    Args:
        lengths: tokens of every example, `[n]`.
        row_tokens: tokens that a row may hold; a longer example has a row to itself.

    Returns:
        Rows of indices in `lengths`; every index is in exactly one.

    Raises:
        ConfigError: if `row_tokens` is below 1.
    """
    if row_tokens < 1:
        raise ConfigError(f"row_tokens = {row_tokens}: must be at least 1.")
    rows: list[list[int]] = []
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [row_tokens] * (2 * leaves)  # a tree: room[leaves + row] is left in a row, room[node] at most below a node
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        size = int(lengths[index])
        if size > row_tokens:  # the longest come first, so that all rows so far are as long
            node = leaves + len(rows)
        else:
            node = 1
            while node < leaves:
                node = 2 * node if size <= room[2 * node] else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def pack_micro_batches(
    held: Sequence[Sequence[int]],
    lengths: Tensor,
    row_tokens: int,
    *,
    max_rows: int,
    max_tokens: int | None = None,
) -> list[PackedBatches]:
    """Pack every rank's examples into rows and cut these into micro-batches; every rank has the same number.

    Args:
        held: positions of each rank.
        lengths: tokens of every example, `[r]`.
        row_tokens: see `pack_first_fit`.
        max_rows: maximum rows per micro-batch.
        max_tokens: maximum padded tokens per micro-batch; rows are then no longer either.

    Returns:
        For every rank its micro-batches.
    """
    row_tokens = min(row_tokens, max_tokens or row_tokens)
    rows: list[list[int]] = []
    rows_of: list[list[int]] = []
    sizes = lengths.tolist()
    for mine in held:
        packed = pack_first_fit([sizes[position] for position in mine], row_tokens)
        rows_of.append(list(range(len(rows), len(rows) + len(packed))))
        rows += [[mine[index] for index in row] for row in packed]
    fills = torch.tensor([sum(sizes[position] for position in row) for row in rows], dtype=torch.int64)
    plans = micro_batches(rows_of, fills, max_examples=max_rows, max_tokens=max_tokens)
    return [[[rows[row] for row in micro] for micro in plan] for plan in plans]


def pack_micro_batch(batch: MicroBatch, row_sizes: Sequence[int]) -> MicroBatch:
    """Lay the examples of a micro-batch one after another in rows, in their order, with positions from 0 for each.

    Padding at the end of a row counts from 0 as well, as one more document. All sequences of a classification example
    are in one row, each a document.

    Args:
        batch: from `make_micro_batch`, on the CPU.
        row_sizes: examples of each row; as many in total as the micro-batch has.

    Returns:
        The same labels at other places, with `position_ids`, int64 `[rows, length]`.
    """
    counts = torch.tensor(row_sizes, dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)  # of every example
    if batch.groups is not None:
        row = row[list(batch.groups.owners)]  # of every sequence
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    fills = torch.zeros(len(counts), dtype=torch.int64).index_add(0, row, lengths)
    before = lengths.cumsum(0) - lengths
    offset = before - (fills.cumsum(0) - fills)[row]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # of every token
    within = torch.arange(len(sequence)) - before[sequence]
    place = row[sequence], offset[sequence] + within
    input_ids = torch.zeros(len(counts), int(fills.max()), dtype=torch.int64)
    position_ids = torch.arange(input_ids.shape[1]) - fills[:, None]
    input_ids[place] = batch.input_ids[sequence, within]
    position_ids[place] = within
    groups = batch.groups
    if groups is not None:
        at, position = groups.distinct
        groups = replace(groups, distinct=torch.stack([row[at], position + offset[at]]))
    return replace(
        batch,
        input_ids=input_ids,
        position_ids=position_ids,
        packed=batch.rows,
        rows=row[batch.rows],
        positions=batch.positions + offset[batch.rows],
        lengths=tuple(fills.tolist()),
        groups=groups,
    )
