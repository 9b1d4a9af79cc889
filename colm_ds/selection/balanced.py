"""Balanced draws: every example as likely as any other, and the drawn ones' mean features nearly the pool's.

The cube method (Deville and Tille 2004) on the first principal components of the pool's signals. The mean gradient of
such a draw is unbiased, and what the components explain of the gradients no longer adds to its variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.errors import SelectionError

NUM_COMPONENTS = 4
"""q: directions in which a draw is balanced."""

_VARIES = 1e-6
"""Least singular value relative to the largest: below it a direction holds the round-off of float32 signals."""

_DECIDED = 1e-9
"""Inclusion probabilities this close to 0 or 1 count as 0 or 1."""


def principal_components(signals: Tensor, count: int = NUM_COMPONENTS) -> Tensor:
    """Return the first principal components of signals, each of variance 1.

    Args:
        signals: `[n, K]`.
        count: q; directions in which the signals hardly vary are left out.

    Returns:
        float64 `[n, q]`, or fewer columns.
    """
    centred = signals.double() - signals.double().mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = int((values[:count] > _VARIES * values.max().clamp_min(1e-300)).sum()) if len(values) else 0
    return left[:, :kept] * len(signals) ** 0.5


def balanced_draw(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of n examples by the cube method, each with probability count / n.

    Flight: as long as there are more undecided examples than constraints, their probabilities move along a direction
    in which no constraint changes, to one end or the other with odds that keep the mean, until one of them is 0 or 1.
    Landing: constraints are dropped one by one from the last; the number drawn is dropped last, so that it is exact.

    Args:
        features: values to balance, `[n, q]`.
        count: picks, 0 <= count <= n.
        generator: private CPU generator.

    Returns:
        Ascending places, int64 `[count]`.

    Raises:
        SelectionError: if `count` is out of range.
    """
    n = len(features)
    if not 0 <= count <= n:
        raise SelectionError(f"balanced_draw: {count} of {n} examples. Ask for 0 to {n}.")
    if count in (0, n):
        return torch.arange(count)
    constraints = torch.cat([torch.ones(n, 1, dtype=torch.float64), features.double().cpu()], dim=1)
    probability = torch.full((n,), count / n, dtype=torch.float64)
    waiting = torch.randperm(n, generator=generator).tolist()
    moving: list[int] = []
    while True:
        while waiting and len(moving) < constraints.shape[1] + 1:
            moving.append(waiting.pop())
        if len(moving) < 2:
            break
        held = constraints[moving, : min(constraints.shape[1], len(moving) - 1)]
        probability[moving] = _move(probability[moving], _unseen_direction(held), generator)
        moving = [place for place in moving if _DECIDED < float(probability[place]) < 1.0 - _DECIDED]
    return (probability > 0.5).nonzero().flatten()


def _unseen_direction(held: Tensor) -> Tensor:
    """Return a direction of m probabilities that changes none of fewer than m constraints `[m, c]`; float64 `[m]`.

    Its first entry that is not nearly 0 is positive, so that round-off in the features does not flip it.
    """
    direction = torch.linalg.svd(held.T, full_matrices=True)[2][-1]
    first = direction[(direction.abs() > 1e-3).nonzero()[0]]
    return direction * first.sign()


def _move(probability: Tensor, direction: Tensor, generator: torch.Generator) -> Tensor:
    """Move probabilities as far as possible in one direction or the other, with the odds that keep their mean."""
    far = torch.full_like(probability, torch.inf)
    rises, falls = direction > 1e-12, direction < -1e-12
    to_one, to_zero = (1.0 - probability) / direction, -probability / direction
    room_up = torch.where(rises, to_one, torch.where(falls, to_zero, far))
    room_down = torch.where(rises, -to_zero, torch.where(falls, -to_one, far))
    up, down = float(room_up.min()), float(room_down.min())
    goes_up = float(torch.rand((), generator=generator, dtype=torch.float64)) < down / (up + down)
    return (probability + (up if goes_up else -down) * direction).clamp(0.0, 1.0)
