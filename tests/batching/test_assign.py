"""Which rank holds and trains what, and in which micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_ds.batching.assign import (
    IMBALANCE,
    Batches,
    equal_ranks,
    equal_slots,
    home_ranks,
    micro_batches,
    training_ranks,
)
from colm_ds.randomness import private_generator

lengths_of_examples = st.lists(st.integers(1, 60), min_size=1, max_size=40)
worlds = st.integers(1, 5)


def loads(rank_of: dict[int, int], lengths: Tensor, world_size: int) -> list[int]:
    """Tokens of every rank."""
    return [sum(int(lengths[p]) for p, rank in rank_of.items() if rank == wanted) for wanted in range(world_size)]


# --- home ---


@given(lengths_of_examples, worlds)
@settings(deadline=None)
def test_homes_are_even(lengths: list[int], world_size: int) -> None:
    home = home_ranks(torch.tensor(lengths), world_size)
    counts = torch.bincount(home, minlength=world_size).tolist()
    assert len(counts) == world_size
    assert max(counts) - min(counts) <= 1
    tokens = loads(dict(enumerate(home.tolist())), torch.tensor(lengths), world_size)
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.data(), lengths_of_examples, worlds)
@settings(deadline=None)
def test_homes_are_even_in_what_is_probed(data: st.DataObject, lengths: list[int], world_size: int) -> None:
    probed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    sizes = torch.tensor(lengths)
    home = home_ranks(sizes, world_size, probed)
    for members, bound in ((probed, max(lengths)), (torch.ones_like(probed), 3 * max(lengths))):
        counts = torch.bincount(home[members], minlength=world_size)
        assert int(counts.max() - counts.min()) <= 1
        tokens = torch.zeros(world_size, dtype=torch.int64).index_add(0, home[members], sizes[members])
        assert int(tokens.max() - tokens.min()) <= bound


def test_homes_of_many_examples_are_nearly_equal_in_tokens() -> None:
    lengths = torch.randint(10, 500, (128,), generator=private_generator(0, "lengths"))
    tokens = loads(dict(enumerate(home_ranks(lengths, 4).tolist())), lengths, 4)
    assert max(tokens) <= 1.01 * min(tokens)
    assert home_ranks(lengths, 1).tolist() == [0] * 128


# --- training ---


@given(st.data(), lengths_of_examples, worlds)
@settings(deadline=None)
def test_training_ranks_balance(data: st.DataObject, lengths: list[int], world_size: int) -> None:
    sizes = torch.tensor(lengths)
    home = home_ranks(sizes, world_size)
    count = data.draw(st.integers(1, len(lengths)))
    positions = data.draw(st.permutations(range(len(lengths))))[:count]
    ranks = training_ranks(positions, sizes, home, world_size)
    assert sorted(ranks) == sorted(positions)
    assert set(ranks.values()) <= set(range(world_size))
    at_home = loads({position: int(home[position]) for position in positions}, sizes, world_size)
    trained = loads(ranks, sizes, world_size)
    assert max(trained) - min(trained) <= max(at_home) - min(at_home)
    slack = IMBALANCE * sum(trained) / world_size
    longest, least = trained.index(max(trained)), min(trained)
    gap = max(trained) - least
    # Either even enough, or no example of the most loaded rank is short enough to help.
    assert (gap <= slack and least > 0) or all(lengths[p] >= gap for p, rank in ranks.items() if rank == longest)
    assert training_ranks(sorted(positions), sizes, home, world_size) == ranks


def test_training_ranks_move_little() -> None:
    """Of 64 examples chosen from 128 at random, a few move; the ranks' tokens end within 5 % of a rank's mean."""
    moved, before, after = [], [], []
    for seed in range(20):
        generator = private_generator(seed, "chosen")
        lengths = torch.randint(10, 500, (128,), generator=generator)
        home = home_ranks(lengths, 4)
        positions = torch.randperm(128, generator=generator)[:64].tolist()
        ranks = training_ranks(positions, lengths, home, 4)
        mean = int(lengths[positions].sum()) / 4
        moved.append(sum(rank != int(home[position]) for position, rank in ranks.items()))
        at_home = loads({position: int(home[position]) for position in positions}, lengths, 4)
        before.append((max(at_home) - min(at_home)) / mean)
        after.append((max(loads(ranks, lengths, 4)) - min(loads(ranks, lengths, 4))) / mean)
    assert max(after) <= IMBALANCE
    assert sum(before) / 20 > 0.3
    assert sum(moved) / 20 <= 8


def test_balanced_examples_stay_home() -> None:
    lengths, home = torch.full((8,), 10), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    assert training_ranks([0, 1, 4, 5], lengths, home, 2) == {0: 0, 1: 1, 4: 0, 5: 1}
    assert training_ranks([5, 3], lengths, torch.zeros(8, dtype=torch.int64), 1) == {5: 0, 3: 0}


def test_every_rank_gets_an_example_where_it_can() -> None:
    lengths, home = torch.tensor([7, 7, 7, 90]), torch.tensor([0, 0, 0, 1])
    assert sorted(training_ranks([0, 1, 2], lengths, home, 3).values()) == [0, 1, 2]
    assert training_ranks([3, 0], lengths, home, 2) == {0: 0, 3: 1}


# --- micro-batches ---


def flat(batches: Batches) -> list[int]:
    """All positions, in their order."""
    return [position for batch in batches for position in batch]


@given(st.data(), lengths_of_examples, worlds, st.integers(1, 9), st.none() | st.integers(1, 200), st.booleans())
@settings(deadline=None)
def test_micro_batches_hold_every_position_once(
    data: st.DataObject,
    lengths: list[int],
    world_size: int,
    max_examples: int,
    max_tokens: int | None,
    equal_counts: bool,
) -> None:
    rank_of = data.draw(st.lists(st.integers(0, world_size - 1), min_size=len(lengths), max_size=len(lengths)))
    by_rank = [[p for p, rank in enumerate(rank_of) if rank == wanted] for wanted in range(world_size)]
    plans = micro_batches(
        by_rank,
        torch.tensor(lengths),
        max_examples=max_examples,
        max_tokens=max_tokens,
        equal_counts=equal_counts,
    )
    assert [sorted(flat(batches)) for batches in plans] == by_rank
    unequal = micro_batches(
        by_rank, torch.tensor(lengths), max_examples=max_examples, max_tokens=max_tokens, equal_counts=False
    )
    most = max(map(len, unequal))
    for batches, plain in zip(plans, unequal, strict=True):
        assert len(batches) == (most if equal_counts else len(plain))
        for batch in batches:
            assert len(batch) <= max_examples
            area = len(batch) * max((lengths[position] for position in batch), default=0)
            assert max_tokens is None or len(batch) <= 1 or area <= max_tokens
        in_order = [lengths[position] for position in flat(batches)]
        assert in_order == sorted(in_order, reverse=True)  # the first shows the peak
        if [] in batches:  # a place holder only where there is nothing to split
            assert all(len(batch) <= 1 for batch in batches)
            assert batches.index([]) == len(flat(batches))


@pytest.mark.parametrize(
    ("by_rank", "wanted"),
    [
        ([[0, 1, 2, 3], [4]], [[[0, 1], [2, 3]], [[4], []]]),
        ([[0, 1, 2, 3], [4, 5]], [[[0, 1], [2, 3]], [[4], [5]]]),
        ([[0, 1, 2], []], [[[0], [1, 2]], [[], []]]),
        ([[], []], [[], []]),
    ],
)
def test_micro_batches_of_two(by_rank: list[list[int]], wanted: list[Batches]) -> None:
    lengths = torch.tensor([9, 8, 7, 6, 5, 4])
    assert micro_batches(by_rank, lengths, max_examples=2) == wanted


def can_be_placed(stayed: list[int], moved: list[int], home_slots: int, slots: int, size: int) -> bool:
    """Whether some way to fill the slots exists, tried one by one: the first ones take only examples that stayed."""
    for here, arrived in zip(stayed, moved, strict=True):
        in_first = [number for number in range(here + 1) if number <= home_slots * size]
        if not any(here - number + arrived <= (slots - home_slots) * size for number in in_first):
            return False
    return True


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_equal_slots(data: st.DataObject, world_size: int, slots: int, size: int) -> None:
    counts = [data.draw(st.integers(0, slots * size)) for _ in range(world_size)]
    stay = [data.draw(st.integers(0, count)) for count in counts]
    by_rank, home, number = [], [], 0
    for rank, (count, here) in enumerate(zip(counts, stay, strict=True)):
        by_rank.append(list(range(number, number + count)))
        home += [rank] * here + [(rank + 1) % 7 + 10] * (count - here)
        number += count
    lengths = torch.tensor([3 + 5 * place % 11 for place in range(number)], dtype=torch.int64)
    plans, num_home = equal_slots(by_rank, torch.tensor(home), lengths, num_slots=slots, max_examples=size)
    moved = [count - here for count, here in zip(counts, stay, strict=True)]
    assert num_home == max(k for k in range(slots + 1) if can_be_placed(stay, moved, k, slots, size))
    for rank, plan in enumerate(plans):
        assert len(plan) == slots
        assert all(len(micro) <= size for micro in plan)
        assert sorted(position for micro in plan for position in micro) == by_rank[rank]
        assert all(home[position] == rank for micro in plan[:num_home] for position in micro)
        for micro in plan:
            assert [int(lengths[p]) for p in micro] == sorted((int(lengths[p]) for p in micro), reverse=True)


@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_equal_ranks(data: st.DataObject, number: int, world_size: int) -> None:
    home = torch.tensor([data.draw(st.integers(0, world_size - 1)) for _ in range(number)])
    ranks = equal_ranks(list(range(number)), torch.arange(number), home, world_size)
    counts = [list(ranks.values()).count(rank) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1
    held = [int((home == rank).sum()) for rank in range(world_size)]
    fewest = sum(max(0, count - -(-number // world_size)) for count in held)
    assert fewest <= sum(ranks[place] != int(home[place]) for place in range(number)) <= fewest + world_size - 1
