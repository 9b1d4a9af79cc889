"""Vector summation, the builders of AutoCoreset (Maalouf et al., ICML 2023): few examples, nearly the same mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.selection.balanced import balanced_draw, principal_components
from colm_ds.selection.draws import inclusion_probabilities, uniform_draw, weighted_draw
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector
from colm_ds.selection.weights import mean_one

_RANK = 1e-10
"""Singular values below this, relative to the largest, are directions that the points do not have."""

_EMPTY = 1e-12
"""A weight this far below the uniform one is 0."""


def caratheodory(points: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Find weights on at most q + 1 of n points under which their mean is that of all (Caratheodory's theorem).

    From equal weights, move along directions in which neither the sum of the weights nor the mean changes, each time
    until one more weight is 0; directions that would move that one are then eliminated, with the largest as pivot.

    Args:
        points: `[n, q]`; the free directions take n^2 numbers.
        generator: mixes the directions at random, so that no point is preferred for its place; None: takes the first.

    Returns:
        Weights of sum 1, at least 0, float64 `[n]`.
    """
    n = len(points)
    lifted = torch.cat([torch.ones(n, 1, dtype=torch.float64), points.double()], dim=1)
    left, values, _ = torch.linalg.svd(lifted, full_matrices=True)
    rank = int((values > _RANK * values[0]).sum())
    free = left[:, rank:].clone()
    weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
    while free.shape[1]:
        if generator is None:
            direction = free[:, 0]
        else:
            direction = free @ torch.randn(free.shape[1], generator=generator, dtype=torch.float64)
        falling = direction < -1e-12 * float(direction.abs().max())
        if not bool(falling.any()):
            direction, falling = -direction, direction > 0.0
        ratio = torch.where(falling, weights / (-direction).clamp_min(1e-300), torch.inf)
        emptied = int(ratio.argmin())
        weights = (weights + ratio[emptied] * direction).clamp_min(0.0)
        weights[emptied] = 0.0
        pivot = int(free[emptied].abs().argmax())
        factors = free[emptied] / free[emptied, pivot]
        free = free - torch.outer(free[:, pivot], factors)
        free = torch.cat([free[:, :pivot], free[:, pivot + 1 :]], dim=1)
        free[emptied] = 0.0
    weights[weights < _EMPTY / n] = 0.0
    return weights / weights.sum()


def capped(weights: Tensor, cap: float) -> Tensor:
    """Mix weights of mean 1 with 1, as little as it takes to bring the largest down to a cap; float64 `[k]`.

    Args:
        weights: mean 1, `[k]`.
        cap: above 1.
    """
    largest = float(weights.max())
    share = (largest - cap) / (largest - 1.0) if largest > cap else 0.0
    return (1.0 - share) * weights.double() + share


def best_of(vectors: Tensor, count: int, trials: int, generator: torch.Generator) -> Tensor:
    """Return the one of several uniform draws whose mean is nearest to that of all; the first of equal ones.

    Args:
        vectors: `[n, K]`.
        count: at most n.
        trials: draws.
        generator: private CPU generator.

    Returns:
        Ascending places, int64 `[count]`.
    """
    wide = vectors.double()
    centred = wide - wide.mean(dim=0)
    draws = torch.stack([uniform_draw(len(wide), count, generator) for _ in range(trials)])
    chosen = torch.zeros(trials, len(wide), dtype=torch.float64).scatter_(1, draws, 1.0)
    errors = (chosen @ centred).square().sum(dim=1)
    return draws[int(errors.argmin())]


def sizes_as_chances(vectors: Tensor) -> Tensor:
    """Return chances in proportion to the vectors' lengths, of sum 1, float64 `[n]`; alike if all are 0."""
    lengths = vectors.double().norm(dim=1)
    total = lengths.sum()
    return lengths / total if float(total) > 0.0 else torch.full_like(lengths, 1.0 / len(lengths))


def fair_shares(counts: Sequence[int], total: int) -> list[float]:
    """Share a selection among sources by a mixture of three policies: by size, by |log| of it, and by exp(-size).

    Each policy counts at least 0.8 (less where a source is smaller than the selection) times a factor that falls from 1
    to 0.4 in ten steps, until a mixture exists that asks no source for more than it has; the rest goes to the policy by
    size.

    Args:
        counts: examples of every source.
        total: examples to select.

    Returns:
        Shares of sum 1; those by size if there is no such mixture, or one source only.
    """
    sizes = torch.tensor(list(counts), dtype=torch.float64)
    by_size = sizes / sizes.sum()
    if len(counts) == 1:
        return [1.0]
    policies = torch.stack([by_size, by_size.log().abs(), (-by_size).exp()])
    policies /= policies.sum(dim=1, keepdim=True)
    bound = min(float(sizes.min()) / total, 1.0)
    bound = 0.8 if bound >= 1.0 else bound
    for step in range(10):
        least = bound * (1.0 - 0.6 * step / 9)
        mixture = torch.tensor([1.0 - 2.0 * least, least, least], dtype=torch.float64)
        shares = mixture @ policies
        if float(mixture[0]) >= least and bool((total * shares <= sizes * (1.0 + 1e-12)).all()):
            return [float(share) for share in shares]
    return [float(share) for share in by_size]


@dataclass(frozen=True)
class VectorSumOptions:
    """Options of `vector_sum`."""

    method: str = option(
        "caratheodory",
        "weighted points with the pool's mean in few directions, the best of many random draws, draws by length, "
        "or the cube method",
        choices=("caratheodory", "best_of", "importance", "balanced"),
    )
    trials: int = option(100, "draws of best_of", low=1)
    cap: float = option(8.0, "largest weight relative to the mean one", low=1.0)


class VectorSumSelector(PoolSelector):
    """A weighted choice whose signals have nearly the large batch's mean."""

    name = "vector_sum"
    signal: str | None = "gradient"
    can_choose_ahead = True
    Options = VectorSumOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        vectors, options = pool.signals, self.options
        if options.method == "best_of":
            return Picks(best_of(vectors, quota, options.trials, generator))
        if options.method == "balanced":
            return Picks(balanced_draw(principal_components(vectors), quota, generator))
        if options.method == "importance":
            chances = sizes_as_chances(vectors)
            rows = weighted_draw(chances, quota, generator)
            if int((chances > 0).sum()) <= quota:
                return Picks(rows)
            inverse = 1.0 / inclusion_probabilities(chances, quota)[rows].clamp_min(1e-12)
            return Picks(rows, capped(mean_one(inverse).double(), options.cap))
        weights = caratheodory(principal_components(vectors, quota - 1), generator)
        rows = (weights > 0).nonzero().flatten()
        if len(rows) < quota:  # signals of few directions need fewer points: random ones beside them, without weight
            return self._filled(rows, weights[rows], len(vectors), quota, generator)
        return Picks(rows, capped(mean_one(weights[rows]).double(), options.cap))

    def _filled(self, rows: Tensor, weights: Tensor, size: int, quota: int, generator: torch.Generator) -> Picks:
        """Add random rows; each part counts by its number of picks."""
        free = torch.ones(size, dtype=torch.bool)
        free[rows] = False
        others = free.nonzero().flatten()
        extra = others[uniform_draw(len(others), quota - len(rows), generator)]
        points = capped(mean_one(weights).double(), self.options.cap)
        both = torch.cat([rows, extra])
        order = both.argsort()
        return Picks(both[order], torch.cat([points, torch.ones(len(extra), dtype=torch.float64)])[order])
