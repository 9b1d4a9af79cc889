"""Make a coreset's micro-batches for a `transformers.Trainer`, of the number and size that it expects on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.batching.collate import IGNORE_INDEX, pad_batch
from colm_ds.batching.micro_batch import PLACE_HOLDER, MicroBatch, make_micro_batch
from colm_ds.batching.move import move_examples
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
    """

    batch: MicroBatch
    scales: Tensor


def equal_ranks(positions: Sequence[int], lengths: Tensor, home: Tensor, world_size: int) -> dict[int, int]:
    """Return the rank that trains each chosen example, in equal numbers: surplus examples move, shortest first.

    Args:
        positions: chosen positions.
        lengths: tokens of every example, `[r]`.
        home: rank that holds every example, `[r]`.
        world_size: W.

    Returns:
        Rank by position; the ranks' counts differ by at most one.
    """
    held: list[list[int]] = [[] for _ in range(world_size)]
    for position in sorted(positions, key=lambda position: (-int(lengths[position]), position)):
        held[int(home[position])].append(position)
    while True:
        counts = [len(mine) for mine in held]
        most, least = counts.index(max(counts)), counts.index(min(counts))
        if counts[most] - counts[least] <= 1:
            return {position: rank for rank, mine in enumerate(held) for position in mine}
        held[least].append(held[most].pop())


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
) -> list[dict[str, Any]]:
    """Make this rank's micro-batches of a coreset, long examples first; all ranks call it together.

    Args:
        batch: the large batch as this rank sees it.
        positions: chosen positions, at most `num_batches * max_examples` for each rank.
        scale: from `loss_scale`, `[r]`.
        exchange: the ranks; it moves the tokens of examples that change rank.
        rank: this rank.
        num_batches: number of micro-batches; those without examples hold a placeholder of weight 0.
        max_examples: maximum examples of a micro-batch.
        pad_token_id: token id to pad `input_ids` with.

    Returns:
        The model's inputs for each (`input_ids`, `attention_mask`, `labels`, right-padded); under `KEY` a `Weighted`.
    """
    ranks = equal_ranks(positions, batch.lengths, batch.home, exchange.num_processes)
    moves = [(p, int(batch.home[p]), ranks[p]) for p in sorted(positions) if ranks[p] != int(batch.home[p])]
    arrived = move_examples(batch, moves, rank, exchange)
    examples: Mapping[int, Example] = {**batch.examples, **arrived}
    mine = [position for position in positions if ranks[position] == rank]
    mine.sort(key=lambda position: (-int(batch.lengths[position]), position))
    groups = [mine[start : start + max_examples] for start in range(0, num_batches * max_examples, max_examples)]
    return [_inputs([examples[p] for p in group], scale[group], pad_token_id) for group in groups]


def _inputs(examples: Sequence[Example], scales: Tensor, pad_token_id: int) -> dict[str, Any]:
    batch = make_micro_batch(examples)
    padded = pad_batch(list(examples) or [PLACE_HOLDER], pad_token_id)
    labels = padded["labels"] if examples else torch.full_like(padded["labels"], IGNORE_INDEX)
    mask = (torch.arange(labels.shape[1]) < padded["lengths"][:, None]).long()
    weighted = Weighted(batch, scales if len(examples) else torch.zeros(1))
    return {"input_ids": padded["input_ids"], "attention_mask": mask, "labels": labels, KEY: weighted}
