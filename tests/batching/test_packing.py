"""Rows of several examples: first fit beside the fewest rows possible, and what a packed micro-batch holds."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from colm_ds.batching.assign import micro_batches
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.batching.packing import pack_first_fit, pack_micro_batch, pack_micro_batches
from colm_ds.errors import ConfigError
from colm_ds.types import Example
from tests.choices import random_choices
from tests.probe.oracles import make_examples


def random_lengths(seed: int, count: int, longest: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest + 1, (count,), generator=generator).tolist()


def fewest_rows(lengths: list[int], row_tokens: int) -> int:
    """By trying every place for every example."""
    best = len(lengths)

    def place(number: int, free: tuple[int, ...]) -> None:
        nonlocal best
        if len(free) >= best:
            return
        if number == len(lengths):
            best = len(free)
            return
        for row in range(len(free)):
            if lengths[number] <= free[row]:
                place(number + 1, (*free[:row], free[row] - lengths[number], *free[row + 1 :]))
        place(number + 1, (*free, row_tokens - lengths[number]))

    place(0, ())
    return best


@pytest.mark.parametrize("seed", range(20))
def test_few_rows_and_none_too_long(seed: int) -> None:
    lengths = random_lengths(seed, 9, 20)
    rows = pack_first_fit(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(9))
    fills = [sum(lengths[index] for index in row) for row in rows]
    assert max(fills) <= 20
    assert len(rows) <= 11 / 9 * fewest_rows(lengths, 20) + 6 / 9  # Dosa 2007
    for place, row in enumerate(rows):  # in the first row with room when it came
        for index in row:
            for earlier in rows[:place]:
                before = [other for other in earlier if (-lengths[other], other) < (-lengths[index], index)]
                assert sum(lengths[other] for other in before) + lengths[index] > 20


def test_too_long_for_a_row() -> None:
    assert pack_first_fit([3, 30, 7, 31], 10) == [[3], [1], [2, 0]]
    assert pack_first_fit([], 10) == []
    with pytest.raises(ConfigError, match="row_tokens = 0: must be at least 1"):
        pack_first_fit([1], 0)


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, None), (3, None), (50, 40), (2, 7)])
@pytest.mark.parametrize("seed", range(4))
def test_micro_batches_of_rows(seed: int, max_rows: int, max_tokens: int | None) -> None:
    lengths = torch.tensor(random_lengths(seed, 23, 12))
    by_rank = [list(range(0, 13)), [], list(range(13, 23))]
    plans = pack_micro_batches(by_rank, lengths, 16, max_rows=max_rows, max_tokens=max_tokens)
    assert len({len(plan) for plan in plans}) == 1
    for mine, plan in zip(by_rank, plans, strict=True):
        assert sorted(position for micro in plan for row in micro for position in row) == mine
        for micro in plan:
            assert len(micro) <= max_rows
            fills = [int(lengths[row].sum()) for row in micro]
            assert all(
                fill <= min(16, max_tokens or 16) or len(row) == 1 for row, fill in zip(micro, fills, strict=True)
            )
            assert max_tokens is None or len(micro) <= 1 or len(micro) * max(fills) <= max_tokens
    unpacked = micro_batches(by_rank, lengths, max_examples=max_rows, max_tokens=max_tokens)
    assert len(plans[0]) <= len(unpacked[0])


def test_documents_of_a_packed_batch() -> None:
    """Every document is there whole, with its own positions and labels; padding is one more document."""
    examples = [
        *make_examples((7,)),
        Example(torch.tensor([4]), torch.tensor([4]), 0, 1),
        *make_examples((9, 5, 6), seed=1),
    ]
    batch = make_micro_batch(examples)
    packed = pack_micro_batch(batch, [3, 2])
    assert packed.input_ids.shape == (2, 17)
    assert packed.lengths == (17, 11)
    assert packed.position_ids is not None
    assert packed.position_ids[1, 11:].tolist() == list(range(6))
    places = [(0, 0), (0, 7), (0, 8), (1, 0), (1, 5)]
    for example, (row, start) in zip(examples, places, strict=True):
        where = slice(start, start + len(example.input_ids))
        assert packed.input_ids[row, where].tolist() == example.input_ids.tolist()
        assert packed.position_ids[row, where].tolist() == list(range(len(example.input_ids)))
    wanted = [
        (number, row, start + at, int(example.labels[at + 1]))
        for number, (example, (row, start)) in enumerate(zip(examples, places, strict=True))
        for at in range(len(example.labels) - 1)
        if example.labels[at + 1] != -100
    ]
    found = zip(*(one.tolist() for one in (packed.owners, packed.rows, packed.positions, packed.targets)), strict=True)
    assert list(found) == wanted
    assert torch.equal(packed.counts, batch.counts)


def test_candidates_of_a_packed_batch() -> None:
    """The sequences of an example follow each other, and the length that is known of it beforehand is theirs."""
    data = random_choices(6)
    examples = [data[index] for index in range(6)]
    batch = make_micro_batch(examples)
    packed = pack_micro_batch(batch, [1, 3, 2])
    lengths = [int(data.lengths[index]) for index in range(6)]
    assert packed.lengths == (lengths[0], sum(lengths[1:4]), sum(lengths[4:]))
    assert packed.position_ids is not None
    assert packed.groups is not None
    assert batch.groups is not None
    for each in range(len(batch.rows)):
        row, position = int(batch.rows[each]), int(batch.positions[each])
        new_row, new_position = int(packed.rows[each]), int(packed.positions[each])
        assert packed.position_ids[new_row, new_position] == position
        whole = packed.input_ids[new_row, new_position - position : new_position + 1]
        assert torch.equal(whole, batch.input_ids[row, : position + 1])
    assert set(zip(*packed.groups.distinct.tolist(), strict=True)) == set(
        zip(packed.rows.tolist(), packed.positions.tolist(), strict=True)
    )
    starts = [(packed.position_ids[row] == 0).nonzero().flatten().tolist() for row in range(3)]
    for row, fill in enumerate(packed.lengths):
        ends = [start for start in starts[row] if start < fill] + [fill]
        assert sorted(stop - start for start, stop in pairwise(ends)) == sorted(
            length
            for length, owner in zip(batch.lengths, batch.groups.owners, strict=True)
            if owner in ([0], [1, 2, 3], [4, 5])[row]
        )


def test_first_fit_is_that_of_a_plain_loop() -> None:
    for seed in range(200):
        generator = random.Random(seed)
        row_tokens = generator.randrange(1, 80)
        lengths = [generator.randrange(0, 70) for _ in range(generator.randrange(0, 60))]
        rows: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
            fits = (row for row in rows if sum(lengths[one] for one in row) + lengths[index] <= row_tokens)
            row = next(fits, None)
            if row is None:
                rows.append([index])
            else:
                row.append(index)
        assert pack_first_fit(lengths, row_tokens) == rows
