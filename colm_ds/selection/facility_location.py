"""Medoids: greedy maximisation of the facility-location function (CoLM, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.errors import SelectionError

METRICS = ("l1", "euclidean", "cosine")

TIE_TOLERANCE = 1e-12
"""Similarities this close, relative to the largest, count as equal, and gains n times as close (float64 round-off)."""

_ELEMENTS_AT_ONCE = 1 << 21
"""Elements of the features, or of the similarity, processed at a time (16 MB in float64)."""

_ROWS_AT_ONCE = 1024
"""Rows of one block of distances."""

_CANCELLED = 1e-3
"""Squared distances below this part of |a|^2 + |b|^2 have lost more than three digits to cancellation."""


def pairwise_similarity(features: Tensor, metric: str = "l1") -> Tensor:
    """Compute the similarity of every pair of examples: C - distance with C the largest distance, or the cosine.

    Args:
        features: one row per example, `[n, h]`.
        metric: `l1`, `euclidean` or `cosine`.

    Returns:
        float64 `[n, n]`, symmetric; at least 0 for the distances. A row of zeros has cosine 0 with every other.

    Raises:
        SelectionError: if the metric is unknown or `features` is not a matrix.
    """
    if features.dim() != 2:
        raise SelectionError(f"pairwise_similarity: features of shape {tuple(features.shape)}. Give [n, h].")
    if metric not in METRICS:
        raise SelectionError(f"pairwise_similarity: unknown metric {metric!r}. Choose one of {', '.join(METRICS)}.")
    n = features.shape[0]
    # In float64, because ties are common (of an even number of examples that one probe orders alike in every
    # coordinate, the two in the middle have the same gain) and float32 sums would break them at random.
    total = torch.zeros(n, n, dtype=torch.float64, device=features.device)
    for part in features.split(max(1, _ELEMENTS_AT_ONCE // max(n, 1)), dim=1):
        _add_pairs(total, part.double(), metric)
    if metric == "cosine":
        norms = total.diagonal().sqrt().clamp_min(1e-150)  # a product of two of them is not zero
        return total.div_(torch.outer(norms, norms))
    distance = total.sqrt_() if metric == "euclidean" else total
    return distance.neg_().sub_(distance.min()) if n else distance  # in place: the matrix exists once


def _add_pairs(total: Tensor, wide: Tensor, metric: str) -> None:
    """Add what some coordinates, float64 `[n, w]`, contribute to every pair: the upper triangle in blocks, mirrored."""
    for start in range(0, len(wide), _ROWS_AT_ONCE):
        rows, others = wide[start : start + _ROWS_AT_ONCE], wide[start:]
        if metric in ("cosine", "euclidean"):
            block = rows @ others.T if metric == "cosine" else _squared_distances(rows, others)
            square = block[:, : len(rows)]
            block[:, : len(rows)] = (square + square.T) / 2.0  # products a b and b a may differ by round-off
        elif wide.shape[1] == 1:
            block = (rows - others.T).abs_()
        else:
            block = torch.cdist(rows, others, p=1.0)
        corner = slice(start, start + _ROWS_AT_ONCE)
        total[corner, start:] += block
        total[start + _ROWS_AT_ONCE :, corner] = total[corner, start + _ROWS_AT_ONCE :].T


def _squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Compute squared euclidean distances by a matrix product; float64 `[len(rows), len(others)]`.

    |a|^2 + |b|^2 - 2 a b loses small distances to cancellation: those are computed from differences.
    """
    centre = others.mean(dim=0)
    rows, others = rows - centre, others - centre
    scale = rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
    block = torch.addmm(scale, rows, others.T, alpha=-2.0)
    near = (block < _CANCELLED * scale).nonzero()
    if len(near) > block.numel() // 8:
        return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square_()
    for some in near.split(max(1, _ELEMENTS_AT_ONCE // max(1, rows.shape[1]))):
        one, other = some.unbind(dim=1)
        block[one, other] = (rows[one] - others[other]).square_().sum(dim=1)
    return block


@dataclass(frozen=True)
class Medoids:
    """Result of the greedy maximisation of F(S) = sum_i max_{s in S} similarity[i, s].

    Attributes:
        indices: picked rows in pick order, int64 `[k]`.
        gains: increase of F by each pick, float64 `[k]`, non-increasing after the first.
        objective: F of the picked set.
        cluster_sizes: number of examples that are most similar to each pick, int64 `[k]`; at least 1, adding up to n.
    """

    indices: Tensor
    gains: Tensor
    objective: float
    cluster_sizes: Tensor


def facility_location(similarity: Tensor, k: int) -> Medoids:
    """Pick `k` medoids greedily; ties go to the lowest index.

    The gains of all candidates are updated after every pick, from only the rows that it serves better than earlier
    picks, so the whole run reads about n * n * log(k) similarities instead of k * n * n.

    Args:
        similarity: `[n, n]`, from `pairwise_similarity`.
        k: picks, 0 <= k <= n.

    Returns:
        The medoids; within a factor 1 - 1/e of the best objective where similarities are not negative.

    Raises:
        SelectionError: if `similarity` is not a square matrix, `k` is out of range or a value is not finite.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise SelectionError(f"facility_location: similarity of shape {tuple(similarity.shape)}. Give [n, n].")
    n = similarity.shape[0]
    if not 0 <= k <= n:
        raise SelectionError(f"facility_location: {k} medoids of {n} examples. Ask for 0 to {n}.")
    low, high = similarity.aminmax() if n else (torch.zeros(()), torch.zeros(()))
    if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
        raise SelectionError("facility_location: a similarity is not finite. Leave out examples without finite signal.")
    indices: list[int] = []
    gains: list[float] = []
    device = similarity.device
    if k == 0:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Medoids(empty, empty.double(), 0.0, empty)

    gain = similarity.sum(dim=0, dtype=torch.float64)
    margin = TIE_TOLERANCE * max(abs(float(low)), abs(float(high)))
    best = similarity.new_empty(n)  # similarity of each row to its nearest pick
    cluster = torch.zeros(n, dtype=torch.int64, device=device)
    for pick in range(k):
        chosen = _first_of_the_best(gain, n * margin)
        indices.append(chosen)
        gains.append(float(gain[chosen]))
        column = similarity[:, chosen]
        if pick == 0:
            best.copy_(column)
            gain = _gains_over(similarity, best)
        else:
            better = (column > best + margin).nonzero().flatten()
            _lower_gains(gain, similarity, better, best[better], column[better])
            best[better] = column[better]
            cluster[better] = pick
        gain[chosen] = -torch.inf
    picked = torch.tensor(indices, device=device)
    cluster[picked] = torch.arange(k, device=device)  # a medoid stands for itself, even beside an equal one
    objective = float(best.sum(dtype=torch.float64))
    sizes = torch.bincount(cluster, minlength=k)
    return Medoids(picked, torch.tensor(gains, dtype=torch.float64), objective, sizes)


def _first_of_the_best(gain: Tensor, tolerance: float) -> int:
    return int((gain >= gain.max() - tolerance).int().argmax())


def _gains_over(similarity: Tensor, best: Tensor) -> Tensor:
    """Return the gain of every candidate over `best`, float64 `[n]`."""
    n = similarity.shape[1]
    total = torch.zeros(n, dtype=torch.float64, device=similarity.device)
    rows = max(1, _ELEMENTS_AT_ONCE // max(n, 1))
    for start in range(0, similarity.shape[0], rows):
        part = slice(start, start + rows)
        level = best[part, None]
        total += similarity[part].maximum(level).sum(dim=0, dtype=torch.float64) - level.sum(dtype=torch.float64)
    return total


def _lower_gains(gain: Tensor, similarity: Tensor, rows: Tensor, old: Tensor, new: Tensor) -> None:
    """Lower the gains by what `rows` lose as their best similarity rises from `old` to `new`.

    relu(s - old) - relu(s - new) is s clamped to [old, new], less old: float32 values that the float64 sum keeps exact.
    """
    at_once = max(1, _ELEMENTS_AT_ONCE // similarity.shape[1])
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        low, high = old[part, None], new[part, None]
        lost = similarity[rows[part]].clamp_(low, high).sum(dim=0, dtype=torch.float64)
        gain -= lost - low.sum(dtype=torch.float64)
