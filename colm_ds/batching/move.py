"""Move examples' tokens from the rank that holds them to the rank that trains on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from colm_ds.selection import Exchange
from colm_ds.types import Example, LargeBatch


def moves_of(ranks: Mapping[int, int], home: Tensor) -> list[tuple[int, int, int]]:
    """Return the moves of the examples that are trained away from home: (position, from rank, to rank), in order.

    Args:
        ranks: rank that trains each chosen position.
        home: rank that holds every example, int64 `[r]`.
    """
    places = sorted(ranks)
    homes = home[places].tolist()
    return [(place, here, ranks[place]) for place, here in zip(places, homes, strict=True) if ranks[place] != here]


def move_examples(
    batch: LargeBatch, moves: Sequence[tuple[int, int, int]], rank: int, exchange: Exchange
) -> dict[int, Example]:
    """Send the tokens of examples that are trained on another rank than the one that holds them.

    Args:
        batch: the large batch as this rank sees it.
        moves: from `moves_of`, the same list on every rank.
        rank: this rank.
        exchange: the ranks.

    Returns:
        The examples that came to this rank, by position.
    """
    if not moves:
        return {}
    lengths = batch.stored_lengths
    sizes = [int(lengths[position]) for position, _, _ in moves]
    tokens = torch.zeros(2, sum(sizes), dtype=torch.int32)
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for (position, source, _), start, size in zip(moves, starts, sizes, strict=False):
        if source == rank:
            example = batch.examples[position]
            tokens[0, start : start + size] = example.input_ids
            tokens[1, start : start + size] = example.labels
    exchange.sum(tokens)
    arrived = {}
    for (position, _, target), start, size in zip(moves, starts, sizes, strict=False):
        if target == rank:
            ids, labels = tokens[:, start : start + size].long()
            candidates = None if batch.candidates is None else batch.candidates.of(position)
            facts = int(batch.sources[position]), int(batch.indices[position])
            arrived[position] = Example(ids, labels, *facts, candidates)
    return arrived
