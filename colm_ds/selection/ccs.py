"""CCS: drop the hardest examples, then as many picks from every stratum of the score (Zheng et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.selection.draws import uniform_draw
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector

NUM_STRATA = 50
"""Strata of the original."""


def without_hardest(hardness: Tensor, beta: float, count: int) -> Tensor:
    """Return the places left after the floor(beta n) hardest are dropped, never fewer than `count`.

    Args:
        hardness: `[n]`; of equal ones the lower place is kept.
        beta: share to drop, 0 to below 1.
        count: picks that must remain possible, at most n.

    Returns:
        Ascending int64 `[n - q]`.
    """
    n = len(hardness)
    dropped = min(int(beta * n + 1e-9), n - count)
    return torch.sort(hardness.double(), stable=True).indices[: n - dropped].sort().values


def strata_of(scores: Tensor, num_strata: int) -> Tensor:
    """Return the stratum of every score, of equal width between the smallest and the largest; int64 `[n]`."""
    wide = scores.double()
    low, high = wide.min(), wide.max()
    if not float(high - low) > 0.0:
        return torch.zeros(len(wide), dtype=torch.int64)
    return ((wide - low) / (high - low) * num_strata).floor().long().clamp_max(num_strata - 1)


def deal(counts: list[int], total: int) -> list[int]:
    """Deal `total` picks out to strata from the emptiest to the fullest: an equal part of what is left, or all it has.

    Args:
        counts: examples of every stratum; ties are dealt to the lower one first.
        total: at most their sum.

    Returns:
        Picks of every stratum, adding up to `total`.
    """
    budgets = [0] * len(counts)
    order = sorted((place for place, count in enumerate(counts) if count), key=lambda place: (counts[place], place))
    left = total
    for number, place in enumerate(order):
        budgets[place] = min(counts[place], left // (len(order) - number))
        left -= budgets[place]
    return budgets


def stratified_draw(scores: Tensor, count: int, num_strata: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw uniformly inside every stratum of the scores by `deal`.

    Args:
        scores: `[n]`.
        count: at most n.
        num_strata: S.
        generator: private CPU generator.

    Returns:
        Ascending places, int64 `[count]`, and for each the examples of its stratum over the picks there, float64.
    """
    strata = strata_of(scores, num_strata)
    counts = torch.bincount(strata, minlength=num_strata).tolist()
    places, inverse = [], []
    for stratum, budget in enumerate(deal(counts, count)):
        if budget:
            members = (strata == stratum).nonzero().flatten()
            places.append(members[uniform_draw(len(members), budget, generator)])
            inverse.append(torch.full((budget,), counts[stratum] / budget, dtype=torch.float64))
    order = torch.cat(places).argsort()
    return torch.cat(places)[order], torch.cat(inverse)[order]


@dataclass(frozen=True)
class CCSOptions:
    """Options of `ccs`."""

    score: str = option("loss", "score that strata are made of", choices=("loss", "margin", "el2n"))
    beta: float = option(0.1, "share of the hardest examples that is dropped first", low=0.0, high=0.999)
    strata: int = option(NUM_STRATA, "strata of equal width; at most as many as picks", low=1)
    weights: str = option("uniform", "inverse: for the mean of what beta leaves", choices=("uniform", "inverse"))


class CCSSelector(PoolSelector):
    """Coverage-centric selection of every large batch."""

    name = "ccs"
    signal: str | None = "loss"
    Options = CCSOptions

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.signal = self.signal_with(self.options)

    @classmethod
    def signal_with(cls, options: Any) -> str | None:
        """See `PoolSelector.signal_with`."""
        return str(options.score)

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        scores = pool.signals[:, 0]
        hardness = -scores if self.options.score == "margin" else scores
        left = without_hardest(hardness, self.options.beta, quota)
        places, inverse = stratified_draw(scores[left], quota, min(self.options.strata, quota), generator)
        return Picks(left[places], inverse if self.options.weights == "inverse" else None)
