"""Pools too large for one matrix: two rounds come close to one."""

from __future__ import annotations

import pytest
import torch

from colm_ds.selection.facility_location import facility_location, pairwise_similarity
from colm_ds.selection.two_round import pick_medoids, two_round_medoids


@pytest.mark.parametrize("kind", ["normal", "clusters", "one dimension"])
@pytest.mark.parametrize(("k", "num_parts"), [(20, 4), (150, 3), (300, 2)])
def test_objective_is_within_five_percent_of_one_round(kind: str, k: int, num_parts: int) -> None:
    generator = torch.Generator().manual_seed(k)
    features = torch.randn(600, 1 if kind == "one dimension" else 12, generator=generator)
    if kind == "clusters":
        features = features * 0.1 + torch.randn(15, 12, generator=generator)[torch.arange(600) % 15]
    similarity = pairwise_similarity(features)
    one = facility_location(similarity, k)
    two = two_round_medoids(features, k, "l1", num_parts)
    assert len(set(two.indices.tolist())) == k
    reached = float(similarity[:, two.indices].max(dim=1).values.double().sum())
    assert reached >= 0.95 * one.objective
    assert int(two.cluster_sizes.sum()) == 600


def test_small_pools_take_one_round() -> None:
    features = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    expected = facility_location(pairwise_similarity(features), 10)
    assert torch.equal(pick_medoids(features, 10, "l1").indices, expected.indices)
    assert len(pick_medoids(features, 10, "l1", max_pool=20).indices) == 10


def test_demand_counts_examples() -> None:
    """A row that stands for three examples is worth three equal rows."""
    features = torch.tensor([[0.0], [1.0], [5.0], [5.2]])
    copies = torch.tensor([[0.0], [1.0], [5.0], [5.2], [5.2], [5.2]])
    weighted = facility_location(pairwise_similarity(features), 2, torch.tensor([1, 1, 1, 3]))
    plain = facility_location(pairwise_similarity(copies), 2)
    assert weighted.indices.tolist() == plain.indices.tolist()
    assert weighted.objective == pytest.approx(plain.objective)
    assert sorted(weighted.cluster_sizes.tolist()) == sorted(plain.cluster_sizes.tolist())
