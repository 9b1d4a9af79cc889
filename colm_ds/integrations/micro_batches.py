"""Make a coreset's micro-batches for a `transformers.Trainer`, of the number and size that it expects on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from colm_ds.batching.assign import equal_ranks
from colm_ds.batching.collate import IGNORE_INDEX, pad_batch
from colm_ds.batching.micro_batch import PLACE_HOLDER, MicroBatch, make_micro_batch
from colm_ds.batching.move import move_examples, moves_of
from colm_ds.batching.packing import Packing, pack_first_fit, pack_micro_batch
from colm_ds.selection import Exchange
from colm_ds.types import Example, LargeBatch

KEY = "colm"
"""Key of a micro-batch's `Weighted` among the model's inputs; `CoLMMixin.compute_loss` takes it out."""


@dataclass(frozen=True)
class Weighted:
    """Data of a micro-batch beside the model's inputs.

    Attributes:
        batch: the micro-batch, with its labelled positions, on the CPU.
        scales: factor of every example's summed token losses, float32 `[n]`; 0 for a placeholder.
        text: copies of `input_ids` and `labels` as they are handed to the Trainer.
    """

    batch: MicroBatch
    scales: Tensor
    text: Mapping[str, Tensor]


def coreset_micro_batches(
    batch: LargeBatch,
    positions: Sequence[int],
    scale: Tensor,
    exchange: Exchange,
    rank: int,
    *,
    num_batches: int,
    max_examples: int,
    pad_token_id: int,
    packing: Packing | None = None,
) -> list[dict[str, Any]]:
    """Make this rank's micro-batches of a coreset, long examples first; all ranks call it together.

    Args:
        batch: the large batch as this rank sees it.
        positions: chosen positions, at most `num_batches * max_examples` for each rank.
        scale: from `loss_scale`, `[r]`.
        exchange: the ranks; it moves the tokens of examples that change rank.
        rank: this rank.
        num_batches: number of micro-batches; those without examples hold a placeholder of weight 0.
        max_examples: maximum examples of a micro-batch; with packing maximum rows, which then fill the first ones.
        pad_token_id: token id to pad `input_ids` with.
        packing: how to pack examples into rows, or None.

    Returns:
        The model's inputs for each (`input_ids`, `labels` and `attention_mask`, or `position_ids` of packed rows,
        right-padded); under `KEY` a `Weighted`.
    """
    ranks = equal_ranks(positions, batch.lengths, batch.home, exchange.num_processes)
    arrived = move_examples(batch, moves_of(ranks, batch.home), rank, exchange)
    examples: Mapping[int, Example] = {**batch.examples, **arrived}
    mine = [position for position in positions if ranks[position] == rank]
    mine.sort(key=lambda position: (-int(batch.lengths[position]), position))
    rows = [[position] for position in mine]
    if packing is not None:
        lengths = [int(batch.lengths[position]) for position in mine]
        rows = [[mine[index] for index in row] for row in pack_first_fit(lengths, packing.row_tokens)]
        rows.sort(key=lambda row: -int(batch.lengths[row].sum()))
    groups = [rows[start : start + max_examples] for start in range(0, num_batches * max_examples, max_examples)]
    made = []
    for group in groups:
        positions = list(chain(*group))
        chosen = [examples[position] for position in positions]
        if packing is None or not chosen:
            made.append(_inputs(chosen, scale[positions], pad_token_id))
        else:
            row_sizes = [len(positions)] if packing.one_row else [len(row) for row in group]
            made.append(_packed_inputs(chosen, row_sizes, scale[positions], pad_token_id))
    return made


def _inputs(examples: Sequence[Example], scales: Tensor, pad_token_id: int) -> dict[str, Any]:
    batch = make_micro_batch(examples)
    padded = pad_batch(list(examples) or [PLACE_HOLDER], pad_token_id)
    labels = padded["labels"] if examples else torch.full_like(padded["labels"], IGNORE_INDEX)
    mask = (torch.arange(labels.shape[1]) < padded["lengths"][:, None]).long()
    text = {"input_ids": padded["input_ids"], "labels": labels}
    weighted = Weighted(batch, scales if len(examples) else torch.zeros(1), _copied(text))
    return {**text, "attention_mask": mask, KEY: weighted}


def _packed_inputs(
    examples: Sequence[Example], row_sizes: Sequence[int], scales: Tensor, pad_token_id: int
) -> dict[str, Any]:
    batch = pack_micro_batch(make_micro_batch(examples), row_sizes)
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    labels[batch.rows, batch.positions + 1] = batch.targets
    is_padding = torch.arange(labels.shape[1]) >= torch.tensor(batch.lengths)[:, None]
    input_ids = batch.input_ids.masked_fill(is_padding, pad_token_id)
    text = {"input_ids": input_ids, "labels": labels}
    return {**text, "position_ids": batch.position_ids, KEY: Weighted(batch, scales, _copied(text))}


def _copied(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, as a Trainer's subclass may change tensors in place."""
    return {key: value.clone() for key, value in text.items()}
