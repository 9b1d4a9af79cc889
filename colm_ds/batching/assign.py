"""Assign examples to ranks and micro-batches for probing and training; every rank gets the same answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def by_rank(positions: Iterable[int], ranks: Iterable[int], world_size: int) -> list[list[int]]:
    """Return the positions of every rank, in the order given.

    Args:
        positions: positions.
        ranks: rank of each.
        world_size: W.
    """
    held: list[list[int]] = [[] for _ in range(world_size)]
    for position, rank in zip(positions, ranks, strict=True):
        held[rank].append(position)
    return held


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
    places = sorted(positions)
    size = dict(zip(places, lengths[places].tolist(), strict=True))
    held = by_rank(places, home[places].tolist(), world_size)
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
    sizes = lengths.tolist()
    places = sorted(positions, key=lambda position: (-sizes[position], position))
    held = by_rank(places, home[places].tolist(), world_size)
    while True:
        counts = [len(mine) for mine in held]
        most, least = counts.index(max(counts)), counts.index(min(counts))
        if counts[most] - counts[least] <= 1:
            return {position: rank for rank, mine in enumerate(held) for position in mine}
        held[least].append(held[most].pop())


def equal_slots(
    held: Sequence[Sequence[int]], home: Tensor, lengths: Tensor, *, num_slots: int, max_examples: int
) -> tuple[list[Batches], int]:
    """Cut every rank's examples into the same number of micro-batches; the first of them hold what never moved.

    An example can be replayed only where it was probed, and under ZeRO-3 all ranks must replay the same micro-batches.
    So the number of replayed ones is the largest with which every rank's examples fit, at most `max_examples` in each.

    Args:
        held: positions of each rank, at most `num_slots * max_examples`.
        home: rank that holds every example, `[r]`.
        lengths: tokens of every example, `[r]`.
        num_slots: micro-batches of each rank.
        max_examples: maximum examples of a micro-batch.

    Returns:
        For every rank its micro-batches, each with the longest example first, some empty; and how many of the first
        ones have no example away from its home.
    """

    def longest_first(positions: Sequence[int]) -> list[int]:
        return sorted(positions, key=lambda position: (-sizes[position], position))

    sizes, homes = lengths.tolist(), home.tolist()
    stayed = [longest_first([p for p in mine if homes[p] == rank]) for rank, mine in enumerate(held)]
    moved = [[p for p in mine if homes[p] != rank] for rank, mine in enumerate(held)]

    def fits(num_home: int) -> bool:
        room, rest = num_home * max_examples, (num_slots - num_home) * max_examples
        return all(len(s) - min(len(s), room) + len(m) <= rest for s, m in zip(stayed, moved, strict=True))

    num_home = next(number for number in range(num_slots, -1, -1) if fits(number))
    plans = []
    for here, arrived in zip(stayed, moved, strict=True):
        first, rest = here[: num_home * max_examples], longest_first([*here[num_home * max_examples :], *arrived])
        plans.append(_slots(first, num_home, max_examples) + _slots(rest, num_slots - num_home, max_examples))
    return plans, num_home


def _slots(positions: Sequence[int], number: int, size: int) -> Batches:
    return [list(positions[start : start + size]) for start in range(0, number * size, size)]


def micro_batches(
    held: Sequence[Sequence[int]],
    lengths: Tensor,
    *,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    equal_counts: bool = True,
) -> list[Batches]:
    """Cut every rank's examples into micro-batches, longest first, with little padding (`length_sorted_batches`).

    Args:
        held: positions of each rank.
        lengths: tokens of every example, `[r]`.
        max_examples: maximum examples per micro-batch.
        max_tokens: maximum padded tokens per micro-batch.
        equal_counts: give every rank the same number, first by splitting some, then by adding empty ones.

    Returns:
        For every rank its micro-batches.
    """
    shared, sizes = [], lengths.tolist()
    for mine in held:
        own = [sizes[position] for position in mine]
        groups = length_sorted_batches(own, max_examples=max_examples, max_tokens=max_tokens)
        shared.append([[mine[index] for index in group] for group in groups])
    if not equal_counts:
        return shared
    count = max(len(batches) for batches in shared)
    return [_split_to(batches, count, sizes) for batches in shared]


def _split_to(batches: Batches, count: int, lengths: Sequence[int]) -> Batches:
    """Cut micro-batches in two where that saves the most padding until there are `count`, then add empty ones."""
    batches = list(batches)
    while len(batches) < count:
        cuts = [(*_best_cut(batch, lengths), number) for number, batch in enumerate(batches) if len(batch) > 1]
        if not cuts:
            break
        _, cut, number = max(cuts, key=lambda cut: (cut[0], -cut[2]))
        batches[number : number + 1] = [batches[number][:cut], batches[number][cut:]]
    return batches + [[] for _ in range(count - len(batches))]


def _best_cut(batch: list[int], lengths: Sequence[int]) -> tuple[int, int]:
    """Return the padded tokens saved by the best cut of a micro-batch sorted by length, and where, middle on ties."""
    sizes = [lengths[position] for position in batch]
    middle = (len(batch) + 1) // 2
    saved = {cut: (len(batch) - cut) * (sizes[0] - sizes[cut]) for cut in range(1, len(batch))}
    cut = max(saved, key=lambda place: (saved[place], -abs(place - middle)))
    return saved[cut], cut
