"""Shares of sources in large batches: exact in every round, streams without gaps, a step from the step alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_ds.batching.weighted_mixture import WeightedSampler, checked_weights, counts_by_weight
from colm_ds.errors import ConfigError, SelectionError

WEIGHTS = st.lists(st.floats(0.1, 50.0), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 500))
def test_counts_add_up_and_are_within_one_of_the_share(weights: list[float], total: int) -> None:
    counts = counts_by_weight(weights, total)
    assert sum(counts) == total
    exact = np.array(weights) / sum(weights) * total
    assert np.all(np.abs(np.array(counts) - exact) < 1 + 1e-9)


class Shared(WeightedSampler):
    """A sampler that another thread asks for another round as soon as this one's is stored."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_last" and value is not None:
            value = value[0] + 1, np.zeros_like(value[1]), np.zeros_like(value[2])
        super().__setattr__(name, value)


def test_threads_may_share_it() -> None:
    arguments: tuple[Any, ...] = [0, 20], [20, 9], [1.0, 1.0], 4, 3
    assert Shared(*arguments).indices(1).tolist() == WeightedSampler(*arguments).indices(1).tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 9.0)), min_size=1, max_size=4), st.data())
def test_streams_are_whole_epochs_and_rounds_have_the_shares(
    facts: list[tuple[int, float]], data: st.DataObject
) -> None:
    sizes, weights = [size for size, _ in facts], [weight for _, weight in facts]
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].tolist()
    size = data.draw(st.integers(1, sum(sizes)))
    if 0 in counts_by_weight(weights, sum(sizes) // size * size):
        with pytest.raises(SelectionError, match="so that it would never be drawn"):
            WeightedSampler(starts, sizes, weights, size, seed=3)
        return
    sampler = WeightedSampler(starts, sizes, weights, size, seed=3)
    num_rounds = 4
    steps = [sampler.indices(step) for step in range(1, num_rounds * sampler.steps_per_epoch + 1)]
    drawn = np.concatenate(steps)
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    length = sampler.steps_per_epoch * size
    for number in range(num_rounds):
        seen = np.bincount(source_of[drawn[number * length : (number + 1) * length]], minlength=len(sizes))
        assert seen.tolist() == sampler.counts == counts_by_weight(weights, length)
    for source, (start, count) in enumerate(zip(starts, sizes, strict=True)):
        stream = drawn[source_of[drawn] == source] - start
        for epoch in range(len(stream) // count):
            assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
        rest = stream[len(stream) // count * count :]
        assert len(set(rest.tolist())) == len(rest)
    done = sampler.epochs(len(steps))
    seen = np.bincount(source_of[drawn], minlength=len(sizes))
    assert done == pytest.approx([float(n) / count for n, count in zip(seen, sizes, strict=True)])


def test_a_step_follows_from_the_step_alone() -> None:
    one, other = (WeightedSampler([0, 10], [10, 90], [1.0, 1.0], 8, seed=1) for _ in range(2))
    expected = {step: one.indices(step).tolist() for step in range(1, 40)}
    for step in (39, 2, 17, 1, 30):
        assert other.indices(step).tolist() == expected[step]
    assert WeightedSampler([0, 10], [10, 90], [1.0, 1.0], 8, seed=2).indices(1).tolist() != expected[1]


def test_epochs_of_a_source_have_new_orders() -> None:
    sampler = WeightedSampler([0, 8], [8, 92], [1.0, 1.0], 10, seed=0)
    drawn = np.concatenate([sampler.indices(step) for step in range(1, 11)])
    small = drawn[drawn < 8]
    assert len(small) == 50
    assert small[:8].tolist() != small[8:16].tolist()
    assert set(Counter(small[:48].tolist()).values()) == {6}


def test_wrong_arguments_say_what_is_wrong() -> None:
    with pytest.raises(SelectionError, match="large_batch_size = 9"):
        WeightedSampler([0], [8], [1.0], 9, seed=0)
    with pytest.raises(SelectionError, match=r"weight 1 of source 1 is 0\.0033 of all: less than one of the 104"):
        WeightedSampler([0, 100], [100, 4], [300.0, 1.0], 8, seed=0)
    with pytest.raises(ConfigError, match="no source 'c'"):
        checked_weights({"c": 1.0}, ["a", "b"])
    with pytest.raises(ConfigError, match="must be above 0"):
        checked_weights({"a": 0.0}, ["a", "b"])
    assert list(checked_weights({"b": 2, "a": 1}, ["a", "b"])) == ["a", "b"]
