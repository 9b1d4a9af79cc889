"""Distances and greedy medoids against loops, brute force and a dynamic programme."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.facility_location import METRICS, Medoids, facility_location, pairwise_similarity
from tests.selection import oracles
from tests.selection.oracles import property_test, randn

MODULE = importlib.import_module("colm_ds.selection.facility_location")  # the package has a function of that name

FEATURES = hnp.arrays(np.float32, st.tuples(st.integers(1, 14), st.integers(1, 4)), elements=st.integers(-3, 3))
"""Few different integers: many exact ties, no round-off."""


def check_medoids(medoids: Medoids, similarity: np.ndarray, k: int) -> None:
    """Everything that must hold of medoids whatever the ties."""
    n = len(similarity)
    picks = medoids.indices.tolist()
    scale = max(1.0, n * float(np.abs(similarity).max(initial=0.0)))
    assert len(set(picks)) == len(picks) == len(medoids.gains) == len(medoids.cluster_sizes) == k
    assert all(0 <= pick < n for pick in picks)
    assert medoids.objective == pytest.approx(oracles.objective(similarity, picks), abs=1e-9 * scale)
    assert float(medoids.gains.sum()) == pytest.approx(medoids.objective, abs=1e-9 * scale)
    assert (medoids.gains[2:] <= medoids.gains[1:-1] + 1e-9 * scale).all()
    assert (medoids.gains[1:] >= -1e-9 * scale).all()
    if k:
        assert int(medoids.cluster_sizes.sum()) == n
        assert int(medoids.cluster_sizes.min()) >= 1


# pairwise_similarity


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (17, 3), (30, 33), (8, 300)])
def test_similarity_is_what_loops_give(metric: str, shape: tuple[int, int]) -> None:
    features = randn(*shape, seed=shape[0])
    similarity = pairwise_similarity(features, metric)
    assert similarity.dtype == torch.float64
    np.testing.assert_allclose(similarity.numpy(), oracles.similarity(features.numpy(), metric), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(similarity.numpy(), similarity.T.numpy(), rtol=0, atol=1e-15)
    if metric != "cosine":
        assert torch.equal(similarity, similarity.T)
        assert float(similarity.min()) == 0.0
        assert (similarity.diagonal() == similarity.max()).all()


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_of_other_dtypes(metric: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        features = randn(9, 6, seed=1).to(dtype)
        expected = oracles.similarity(features.double().numpy(), metric)
        np.testing.assert_allclose(pairwise_similarity(features, metric).numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_read_in_parts(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = randn(7, 50, seed=2)
    whole = pairwise_similarity(features, metric)
    monkeypatch.setattr(MODULE, "_ELEMENTS_AT_ONCE", 7 * 8 + 3)
    np.testing.assert_allclose(pairwise_similarity(features, metric).numpy(), whole.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_of_rows_of_zeros(metric: str) -> None:
    features = torch.cat([torch.zeros(2, 4), randn(3, 4, seed=3)])
    similarity = pairwise_similarity(features, metric)
    np.testing.assert_allclose(similarity.numpy(), oracles.similarity(features.numpy(), metric), atol=1e-12)
    if metric == "cosine":
        assert (similarity[:2] == 0).all()
    assert torch.isfinite(pairwise_similarity(torch.zeros(3, 2), metric)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_at_the_edges(metric: str) -> None:
    assert pairwise_similarity(torch.zeros(0, 4), metric).shape == (0, 0)
    assert pairwise_similarity(torch.zeros(3, 0), metric).tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_similarity_of_tiny_and_huge_features(metric: str, scale: float) -> None:
    """Squares of these leave the range of float32."""
    features = randn(6, 5, seed=4)
    scaled = pairwise_similarity(features * scale, metric) / (1.0 if metric == "cosine" else scale)
    np.testing.assert_allclose(scaled.numpy(), pairwise_similarity(features, metric).numpy(), rtol=1e-5, atol=1e-6)


def test_euclidean_keeps_small_distances() -> None:
    """|a|^2 + |b|^2 - 2 a.b in float32 would lose a distance of 1e-3 beside a length of 1e3."""
    features = torch.tensor([[1000.0, 0.0], [1000.0, 0.001], [1000.0, 1.0]])
    similarity = pairwise_similarity(features, "euclidean")
    assert float(similarity.max() - similarity[0, 1]) == pytest.approx(0.001, rel=1e-5)


def test_similarity_errors() -> None:
    with pytest.raises(SelectionError, match=r"shape \(3,\)"):
        pairwise_similarity(torch.zeros(3))
    with pytest.raises(SelectionError, match="unknown metric 'l2'"):
        pairwise_similarity(torch.zeros(3, 2), "l2")


# facility_location


@given(FEATURES, st.sampled_from(["l1", "euclidean", "cosine"]), st.data())
@property_test
def test_greedy_trace_with_ties(features: np.ndarray, metric: str, data: st.DataObject) -> None:
    """Picks, gains and clusters are those of the plain greedy, ties to the lowest index."""
    k = data.draw(st.integers(0, len(features)))
    similarity = oracles.similarity(features, metric)
    picks, gains = oracles.greedy(similarity, k)
    medoids = facility_location(pairwise_similarity(torch.from_numpy(features), metric), k)
    check_medoids(medoids, similarity, k)
    assert medoids.indices.tolist() == picks
    np.testing.assert_allclose(medoids.gains.numpy(), gains, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_trace_of_random_examples(metric: str, seed: int) -> None:
    features = randn(40, (1, 2, 7, 60)[seed], seed=seed)
    similarity = oracles.similarity(features.numpy(), metric)
    picks, gains = oracles.greedy(similarity, 40)
    medoids = facility_location(pairwise_similarity(features, metric), 40)
    check_medoids(medoids, similarity, 40)
    assert medoids.indices.tolist() == picks
    np.testing.assert_allclose(medoids.gains.numpy(), gains, atol=1e-9 * 40 * np.abs(similarity).max())
    for k in (1, 2, 13, 39):  # the greedy of fewer picks is the beginning of the greedy of more
        part = facility_location(pairwise_similarity(features, metric), k)
        assert part.indices.tolist() == picks[:k]
        assert part.cluster_sizes.tolist() == oracles.cluster_sizes(similarity, picks[:k])


@given(st.integers(0, 10**6), st.integers(1, 10), st.data())
@settings(property_test, max_examples=40)
def test_greedy_keeps_its_promise(seed: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    similarity = pairwise_similarity(randn(n, 2, seed=seed))
    best = oracles.best_objective(similarity.numpy(), k)
    objective = facility_location(similarity, k).objective
    assert objective >= (1 - (1 - 1 / k) ** k) * best - 1e-9
    assert objective <= best + 1e-9
    if k in (1, n):
        assert objective == pytest.approx(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_similarity_matrix(dtype: torch.dtype) -> None:
    """Not symmetric, with negative values, in parts."""
    similarity = randn(25, 25, seed=5).to(dtype)
    picks, gains = oracles.greedy(similarity.double().numpy(), 25)
    medoids = facility_location(similarity, 25)
    assert medoids.indices.tolist() == picks
    np.testing.assert_allclose(medoids.gains.numpy(), gains, atol=1e-6)


def test_gains_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = pairwise_similarity(randn(31, 3, seed=6))
    whole = facility_location(similarity, 20)
    monkeypatch.setattr(MODULE, "_ELEMENTS_AT_ONCE", 70)
    part = facility_location(similarity, 20)
    assert part.indices.tolist() == whole.indices.tolist()
    assert part.cluster_sizes.tolist() == whole.cluster_sizes.tolist()
    np.testing.assert_allclose(part.gains.numpy(), whole.gains.numpy(), rtol=1e-9)


def test_similarity_is_not_changed() -> None:
    similarity = pairwise_similarity(randn(9, 3, seed=7))
    copy = similarity.clone()
    facility_location(similarity, 4)
    assert torch.equal(similarity, copy)


def test_equal_examples_are_picked_from_the_lowest_on() -> None:
    medoids = facility_location(pairwise_similarity(torch.ones(6, 3)), 4)
    assert medoids.indices.tolist() == [0, 1, 2, 3]
    assert medoids.cluster_sizes.tolist() == [3, 1, 1, 1]
    assert medoids.objective == 0.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_copies_are_picked_last_and_in_order(metric: str, spread: float) -> None:
    """Every example three times: once each different one is picked, what is left has gain 0."""
    for seed in range(10):
        distinct = randn(12, 8, seed=seed) * torch.exp(spread * randn(12, 1, seed=seed + 50))
        order = torch.randperm(36, generator=torch.Generator().manual_seed(seed))
        features = distinct.repeat(3, 1)[order]
        medoids = facility_location(pairwise_similarity(features, metric), 36)
        first = {int(row) % 12: place for place, row in reversed(list(enumerate(order.tolist())))}
        assert set(medoids.indices[:12].tolist()) == set(first.values())
        tail = medoids.indices[12:].tolist()
        assert tail == sorted(tail)
        at_twelve = facility_location(pairwise_similarity(features, metric), 12)
        assert at_twelve.cluster_sizes.tolist() == [3] * 12


def test_ties_of_one_probe_go_to_the_lowest_index() -> None:
    """Of an even number of examples in one order in every coordinate, the two in the middle have equal sums of
    distances. Float32 sums would break the tie by round-off."""
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        steps = randn(16, 700, seed=seed).abs()
        features = torch.empty(16, 700)
        features[order] = steps.cumsum(dim=0)
        middle = sorted(order[7:9].tolist())
        assert facility_location(pairwise_similarity(features), 1).indices.tolist() == middle[:1]


@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=25),
    st.data(),
)
@property_test
def test_on_a_line_against_exact_medians(points: list[int], data: st.DataObject) -> None:
    n = len(points)
    k = data.draw(st.integers(1, n))
    similarity = pairwise_similarity(torch.tensor(points, dtype=torch.float32)[:, None])
    most = n * float(similarity.max())
    best = most - oracles.k_medians_cost(points, k)
    objective = facility_location(similarity, k).objective
    assert (1 - (1 - 1 / k) ** k) * best - 1e-9 <= objective <= best + 1e-9
    if k == 1 or k >= len(set(points)):
        assert objective == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_on_a_line_with_separate_groups_greedy_is_exact(seed: int) -> None:
    """Three groups of equal odd size: the first pick is the median of all, which is the middle group's own."""
    offsets = torch.tensor([0.0, 1000.0, 2000.0]).repeat_interleave(7)
    points = (offsets + 10 * randn(21, seed=seed)).double()
    order = torch.randperm(21, generator=torch.Generator().manual_seed(seed))
    medoids = facility_location(pairwise_similarity(points[order][:, None]), 3)
    most = 21 * float(points.max() - points.min())
    assert medoids.objective == pytest.approx(most - oracles.k_medians_cost(points.tolist(), 3), rel=1e-9)
    assert medoids.cluster_sizes.tolist() == [7, 7, 7]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
