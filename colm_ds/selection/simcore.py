"""SimCore: examples nearest to a target, in rounds in which every target centroid takes one (Kim et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.selection.draws import uniform_draw
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector

LLOYD_STEPS = 20
"""Iterations of k-means."""

MAX_CLUSTERS = 100
"""Clusters of the target in the original."""


def unit_rows(rows: Tensor) -> Tensor:
    """Scale rows to length 1, float64; rows of zeros stay."""
    wide = rows.double()
    return wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)


def centroids_of(rows: Tensor, count: int, steps: int = LLOYD_STEPS) -> Tensor:
    """Cluster rows by k-means without randomness: Lloyd's steps from a farthest-first start.

    The start is the row nearest to the mean, then always the row farthest from all starts so far; an empty cluster
    keeps its centroid; ties go to the lower row or centroid.

    Args:
        rows: `[m, h]`.
        count: k; with at most that many rows each is its own centroid.
        steps: iterations.

    Returns:
        float64 `[min(k, m), h]`.
    """
    wide = rows.double()
    if len(wide) <= count:
        return wide
    starts = [int((wide - wide.mean(dim=0)).norm(dim=1).argmin())]
    nearest = (wide - wide[starts[0]]).norm(dim=1)
    while len(starts) < count:
        starts.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (wide - wide[starts[-1]]).norm(dim=1))
    centroids = wide[starts].clone()
    for _ in range(steps):
        cluster = torch.cdist(wide, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        sizes = torch.bincount(cluster, minlength=count)
        sums = torch.zeros_like(centroids).index_add(0, cluster, wide)
        moved = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


@dataclass(frozen=True)
class Round:
    """One round of the retrieval.

    Attributes:
        rows: rows taken, each once, in the order of the centroids that took them first, int64 `[at most k]`.
        similarities: similarity of each to the centroid that took it first, float64.
        value: mean over centroids of the similarity taken.
    """

    rows: Tensor
    similarities: Tensor
    value: float


def rounds(similarity: Tensor) -> Iterator[Round]:
    """Yield the rounds of the retrieval until all rows are taken.

    In each, every centroid takes its most similar row that no earlier round took; ties go to the lower row.

    Args:
        similarity: `[n, k]`.
    """
    left = similarity.double().clone()
    remaining = len(left)
    while remaining:
        best, rows = left.max(dim=0)
        first = _first_seen(rows)
        yield Round(rows[first], best[first], float(best.mean()))
        left[rows] = -torch.inf
        remaining -= len(first)


def retrieve(
    similarity: Tensor,
    count: int,
    *,
    stop: bool = False,
    patience: int = 1,
    threshold: float = 0.95,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Retrieve rows in rounds, up to a budget.

    Args:
        similarity: `[n, k]`.
        count: budget, at most n.
        stop: end before the first round whose value is below `threshold` times that of round `patience`.
        patience: 1-based round whose value is compared with.
        threshold: factor.
        generator: cuts the last round at random, as the original; None: by similarity, ties to the lower row.

    Returns:
        Rows in the order in which they were taken, int64 `[count]`, fewer if stopped: any beginning is a selection too.
    """
    taken: list[Tensor] = []
    room, reference = count, float("-inf")
    for number, one in enumerate(rounds(similarity), start=1):
        if number == patience:
            reference = one.value
        if stop and number > patience and one.value < threshold * reference:
            break
        if len(one.rows) >= room:
            if len(one.rows) == room:
                kept = torch.arange(room)
            elif generator is not None:
                kept = uniform_draw(len(one.rows), room, generator)
            else:
                by_row = one.rows.argsort()
                by_value = torch.sort(one.similarities[by_row], descending=True, stable=True).indices
                kept = by_row[by_value[:room]].sort().values
            taken.append(one.rows[kept])
            break
        taken.append(one.rows)
        room -= len(one.rows)
    return torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64)


def _first_seen(rows: Tensor) -> Tensor:
    """Return the places where a row occurs for the first time, ascending int64."""
    seen: set[int] = set()
    places = [place for place, row in enumerate(rows.tolist()) if not (row in seen or seen.add(row))]  # type: ignore[func-returns-value]
    return torch.tensor(places, dtype=torch.int64)


@dataclass(frozen=True)
class SimCoreOptions:
    """Options of `simcore`."""

    clusters: str | int = option(
        "auto", "k; auto: at most 100 and at most the picks; 0: every target", choices=("auto",), low=0, whole=True
    )
    stop: bool = option(False, "end once a round's value falls below the threshold")
    patience: int = option(20, "round whose value is compared with; the paper's text says 1", low=1)
    threshold: float = option(0.95, "share of that value", low=0.0)
    fill: str = option("random", "after an early end: random examples, or fewer", choices=("random", "fewer"))
    truncate: str = option("similarity", "cut of the last round", choices=("similarity", "random"))


class SimCoreSelector(PoolSelector):
    """The examples of a large batch that are nearest to a target set."""

    name = "simcore"
    signal: str | None = "hidden"
    needs_target = True
    Options = SimCoreOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        assert pool.target is not None
        options, target = self.options, unit_rows(pool.target)
        clusters = min(MAX_CLUSTERS, quota) if options.clusters == "auto" else options.clusters or len(target)
        centroids = unit_rows(centroids_of(target, clusters))
        rows = retrieve(
            unit_rows(pool.signals) @ centroids.T,
            quota,
            stop=options.stop,
            patience=options.patience,
            threshold=options.threshold,
            generator=generator if options.truncate == "random" else None,
        )
        if len(rows) < quota and options.fill == "random":
            free = torch.ones(len(pool.positions), dtype=torch.bool)
            free[rows] = False
            others = free.nonzero().flatten()
            rows = torch.cat([rows, others[uniform_draw(len(others), quota - len(rows), generator)]])
        return Picks(rows)
