"""Medoids of pools too large for one similarity matrix: pick in parts, then among the picks."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.selection.facility_location import Medoids, facility_location, pairwise_similarity

MAX_POOL = {"l1": 8192, "cosine": 8192, "euclidean": 4096}
"""Examples compared in one matrix (512 MiB of similarities, 128 MiB); larger pools take two rounds."""

PART = {"l1": 8192, "cosine": 8192, "euclidean": 2048}
"""Maximum examples of a part in the first round. Many small parts are fast: their matrices stay in caches."""

OVERSAMPLING = 1.5
"""Total picks of the first round, relative to those asked for: candidates of the second round."""

FEW = 256
"""Up to this many picks, every part makes all of them, so that no cluster is missed by all parts."""


def pick_medoids(features: Tensor, k: int, metric: str, max_pool: int | None = None) -> Medoids:
    """Pick medoids of a pool of any size, with memory for `max_pool` squared similarities.

    Args:
        features: one row per example, `[n, h]`.
        k: picks, 0 <= k <= n.
        metric: see `pairwise_similarity`.
        max_pool: largest pool for one round, and largest part of a bigger pool; default: by the metric.
    """
    if len(features) <= (max_pool or MAX_POOL[metric]):
        return facility_location(pairwise_similarity(features, metric), k)
    return two_round_medoids(features, k, metric, num_parts=-(-len(features) // (max_pool or PART[metric])))


def two_round_medoids(features: Tensor, k: int, metric: str, num_parts: int) -> Medoids:
    """Pick greedily in every part, then among those picks, each standing for its cluster (GreeDi).

    Args:
        features: one row per example, `[n, h]`.
        k: picks, 0 <= k <= n.
        metric: see `pairwise_similarity`.
        num_parts: parts of the first round; rows are assigned in turn.

    Returns:
        The medoids. Gains and objective are those of the second round, over the first round's clusters; that round
        compares about 1.5 k examples, or up to 256 of every part.
    """
    candidates, demands = [], []
    for part in range(num_parts):
        rows = torch.arange(part, len(features), num_parts, device=features.device)
        picks = min(len(rows), k, max(FEW, -(-int(OVERSAMPLING * k) // num_parts)))
        medoids = facility_location(pairwise_similarity(features[rows], metric), picks)
        candidates.append(rows[medoids.indices])
        demands.append(medoids.cluster_sizes)
    rows, order = torch.cat(candidates).sort()  # ties go to the lowest index here too
    demand = torch.cat(demands)[order]
    medoids = facility_location(pairwise_similarity(features[rows], metric), k, demand)
    return Medoids(rows[medoids.indices], medoids.gains, medoids.objective, medoids.cluster_sizes)
