"""Weights of medoids against scipy's non-negative least squares and the optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.weights import MAX_WEIGHT, RIDGE, cluster_weights, matched_weights, mean_one
from tests.selection import oracles
from tests.selection.oracles import property_test, randn


def check_optimal(picks: Tensor, target: Tensor, weights: Tensor, sizes: Tensor | None = None) -> None:
    """The Karush-Kuhn-Tucker conditions of the bounded problem, which only its one solution meets."""
    w, k = weights.double().numpy(), len(picks)
    parts = np.ones(k) if sizes is None else sizes.double().numpy()
    beyond = (picks.double().numpy() - parts[:, None] * target.double().numpy()) / k
    gram = beyond @ beyond.T
    slope = (gram / (RIDGE * gram.diagonal().mean()) + np.eye(k)) @ w - 1.0
    scale = max(1.0, float(np.abs(slope).max()))
    at_zero, at_most = w < 1e-6, w > MAX_WEIGHT - 1e-5
    inside = ~at_zero & ~at_most
    assert w.min() >= 0.0
    assert w.max() <= MAX_WEIGHT * (1 + 1e-6)
    assert w.mean() == pytest.approx(1.0, abs=1e-6)
    level = slope[inside].mean() if inside.any() else (slope[at_most].max() + slope[at_zero].min()) / 2
    assert (np.abs(slope[inside] - level) < 1e-5 * scale).all()
    assert (slope[at_zero] > level - 1e-5 * scale).all()
    assert (slope[at_most] < level + 1e-5 * scale).all()


@given(
    n=st.integers(3, 40),
    share=st.floats(0.05, 1.0),
    width=st.integers(1, 40),
    offset=st.floats(0.0, 2.0),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 12),
    with_sizes=st.booleans(),
)
@settings(property_test, max_examples=150)
def test_matched_is_the_bounded_least_squares_solution(
    n: int, share: float, width: int, offset: float, seed: int, exponent: int, with_sizes: bool
) -> None:
    pool = (randn(n, width, seed=seed) + offset) * 10.0**exponent
    sizes = 1.0 + torch.arange(n) % 5 if with_sizes else None
    k = max(3, int(share * n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]
    target = pool.mean(dim=0) if sizes is None else pool.sum(dim=0) / sizes.sum()
    picks, parts = pool[order], None if sizes is None else sizes[order]
    weights = matched_weights(picks, target, parts)
    assert weights.dtype == torch.float32
    check_optimal(picks, target, weights, parts)


@pytest.mark.parametrize("k", [3, 8, 20])
@pytest.mark.parametrize("seed", range(4))
def test_matched_against_a_general_solver(k: int, seed: int) -> None:
    picks, target = randn(k, 6, seed=seed), 0.3 * randn(6, seed=seed + 100)
    sizes = 1.0 + torch.arange(k) % 3
    for parts in (None, sizes):
        wanted = oracles.matched(picks.numpy(), target.numpy(), None if parts is None else parts.numpy())
        np.testing.assert_allclose(matched_weights(picks, target, parts).numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize("seed", range(8))
def test_matched_with_many_weights_at_both_bounds(seed: int) -> None:
    """One group of picks is far from the mean and few are near: most weights go to a bound, in many exchanges."""
    picks = torch.cat([randn(56, 6, seed=seed) + 10.0, 0.1 * randn(8, 6, seed=seed + 50)])
    weights = matched_weights(picks, torch.zeros(6), ridge=1e-3)
    assert int((weights == 0).sum()) > 10
    assert int((weights > MAX_WEIGHT - 1e-4).sum()) > 2


def test_matched_comes_nearer_to_the_mean() -> None:
    pool = randn(64, 12, seed=3)
    picks, target = pool[:24], pool.mean(dim=0)
    weights = matched_weights(picks, target)

    def error(w: Tensor) -> float:
        return float(((w[:, None] * picks).mean(dim=0) - target).norm())

    assert error(weights) < 0.5 * error(torch.ones(24))


def test_matched_finds_weights_that_reach_the_target() -> None:
    """A pool of three groups of unequal size, one pick of each: the weights are nearly the groups' shares."""
    groups = torch.eye(3).repeat_interleave(torch.tensor([6, 3, 1]), dim=0)
    weights = matched_weights(torch.eye(3), groups.mean(dim=0), ridge=1e-6)
    np.testing.assert_allclose(weights.numpy(), [1.8, 0.9, 0.3], rtol=1e-4)


def test_few_picks_are_weighted_alike() -> None:
    assert matched_weights(randn(2, 7, seed=4), randn(7, seed=5)).tolist() == [1, 1]
    assert matched_weights(randn(1, 7, seed=4), randn(7, seed=5)).tolist() == [1]


def test_matched_without_anything_to_match() -> None:
    assert matched_weights(torch.zeros(3, 4), torch.zeros(4)).tolist() == [1, 1, 1]
    assert matched_weights(torch.zeros(3, 4), torch.ones(4)).tolist() == [1, 1, 1]
    assert matched_weights(torch.zeros(0, 4), torch.ones(4)).tolist() == []
    assert matched_weights(torch.zeros(2, 0), torch.zeros(0)).tolist() == [1, 1]


def test_matched_of_equal_signals_is_uniform() -> None:
    row = randn(1, 7, seed=4)
    np.testing.assert_allclose(matched_weights(row.expand(5, 7), row[0]).numpy(), np.ones(5), rtol=1e-6)
    np.testing.assert_allclose(matched_weights(row.expand(5, 7), -row[0]).numpy(), np.ones(5), rtol=1e-6)


def test_matched_does_not_depend_on_the_order() -> None:
    picks, target = randn(20, 5, seed=8), randn(5, seed=9)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    weights = matched_weights(picks, target)
    np.testing.assert_allclose(matched_weights(picks[order], target).numpy(), weights[order].numpy(), atol=1e-5)


@pytest.mark.parametrize("shapes", [((3, 4), (5,)), ((4,), (4,)), ((3, 4), (1, 4))])
def test_matched_errors(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(SelectionError, match="Give"):
        matched_weights(torch.ones(shapes[0]), torch.ones(shapes[1]))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30))
@property_test
def test_cluster_weights_are_in_proportion_with_mean_one(sizes: list[int]) -> None:
    weights = cluster_weights(torch.tensor(sizes))
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), np.array(sizes) / np.mean(sizes), rtol=1e-6)


def test_mean_one_at_the_edges() -> None:
    assert mean_one(torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 1]
    assert mean_one(torch.zeros(0, dtype=torch.float64)).tolist() == []
    assert mean_one(torch.tensor([2.0])).tolist() == [1]
