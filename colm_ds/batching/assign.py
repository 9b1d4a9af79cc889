"""Assign examples to ranks and micro-batches for probing and training; every rank gets the same answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_ds.batching.collate import length_sorted_batches

IMBALANCE = 0.05
"""Examples stay home while no rank has more than this share of a rank's mean tokens above the least loaded one."""

Batches = list[list[int]]
"""Micro-batches as lists of positions; an empty one is a placeholder that every rank needs for its collectives."""


def home_ranks(lengths: Tensor, world_size: int, probed: Tensor | None = None) -> Tensor:
    """Share the large batch among ranks so that counts differ by at most one and tokens by little.

    Longest first, dealt out forwards and backwards in turn; the probed examples before the others, so that ranks
    have equal work to probe.

    Args:
        lengths: tokens of every example, `[r]`.
        world_size: W.
        probed: which examples will be probed, bool `[r]`; default all.

    Returns:
        Rank of every example, int64 `[r]`.
    """
    order = torch.sort(lengths, descending=True, stable=True).indices
    if probed is not None:
        order = torch.cat([order[probed[order]], order[~probed[order]]])
    place = torch.arange(len(lengths))
    turn, seat = place // world_size, place % world_size
    rank = torch.empty_like(place)
    rank[order] = torch.where(turn % 2 == 0, seat, world_size - 1 - seat)
    return rank


def training_ranks(positions: Sequence[int], lengths: Tensor, home: Tensor, world_size: int) -> dict[int, int]:
    """Return the rank that trains on each chosen example: its home, unless moving it evens out the ranks' tokens.

    While the most loaded rank is ahead of the least loaded one, the example whose length is nearest to half of the
    difference moves; ties go to the lowest position.

    Args:
        positions: chosen positions.
        lengths: tokens of every example, `[r]`.
        home: rank that holds every example, `[r]`.
        world_size: W.

    Returns:
        Rank by position.
    """
    size = {position: int(lengths[position]) for position in positions}
    held: list[list[int]] = [[] for _ in range(world_size)]
    for position in sorted(positions):
        held[int(home[position])].append(position)
    load = [sum(size[position] for position in mine) for mine in held]
    slack = IMBALANCE * sum(load) / world_size
    for _ in range(len(size)):
        most, least = load.index(max(load)), load.index(min(load))
        gap = load[most] - load[least]
        movable = [position for position in held[most] if size[position] < gap]
        if not movable or (gap <= slack and held[least]):
            break
        mover = min(movable, key=lambda position: (abs(2 * size[position] - gap), position))
        held[most].remove(mover)
        held[least].append(mover)
        load[most] -= size[mover]
        load[least] += size[mover]
    return {position: rank for rank, mine in enumerate(held) for position in mine}


def micro_batches(
    by_rank: Sequence[Sequence[int]],
    lengths: Tensor,
    *,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    equal_counts: bool = True,
) -> list[Batches]:
    """Cut every rank's examples into micro-batches, longest first, with little padding (`length_sorted_batches`).

    Args:
        by_rank: positions of each rank.
        lengths: tokens of every example, `[r]`.
        max_examples: maximum examples per micro-batch.
        max_tokens: maximum padded tokens per micro-batch.
        equal_counts: give every rank the same number, first by splitting some, then by adding empty ones.

    Returns:
        For every rank its micro-batches.
    """
    shared = []
    for mine in by_rank:
        sizes = [int(lengths[position]) for position in mine]
        groups = length_sorted_batches(sizes, max_examples=max_examples, max_tokens=max_tokens)
        shared.append([[mine[index] for index in group] for group in groups])
    if not equal_counts:
        return shared
    count = max(len(batches) for batches in shared)
    return [_split_to(batches, count, lengths) for batches in shared]


def _split_to(batches: Batches, count: int, lengths: Tensor) -> Batches:
    """Cut micro-batches in two where that saves the most padding until there are `count`, then add empty ones."""
    batches = list(batches)
    while len(batches) < count:
        cuts = [(*_best_cut(batch, lengths), number) for number, batch in enumerate(batches) if len(batch) > 1]
        if not cuts:
            break
        _, cut, number = max(cuts, key=lambda cut: (cut[0], -cut[2]))
        batches[number : number + 1] = [batches[number][:cut], batches[number][cut:]]
    return batches + [[] for _ in range(count - len(batches))]


def _best_cut(batch: list[int], lengths: Tensor) -> tuple[int, int]:
    """Return the padded tokens saved by the best cut of a micro-batch sorted by length, and where, middle on ties."""
    sizes = [int(lengths[position]) for position in batch]
    middle = (len(batch) + 1) // 2
    saved = {cut: (len(batch) - cut) * (sizes[0] - sizes[cut]) for cut in range(1, len(batch))}
    cut = max(saved, key=lambda place: (saved[place], -abs(place - middle)))
    return saved[cut], cut