@property_test
def test_one_medoid_for_every_group_of_equal_examples(sizes: list[int]) -> None:
    features = (2.0 ** torch.arange(len(sizes))).repeat_interleave(torch.tensor(sizes))[:, None]
    medoids = facility_location(pairwise_similarity(features), len(sizes))
    assert sorted(medoids.cluster_sizes.tolist()) == sorted(sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    assert sorted(medoids.indices.tolist()) == starts.tolist()


def test_negative_similarities() -> None:
    """Cosines: the first pick has the largest sum although all later gains compare with it, and F may be negative."""
    angles = torch.arange(6) * (2 * math.pi / 6)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    similarity = oracles.similarity(features.numpy(), "cosine")
    medoids = facility_location(pairwise_similarity(features, "cosine"), 3)
    check_medoids(medoids, similarity, 3)
    opposite = -torch.ones(4, 4)
    assert facility_location(opposite, 2).objective == -4.0
    assert facility_location(opposite, 2).indices.tolist() == [0, 1]


def test_no_medoids_and_no_examples() -> None:
    for n in (0, 3):
        medoids = facility_location(torch.zeros(n, n), 0)
        check_medoids(medoids, np.zeros((n, n)), 0)
        assert medoids.indices.dtype == torch.int64
        assert medoids.objective == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_is_rejected(value: float) -> None:
    similarity = torch.zeros(4, 4)
    similarity[1, 2] = value
    with pytest.raises(SelectionError, match="not finite"):
        facility_location(similarity, 2)


@pytest.mark.parametrize(
    ("similarity", "k", "message"),
    [
        (torch.zeros(3, 4), 1, r"shape \(3, 4\)"),
        (torch.zeros(3), 1, r"shape \(3,\)"),
        (torch.zeros(()), 0, r"shape \(\)"),
        (torch.zeros(3, 3), 4, "4 medoids of 3"),
        (torch.zeros(3, 3), -1, "-1 medoids"),
    ],
)
def test_facility_location_errors(similarity: Tensor, k: int, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        facility_location(similarity, k)


@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0])
def test_small_distances_survive_a_large_offset(spread: float) -> None:
    """The matrix product cancels; near pairs, duplicates among them, are exact all the same."""
    features = (spread * randn(60, 24, seed=5) + 100.0).double()
    features[7] = features[3]
    features[50:] += 5.0
    exact = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    similarity = pairwise_similarity(features, "euclidean")
    distance = float(similarity.max()) - similarity
    assert float(distance[7, 3]) == float(distance[3, 3])
    torch.testing.assert_close(distance, exact, rtol=1e-9, atol=1e-12 * float(exact.max()))
