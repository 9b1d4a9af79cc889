"""Micro-batches: every example once, within the budgets, sorted by length; padding where there is nothing to learn."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

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
    if max_tokens is not None:  # no group could have taken the next example too
        for batch, following in itertools.pairwise(batches):
            full = len(batch) == max_examples or (len(batch) + 1) * lengths[batch[0]] > max_tokens
            assert full, (batch, following)


def test_balanced_sizes() -> None:
    sizes = [len(batch) for batch in length_sorted_batches(range(1, 10), max_examples=4)]
    assert sizes == [3, 3, 3]
    sizes = [len(batch) for batch in length_sorted_batches(range(1, 12), max_examples=4)]
    assert sum(sizes) == 11
    assert max(sizes) - min(sizes) <= 1
    assert [len(batch) for batch in length_sorted_batches([7] * 64, max_examples=4)] == [4] * 16


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
