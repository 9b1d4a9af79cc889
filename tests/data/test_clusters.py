"""Clusters of features, and a dataset divided into other sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from colm_ds.batching.loader import LargeBatchLoader
from colm_ds.batching.resourced import WithSources
from colm_ds.data.clusters import cluster_features, cluster_together
from colm_ds.errors import ConfigError, DataError, DivergenceError
from colm_ds.selection import SINGLE_PROCESS
from tests.choices import random_choices

pytest.importorskip("sklearn")


def blobs(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Points around centres far from each other, in mixed order; the blob of each is its first coordinate's tens."""
    generator = np.random.default_rng(seed)
    points = [generator.normal(10.0 * (1 + number), 0.3, (size, 6)) for number, size in enumerate(sizes)]
    return np.concatenate(points)[generator.permutation(sum(sizes))].astype(np.float32)


def test_clusters_are_the_blobs_from_the_largest_on() -> None:
    features = blobs([5, 40, 20])
    made = cluster_features(features, 3, seed=1)
    assert made.counts == [40, 20, 5]
    blob = (features[:, 0] / 10).round().astype(int) - 1
    assert (np.array([2, 0, 1])[blob] == made.labels).all()
    assert made.silhouettes == {}
    assert (cluster_features(features, 3, seed=1).labels == made.labels).all()


def test_number_by_silhouette() -> None:
    made = cluster_features(blobs([30, 20, 25, 15]), (2, 7), seed=0)
    assert len(made.counts) == 4
    assert sorted(made.silhouettes) == [2, 3, 4, 5, 6, 7]
    assert max(made.silhouettes, key=made.silhouettes.__getitem__) == 4
    with pytest.raises(ConfigError, match=r"clusters.num = \[2, 50\]: must be less than the 12 examples"):
        cluster_features(blobs([12]), [2, 50], seed=0)


def test_what_can_not_be_clustered() -> None:
    broken = torch.full((12, 6), torch.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        cluster_together(broken, 12, 3, 0, SINGLE_PROCESS)


def test_other_sources() -> None:
    dataset = random_choices(20)
    loader = LargeBatchLoader(dataset, 8, seed=0, rank=0, world_size=1)
    first = next(iter(loader))
    assert loader.state_dict()["sources"] is None
    ids = np.arange(20) % 3
    loader.set_sources(["x", "y", "z"], ids, [2])
    loader.set_sources(["x", "y"], ids % 2, [])
    assert loader.state_dict()["sources"]["names"] == ["x", "y"]
    loader.next_step = 1
    again = next(iter(loader))
    assert again.indices.tolist() == first.indices.tolist()
    assert again.sources.tolist() == (ids % 2)[first.indices].tolist()
    assert all(one.source == ids[one.index] % 2 for one in again.examples.values())
    for wrong in (ids[:5], ids + 1):
        with pytest.raises(DataError, match="Give every example the id of one of them"):
            WithSources(dataset, ["x", "y", "z"], wrong)
