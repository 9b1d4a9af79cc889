"""Medoids of pools of any size: beyond one similarity matrix, picks among neighbours, in parts of the pool."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from colm_ds.selection.facility_location import Medoids, facility_location, pairwise_similarity

MAX_POOL = {"l1": 8192, "cosine": 8192, "euclidean": 4096}
"""Examples compared in one matrix (512 MiB of similarities, 128 MiB); larger pools are divided."""

PART = 1024
"""Examples of a part, where that leaves enough picks to each: matrices of parts stay in caches."""

PICKS_OF_A_PART = 16
"""Picks that a part should have, so that its share of them can follow its spread: for fewer picks parts are larger."""

FEWEST_PICKS = 4
"""Picks that a part of the largest size must have: for fewer picks not all rows are compared."""

OVERSAMPLING = 1.5
"""Picks tried first in every part, relative to an even share; the best of all parts are taken."""

NO_GAIN = 1e-9
"""Gains up to this, relative to the largest, are round-off: the row equals a pick."""

_SAMPLE = 1024
_POWER_ITERATIONS = 8


class PoolMedoids(NamedTuple):
    """Medoids of a pool.

    Attributes:
        indices: rows, best first, int64 `[k]`.
        cluster_sizes: rows, of those compared, that are most similar to each, itself included, int64 `[k]`.
    """

    indices: Tensor
    cluster_sizes: Tensor


def pick_medoids(features: Tensor, k: int, metric: str, max_pool: int | None = None, part: int = PART) -> PoolMedoids:
    """Pick medoids of a pool of any size; time and memory grow with n beyond `max_pool`, not with its square.

    A larger pool is divided into parts of neighbours, each part picks greedily more than it will get, and the picks of
    largest gain are taken: the greedy picks of one similarity matrix in which rows of different parts have nothing in
    common.

    Args:
        features: one row per example, `[n, h]`.
        k: picks, 0 <= k <= n.
        metric: see `pairwise_similarity`.
        max_pool: largest pool of one matrix; default: by the metric. Where parts of this size would have fewer than 4
            picks, as many rows are compared, evenly spread, as give 4 to each.
        part: examples of a part.
    """
    n, largest = len(features), max_pool or MAX_POOL[metric]
    if n <= largest or k == 0:
        medoids = _greedy(features, k, metric)
        return PoolMedoids(medoids.indices, medoids.cluster_sizes)
    num_parts = _num_parts(n, k, largest, part)
    compared = torch.arange(0, n, -(-n // (num_parts * largest)), device=features.device)
    parts = _neighbours(features, compared, num_parts, metric)
    indices = _best_of_parts(features, parts, k, metric)
    rank = torch.full((n,), k, device=features.device)
    rank[indices] = torch.arange(len(indices), device=features.device)
    if len(indices) < k:  # every row equals a pick: as in one matrix, the lowest rows are next
        others = compared[rank[compared] == k][: k - len(indices)]
        rank[others] = torch.arange(len(indices), k, device=features.device)
        indices = torch.cat([indices, others])
    sizes = torch.empty(k, dtype=torch.int64, device=features.device)
    for rows in parts:
        places = (rank[rows] < k).nonzero().flatten()
        sizes[rank[rows[places]]] = _cluster_sizes(features[rows], places, metric)
    return PoolMedoids(indices, sizes)


def _best_of_parts(features: Tensor, parts: list[Tensor], k: int, metric: str) -> Tensor:
    """Return the picks of largest gain of all parts, best first, int64; fewer than k where no others gain anything."""
    share = math.ceil(OVERSAMPLING * k / len(parts))
    tried = [_greedy(features[rows], share, metric) for rows in parts]
    while True:
        gains = [each.gains.clone() for each in tried]
        least = NO_GAIN * max((float(each[1:].max()) for each in gains if len(each) > 1), default=0.0)
        for each in gains:
            each[0] = torch.inf  # every part has a pick; only later gains are free of the similarity's constant
        every = torch.cat(gains)
        best = every.sort(descending=True, stable=True).indices[:k]
        best = best[every[best] > least]
        taken = torch.zeros(len(every), dtype=torch.bool).index_fill_(0, best, True)
        short = [
            number
            for number, own in enumerate(taken.split([len(each) for each in gains]))
            if bool(own.all()) and len(own) < len(parts[number])
        ]
        if not short:
            rows = torch.cat([part[each.indices] for part, each in zip(parts, tried, strict=True)])
            return rows[best.to(rows.device)]
        for number in short:  # all its picks are taken: it may deserve more
            tried[number] = _greedy(features[parts[number]], 2 * len(gains[number]), metric)


def compared_at_once(n: int, k: int, metric: str) -> int:
    """Return how many of n examples one similarity matrix compares to pick k."""
    largest = MAX_POOL[metric]
    return n if n <= largest else min(largest, -(-n // _num_parts(n, k, largest, PART)))


def _num_parts(n: int, k: int, largest: int, part: int) -> int:
    """Return the number of parts of n examples, more than `largest`, of which k are picked."""
    wanted = max(-(-n // largest), min(-(-n // part), k // PICKS_OF_A_PART))
    return max(1, min(wanted, k // FEWEST_PICKS))


def _greedy(features: Tensor, k: int, metric: str) -> Medoids:
    return facility_location(pairwise_similarity(features, metric), min(k, len(features)))


def _neighbours(features: Tensor, rows: Tensor, num_parts: int, metric: str) -> list[Tensor]:
    """Divide rows into parts of nearly equal size by halving them along their principal direction, again and again."""
    if num_parts == 1:
        return [rows]
    sample = _compared(features[rows[:: -(-len(rows) // _SAMPLE)]], metric)
    centred = sample - sample.mean(dim=0)
    direction = centred[centred.square().sum(dim=1).argmax()]
    for _ in range(_POWER_ITERATIONS):
        direction = centred.T @ (centred @ direction)
        direction = direction / direction.norm().clamp_min(1e-150)  # rows that are all equal keep their order
    places = torch.cat([_compared(features[some], metric) @ direction for some in rows.split(_SAMPLE)])
    order, left = places.sort(stable=True).indices, num_parts // 2
    first, second = rows[order].tensor_split([len(rows) * left // num_parts])
    return [
        *_neighbours(features, first, left, metric),
        *_neighbours(features, second, num_parts - left, metric),
    ]


def _compared(features: Tensor, metric: str) -> Tensor:
    """Return features in float64 as the metric sees them: of length 1 for the cosine."""
    wide = features.double()
    return wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-150) if metric == "cosine" else wide


def _cluster_sizes(features: Tensor, places: Tensor, metric: str) -> Tensor:
    """Count the rows nearest to each of those at `places`, int64 `[len(places)]`; ties go to the first."""
    rows = _compared(features, metric)
    nearest = torch.cdist(rows, rows[places], p=1.0 if metric == "l1" else 2.0).argmin(dim=1)
    nearest[places] = torch.arange(len(places), device=places.device)  # a medoid stands for itself, beside an equal one
    return torch.bincount(nearest, minlength=len(places))
