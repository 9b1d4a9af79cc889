"""Draws without replacement: uniform, weighted, systematic, by noisy scores; what makes a draw's weights unbiased."""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-12
"""Scores this close, relative to the largest in size, count as equal."""


def uniform_draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of `size` places, each as likely as any other; ascending int64 `[count]`."""
    return torch.randperm(size, generator=generator)[:count].sort().values


def weighted_draw(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw places without replacement as successive draws would: by probability, remove, renormalise, and again.

    A race: place i arrives at E_i / p_i, E_i exponential, and the first `count` are drawn. Places of probability 0 are
    drawn, uniformly, only if too few others are there.

    Args:
        probabilities: of any sum, `[n]`, at least 0.
        count: at most n.
        generator: private CPU generator; n numbers are drawn, in order of place.

    Returns:
        Ascending places, int64 `[count]`.
    """
    arrival = exponentials(len(probabilities), generator)
    chances = probabilities.double()
    possible = chances > 0
    rank = torch.where(possible, arrival / chances.clamp_min(1e-300), arrival)
    order = torch.argsort(rank, stable=True)
    first = torch.cat([order[possible[order]], order[~possible[order]]])
    return first[:count].sort().values


def softmax_draw(scores: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw places without replacement by softmax(scores / temperature): the largest scores with Gumbel noise.

    Args:
        scores: finite, `[n]`.
        count: at most n.
        temperature: above 0.
        generator: private CPU generator.

    Returns:
        Ascending places, int64 `[count]`.
    """
    noisy = scores.double() / temperature + gumbels(len(scores), generator)
    return torch.argsort(noisy, descending=True, stable=True)[:count].sort().values


def exponentials(size: int, generator: torch.Generator) -> Tensor:
    """Draw numbers of mean 1 from the exponential distribution, float64 `[size]`."""
    return -torch.log1p(-torch.rand(size, generator=generator, dtype=torch.float64))


def gumbels(size: int, generator: torch.Generator) -> Tensor:
    """Draw numbers of the standard Gumbel distribution, float64 `[size]`."""
    return -torch.log(exponentials(size, generator).clamp_min(1e-300))


def inclusion_probabilities(probabilities: Tensor, count: int) -> Tensor:
    """Approximate how likely a weighted draw includes each place: 1 - exp(-t p_i), t such that they sum to `count`.

    Args:
        probabilities: of any sum, `[n]`, at least 0, more than `count` of them above 0.
        count: places drawn, below n.

    Returns:
        float64 `[n]`.
    """
    chances = probabilities.double() / probabilities.double().sum()
    low, high = 0.0, 1.0
    while float(-torch.expm1(-high * chances).sum()) < count:
        low, high = high, 2.0 * high
    for _ in range(80):
        middle = (low + high) / 2.0
        too_few = float(-torch.expm1(-middle * chances).sum()) < count
        low, high = (middle, high) if too_few else (low, middle)
    return -torch.expm1(-high * chances)


def proportional_probabilities(sizes: Tensor, count: int) -> Tensor:
    """Return probabilities in proportion to sizes, at most 1, that sum to `count`; float64 `[n]`.

    Args:
        sizes: `[n]`, all above 0, or all 0, which counts as all alike.
        count: picks, 0 < count < n.
    """
    wide = sizes.double() if float(sizes.sum()) > 0.0 else torch.ones(len(sizes), dtype=torch.float64)
    certain = torch.zeros(len(wide), dtype=torch.bool)
    while True:
        rest = count - int(certain.sum())
        probabilities = torch.where(certain, 1.0, wide * (rest / float(wide[~certain].sum())))
        more = (probabilities >= 1.0) & ~certain
        if not bool(more.any()):
            return probabilities
        certain |= more


def systematic_draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw places with given probabilities: equal steps from a random start along them, in random order.

    Args:
        probabilities: at most 1, of a whole sum, float64 `[n]`.
        generator: private CPU generator.

    Returns:
        Whether each place is drawn, bool `[n]`; as many as the probabilities' sum.
    """
    count = round(float(probabilities.sum()))
    order = torch.randperm(len(probabilities), generator=generator)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    ends = probabilities[order].cumsum(dim=0)
    ends = ends * (count / ends[-1])  # round-off would lose or add one
    places = torch.searchsorted(ends, start + torch.arange(count), right=True).clamp_max(len(order) - 1)
    drawn = torch.zeros(len(probabilities), dtype=torch.bool)
    drawn[order[places]] = True
    return drawn


def first_largest(values: Tensor, scale: float) -> int:
    """Return the lowest place whose value is the largest, but for `TIE` times a scale.

    Args:
        values: float64 `[n]`, -inf where a place is taken.
        scale: largest size of a value at the beginning.
    """
    return int((values >= values.max() - TIE * scale).int().argmax())
