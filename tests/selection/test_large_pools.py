"""Pools too large for one matrix: picks among neighbours come close to those of one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_ds.selection import large_pools
from colm_ds.selection.facility_location import facility_location, pairwise_similarity
from colm_ds.selection.large_pools import pick_medoids

SIZE = 600


def make_features(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(SIZE, 1 if kind == "one dimension" else 12, generator=generator)
    if kind.endswith("clusters"):
        centres = torch.randn(15, 12, generator=generator)
        even = torch.arange(SIZE) % 15
        uneven = torch.multinomial(torch.rand(15, generator=generator) ** 4, SIZE, True, generator=generator)
        features = features * 0.1 + centres[uneven if kind == "uneven clusters" else even]
    return features


def distance_to_picks(features: Tensor, picks: Tensor, metric: str) -> float:
    """Compute the mean distance, or 1 less the cosine, of every row to its nearest pick."""
    if metric == "cosine":
        directions = torch.nn.functional.normalize(features.double(), dim=1)
        return float((1.0 - directions @ directions[picks].T).amin(dim=1).mean())
    pairs = torch.cdist(features.double(), features[picks].double(), p=1.0 if metric == "l1" else 2.0)
    return float(pairs.amin(dim=1).mean())


@pytest.mark.parametrize("metric", ["l1", "euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["normal", "clusters", "uneven clusters", "one dimension"])
@pytest.mark.parametrize(("k", "part"), [(40, 150), (150, 150), (150, 61), (300, 300)])
def test_rows_are_nearly_as_near_to_the_picks_as_to_those_of_one_matrix(
    metric: str, kind: str, k: int, part: int
) -> None:
    features = make_features(kind, seed=k)
    if metric == "cosine" and kind == "one dimension":
        pytest.skip("the cosine of single numbers is their sign")
    one = facility_location(pairwise_similarity(features, metric), k)
    parts = pick_medoids(features, k, metric, max_pool=part, part=part)
    assert len(set(parts.indices.tolist())) == k
    random = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))[:k]
    reached, best, chance = (
        distance_to_picks(features, picks, metric) for picks in (parts.indices, one.indices, random)
    )
    assert reached - best < 0.5 * (chance - best)
    assert int(parts.cluster_sizes.sum()) == SIZE
    assert int(parts.cluster_sizes.min()) >= 1


def test_clusters_far_apart_are_served_as_by_one_matrix() -> None:
    """Parts are the clusters then, and their picks of largest gain are the greedy ones: more where rows lie apart."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.2, 1.0, 3.0, 0.5]).repeat_interleave(100)[:, None]
    features = torch.randn(400, 6, generator=generator) * spread
    features[:, 0] += 1e3 * torch.arange(4).repeat_interleave(100)
    features = features[torch.randperm(400, generator=generator)]
    one = facility_location(pairwise_similarity(features), 80).indices
    parts = pick_medoids(features, 80, "l1", max_pool=100, part=100)
    reached, best = distance_to_picks(features, parts.indices, "l1"), distance_to_picks(features, one, "l1")
    assert reached == pytest.approx(best, rel=0.01)
    clusters = (features[:, 0] / 1e3).round().long()
    counts = [torch.bincount(clusters[picks], minlength=4) for picks in (parts.indices, one)]
    assert (counts[0] - counts[1]).abs().max() <= 2
    assert counts[0][2] > 2 * counts[0][0]


def test_cluster_sizes_are_those_of_the_nearest_pick_of_the_part() -> None:
    features = torch.cat([torch.tensor([[0.0], [0.1], [0.2]]), torch.full((5, 1), 9.0)]).repeat(20, 1)
    parts = pick_medoids(features, 40, "l1", max_pool=80, part=80)
    assert int(parts.cluster_sizes.sum()) == 160
    assert int(parts.cluster_sizes.min()) >= 1  # a medoid stands for itself, beside an equal one


def test_small_pools_are_one_matrix() -> None:
    features = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    expected = facility_location(pairwise_similarity(features), 10)
    assert torch.equal(pick_medoids(features, 10, "l1").indices, expected.indices)
    assert torch.equal(pick_medoids(features, 10, "l1").cluster_sizes, expected.cluster_sizes)


@pytest.mark.parametrize("k", [0, 1, 5, 50])
def test_few_picks_of_many_rows(k: int) -> None:
    features = make_features("clusters", seed=3)
    picks = pick_medoids(features, k, "euclidean", max_pool=50, part=10)
    assert len(set(picks.indices.tolist())) == len(picks.cluster_sizes) == k
    assert k == 0 or distance_to_picks(features, picks.indices, "euclidean") < 1.5 * distance_to_picks(
        features, facility_location(pairwise_similarity(features, "euclidean"), k).indices, "euclidean"
    )


def test_equal_rows_and_as_many_picks_as_rows() -> None:
    assert sorted(pick_medoids(torch.ones(90, 3), 90, "l1", max_pool=20, part=20).indices.tolist()) == [*range(90)]
    assert len(set(pick_medoids(torch.zeros(90, 3), 40, "cosine", max_pool=20, part=20).indices.tolist())) == 40


@pytest.mark.parametrize("metric", ["l1", "euclidean", "cosine"])
@pytest.mark.parametrize("num_distinct", [2, 5, 60])
def test_equal_rows_are_picked_in_proportion(metric: str, num_distinct: int) -> None:
    """Short answers have equal signals: past one pick of each all gain nothing, and the lowest rows are next."""
    generator = torch.Generator().manual_seed(num_distinct)
    kinds = torch.randint(0, num_distinct, (2000,), generator=generator)
    features = torch.randn(num_distinct, 6, generator=generator)[kinds]
    picks = pick_medoids(features, 500, metric, max_pool=300, part=100)
    assert len(set(picks.indices.tolist())) == 500
    assert int(picks.cluster_sizes.sum()) == 2000
    shares = [torch.bincount(each, minlength=num_distinct) / len(each) for each in (kinds, kinds[picks.indices])]
    assert (shares[0] - shares[1]).abs().max() < 0.05
    served = torch.zeros(num_distinct).index_add_(0, kinds[picks.indices], picks.cluster_sizes.float()) / 2000
    assert torch.allclose(served, shares[0], atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(100, 9), (4096, 1), (5000, 1250), (16_384, 64), (65_536, 256), (65_536, 16_384)])
def test_what_is_compared_at_once_is_known(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def note(features: Tensor, metric: str) -> Tensor:
        sizes.append(len(features))
        raise InterruptedError

    monkeypatch.setattr(large_pools, "pairwise_similarity", note)
    with pytest.raises(InterruptedError):
        pick_medoids(torch.arange(n, dtype=torch.float32)[:, None], k, "euclidean")
    assert sizes == [large_pools.compared_at_once(n, k, "euclidean")]
