"""Micro-batches: every example once, within the budgets, sorted by length; padding where there is nothing to learn."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_ds.batching.collate import MICRO_BATCH_TOKENS_ON_GPU, tokens_of_micro_batch
from colm_ds.data import length_sorted_batches, pad_batch, padding_fraction
from colm_ds.errors import ConfigError, DataError
from colm_ds.types import Example


def example(length: int, prompt: int = 1, first: int = 5) -> Example:
    ids = torch.arange(first, first + length)
    labels = ids.clone()
    labels[:prompt] = -100
    return Example(ids, labels, source=0, index=0)


@pytest.mark.parametrize(("max_examples", "max_tokens"), [(4, None), (None, 60), (4, 60), (1, None), (1000, 10_000)])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 50])
def test_budgets(max_examples: int | None, max_tokens: int | None, count: int) -> None:
    rng = random.Random(count)
    lengths = [rng.randint(1, 40) for _ in range(count)]
    batches = length_sorted_batches(lengths, max_examples=max_examples, max_tokens=max_tokens)
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(count), key=lambda index: (-lengths[index], index))
    for batch in batches:
        assert 1 <= len(batch) <= (max_examples or count)
        assert max_tokens is None or len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_tokens


def cost(lengths: list[int], batches: list[list[int]]) -> int:
    """Padded tokens and the price of every group."""
    return sum(len(batch) * max(lengths[index] for index in batch) + tokens_of_micro_batch() for batch in batches)


def test_groups_are_fewer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a group of its own has to save more padding."""
    lengths = [*range(40, 500, 15), *range(20, 180, 5)]
    here = length_sorted_batches(lengths, max_examples=32)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    there = length_sorted_batches(lengths, max_examples=32)
    assert tokens_of_micro_batch() == MICRO_BATCH_TOKENS_ON_GPU
    assert len(there) < len(here) / 2
    assert max(map(len, there)) <= 32
    assert cost(lengths, there) <= cost(lengths, here)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=9), st.integers(1, 9), st.none() | st.integers(1, 1500))
@settings(deadline=None, max_examples=150)
def test_no_grouping_is_cheaper(lengths: list[int], max_examples: int, max_tokens: int | None) -> None:
    """Brute force over all ways to cut the sorted order."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    best = None
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        groups = [[order[0]]]
        for index, cut in zip(order[1:], cuts, strict=True):
            groups.append([index]) if cut else groups[-1].append(index)
        fits = all(
            len(group) <= max_examples
            and (len(group) == 1 or max_tokens is None or len(group) * lengths[group[0]] <= max_tokens)
            for group in groups
        )
        if fits:
            best = min(cost(lengths, groups), best if best is not None else cost(lengths, groups))
    batches = length_sorted_batches(lengths, max_examples=max_examples, max_tokens=max_tokens)
    assert cost(lengths, batches) == best


def test_a_new_group_must_pay() -> None:
    assert [len(batch) for batch in length_sorted_batches([7] * 64, max_examples=4)] == [4] * 16
    assert length_sorted_batches([100, 37, 36], max_examples=3) == [[0, 1, 2]]  # apart they would save 126 tokens
    assert length_sorted_batches([102, 37, 36], max_examples=3) == [[0], [1, 2]]  # now 130


def test_ties_by_index_and_long_example_alone() -> None:
    assert length_sorted_batches([3, 5, 3, 5], max_examples=2) == [[1, 3], [0, 2]]
    assert length_sorted_batches([2, 100, 2], max_tokens=4) == [[1], [0, 2]]


@pytest.mark.parametrize("budgets", [{}, {"max_examples": 0}, {"max_tokens": -1}])
def test_budget_errors(budgets: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        length_sorted_batches([1], **budgets)


def test_pad_batch() -> None:
    batch = pad_batch([example(2), example(4, prompt=3, first=20)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 9, 9], [20, 21, 22, 23]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, -100, 23]]
    assert batch["lengths"].tolist() == [2, 4]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 9), (8, 16), (3, 9), (64, 64)])
def test_pad_to_multiple(multiple_of: int, width: int) -> None:
    batch = pad_batch([example(9), example(1)], pad_token_id=0, multiple_of=multiple_of)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)
    assert (batch["labels"][0, 9:] == -100).all()


def test_pad_errors() -> None:
    with pytest.raises(DataError, match="no examples"):
        pad_batch([], 0)
    with pytest.raises(ConfigError, match="multiple_of = 0"):
        pad_batch([example(1)], 0, multiple_of=0)


def test_padding_fraction() -> None:
    assert padding_fraction([4, 2, 3], [[0, 1], [2]]) == pytest.approx(1 - 9 / 11)
    assert padding_fraction([5, 5], [[0, 1]]) == 0
    assert padding_fraction([], []) == 0


def test_sorting_pads_less() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 500) for _ in range(128)]
    unsorted = [list(range(start, start + 4)) for start in range(0, 128, 4)]
    assert padding_fraction(lengths, length_sorted_batches(lengths, max_examples=4)) < 0.05
    assert padding_fraction(lengths, unsorted) > 0.3
