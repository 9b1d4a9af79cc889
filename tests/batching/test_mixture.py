"""Large batches: from (seed, step) alone, without repeats, each example once an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from colm_ds.batching.mixture import seeded_permutation
from colm_ds.data import MixtureSampler
from colm_ds.errors import SelectionError


@pytest.mark.parametrize(("num_examples", "size"), [(10, 3), (12, 4), (5, 5), (7, 1), (1, 1), (1000, 999)])
def test_epochs(num_examples: int, size: int) -> None:
    sampler = MixtureSampler(num_examples, size, seed=3)
    per_epoch = num_examples // size
    assert sampler.steps_per_epoch == per_epoch
    for epoch in range(3):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        assert [sampler.epoch(step) for step in steps] == [epoch] * per_epoch
        seen = np.concatenate([sampler.indices(step) for step in steps])
        assert seen.dtype == np.int64
        assert len(set(seen.tolist())) == len(seen) == per_epoch * size
        assert seen.min() >= 0
        assert seen.max() < num_examples


def test_stateless() -> None:
    sampler = MixtureSampler(50, 8, seed=1)
    forward = [sampler.indices(step).tolist() for step in range(1, 20)]
    assert [sampler.indices(step).tolist() for step in range(19, 0, -1)] == forward[::-1]
    assert [MixtureSampler(50, 8, seed=1).indices(step).tolist() for step in range(1, 20)] == forward
    assert forward[0] != forward[6]  # the first of the next epoch
    assert MixtureSampler(50, 8, seed=2).indices(1).tolist() != forward[0]


class Shared(MixtureSampler):
    """A sampler that another thread asks for another epoch as soon as this one's is stored."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_last" and value is not None:
            value = value[0] + 1, np.zeros_like(value[1])
        super().__setattr__(name, value)


def test_threads_may_share_it() -> None:
    assert Shared(50, 8, seed=1).indices(1).tolist() == MixtureSampler(50, 8, seed=1).indices(1).tolist()


def test_the_callers_copy() -> None:
    sampler = MixtureSampler(50, 8, seed=1)
    before = sampler.indices(1).copy()
    sampler.indices(1)[:] = 0
    assert sampler.indices(1).tolist() == before.tolist()


def test_same_on_every_machine() -> None:
    """Pinned: a resumed run must find the same examples after an update of numpy."""
    assert MixtureSampler(20, 6, seed=0).indices(1).tolist() == [12, 9, 4, 19, 0, 6]
    assert seeded_permutation(6, 7, "mixture", 1).tolist() == [5, 2, 0, 3, 1, 4]


def test_global_generators_untouched() -> None:
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    MixtureSampler(50, 8, seed=1).indices(9)
    assert (np.random.get_state()[1] == before[0]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), seeded_permutation(4, 0, "mixture", epoch)] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 0.03  # 4.4 standard errors


def test_mixture_is_natural() -> None:
    sampler = MixtureSampler(1000, 100, seed=0)
    share = np.mean([(sampler.indices(step) < 300).mean() for step in range(1, 11)])
    assert share == pytest.approx(0.3)


def test_errors() -> None:
    with pytest.raises(SelectionError, match="large_batch_size = 128: more than the 100 examples"):
        MixtureSampler(100, 128)
    with pytest.raises(SelectionError, match="large_batch_size = 0"):
        MixtureSampler(100, 0)
    for step in (0, -1):
        with pytest.raises(SelectionError, match=f"step = {step}: steps count from 1"):
            MixtureSampler(100, 10).indices(step)
