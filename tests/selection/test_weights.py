"""Weights of medoids against scipy's non-negative least squares and the optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.weights import RIDGE, cluster_weights, matched_weights, mean_one
from tests.selection import oracles
from tests.selection.oracles import property_test, randn


def _raw(picks: Tensor, target: Tensor, weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The weights before normalisation, which is their best multiple, and the objective's slope there."""
    w, t = weights.double().numpy(), target.double().numpy()
    scaled = picks.double().numpy() / len(picks)
    gram = scaled @ scaled.T
    penalty = RIDGE * gram.diagonal().mean()
    hessian, linear = gram + penalty * np.eye(len(w)), scaled @ t + penalty
    w = w * (w @ linear) / (w @ hessian @ w)
    return w, (hessian @ w - linear) / penalty


def _error(picks: Tensor, target: Tensor, weights: np.ndarray) -> float:
    mean = (weights[:, None] * picks.double().numpy()).mean(axis=0)
    return float(np.linalg.norm(mean - target.double().numpy()))


@given(
    n=st.integers(1, 40),
    share=st.floats(0.05, 1.0),
    width=st.integers(1, 40),
    offset=st.floats(0.0, 2.0),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 12),
)
@settings(property_test, max_examples=150)
def test_matched_is_the_normalised_least_squares_solution(
    n: int, share: float, width: int, offset: float, seed: int, exponent: int
) -> None:
    pool = (randn(n, width, seed=seed) + offset) * 10.0**exponent
    k = max(1, int(share * n))
    picks, target = pool[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]], pool.mean(dim=0)
    weights = matched_weights(picks, target)
    assert weights.dtype == torch.float32
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(weights.min()) >= 0.0
    np.testing.assert_allclose(weights.numpy(), oracles.matched(picks.numpy(), target.numpy()), rtol=1e-4, atol=1e-5)

    raw, slope = _raw(picks, target, weights)  # Karush-Kuhn-Tucker: no slope inside, none downwards at the bound
    scale = max(1.0, float(np.abs(raw).max()))
    assert (slope > -1e-4 * scale).all()
    assert (np.abs(slope[weights.numpy() > 0]) < 1e-4 * scale).all()
    assert _error(picks, target, raw) <= _error(picks, target, np.ones(k)) * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_matched_with_many_weights_at_the_bound(seed: int) -> None:
    """Targets away from the picks push most weights to zero: the pivoting has to exchange many of them."""
    picks, target = randn(64, 6, seed=seed), 10 * randn(6, seed=seed + 100)
    weights = matched_weights(picks, target)
    assert int((weights == 0).sum()) > 10
    np.testing.assert_allclose(weights.numpy(), oracles.matched(picks.numpy(), target.numpy()), rtol=1e-4, atol=1e-5)


def test_matched_finds_weights_that_reach_the_target() -> None:
    """A pool of three groups of unequal size, one pick of each: the weights are nearly the groups' shares."""
    groups = torch.eye(3).repeat_interleave(torch.tensor([6, 3, 1]), dim=0)
    weights = matched_weights(torch.eye(3), groups.mean(dim=0), ridge=1e-6)
    np.testing.assert_allclose(weights.numpy(), [1.8, 0.9, 0.3], rtol=1e-4)


def test_matched_without_anything_to_match() -> None:
    assert matched_weights(torch.zeros(3, 4), torch.zeros(4)).tolist() == [1, 1, 1]
    assert matched_weights(torch.zeros(3, 4), torch.ones(4)).tolist() == [1, 1, 1]
    assert matched_weights(torch.zeros(0, 4), torch.ones(4)).tolist() == []
    assert matched_weights(torch.zeros(2, 0), torch.zeros(0)).tolist() == [1, 1]


def test_matched_of_equal_signals_is_uniform() -> None:
    row = randn(1, 7, seed=4)
    np.testing.assert_allclose(matched_weights(row.expand(5, 7), row[0]).numpy(), np.ones(5), rtol=1e-6)
    np.testing.assert_allclose(matched_weights(row.expand(5, 7), -row[0]).numpy(), np.ones(5), rtol=1e-6)


def test_matched_of_one_pick_is_one() -> None:
    assert matched_weights(randn(1, 7, seed=4), randn(7, seed=5)).tolist() == [1]


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
