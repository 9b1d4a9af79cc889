"""Importance sampling, balanced: examples with longer gradients are likelier and count less, and the draw is mended.

The gradient of an example's mean loss is the shorter the more labelled tokens it has, nearly by the square root. A draw
with chances in proportion and weights of their inverse has the pool's mean gradient in expectation and less variance
than a uniform one. Exchanging drawn examples for others until no exchange brings the draw's mean signal nearer to the
pool's takes away what the signals know of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.selection.draws import proportional_probabilities, systematic_draw
from colm_ds.selection.options import option

LEAST_CHANCE = 0.1
"""Least chance relative to the mean one: no weight is more than ten times the mean one."""

PART = 256
"""Examples between which exchanges are compared in one matrix; larger pools are divided at random."""

_NO_GAIN = 1e-9
"""Exchanges that gain up to this, relative to the mean squared signal, are round-off."""


@dataclass(frozen=True)
class ImportanceOptions:
    """Options of `importance`."""

    by: str = option(
        "labels",
        "chances by 1 / sqrt(labelled tokens), which gradients of mean losses go by, or by the signal's length",
        choices=("labels", "signal"),
    )


def chances_by_labels(num_label_tokens: Tensor, parts: Tensor | None = None) -> Tensor:
    """Return the usual length of each example's part of the gradient, up to a common factor, float64 `[r]`.

    Args:
        num_label_tokens: T, int64 `[r]`.
        parts: weight of each example in the divisor of the step's mean, `[r]`; None: 1.
    """
    lengths = num_label_tokens.double().clamp_min(1.0).rsqrt()
    return lengths if parts is None else lengths * parts.double()


def exchange_for_balance(drawn: Tensor, vectors: Tensor, generator: torch.Generator, part: int = PART) -> Tensor:
    """Exchange drawn places for others, the best exchange first, until none makes the sum of vectors shorter.

    Args:
        drawn: bool `[n]`.
        vectors: what each place adds to the sum, float64 `[n, K]`.
        generator: private CPU generator; divides more than `part` places.
        part: places between which exchanges are looked for at once.

    Returns:
        As many places as were drawn, bool `[n]`.
    """
    drawn = drawn.clone()
    parts = [torch.arange(len(drawn))]
    if len(drawn) > part:
        number = -(-len(drawn) // part)
        parts = list(torch.randperm(len(drawn), generator=generator).tensor_split(number))
    total = vectors[drawn].sum(dim=0)
    limit = -_NO_GAIN * float(torch.linalg.vector_norm(vectors)) ** 2 / len(vectors)
    for places in parts:
        rows, inside = vectors[places], drawn[places]
        others = total - rows[inside].sum(dim=0)
        products = rows @ rows.T
        along, squares = rows @ total, products.diagonal()
        for _ in range(int(inside.sum())):
            taken, free = inside.nonzero().flatten(), (~inside).nonzero().flatten()
            if not len(taken) or not len(free):
                break
            # |t - a + c|^2 - |t|^2 = (|a|^2 - 2 t.a) + (|c|^2 + 2 t.c) - 2 a.c
            leaves = squares[taken] - 2.0 * along[taken]
            enters = squares[free] + 2.0 * along[free]
            gains = products[taken][:, free].mul_(-2.0).add_(leaves[:, None]).add_(enters)
            best = int(gains.argmin())
            if not float(gains.flatten()[best]) < limit:
                break
            out, into = taken[best // len(free)], free[best % len(free)]
            inside[out], inside[into] = False, True
            along += products[:, into] - products[:, out]
        drawn[places] = inside
        total = others + rows[inside].sum(dim=0)
    return drawn


def importance_draw(
    signals: Tensor, chances: Tensor, sizes: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `count` of n examples by importance, and exchange until the draw's mean signal is as near as it gets.

    Args:
        signals: c_i, `[n, K]`.
        chances: in proportion to which examples are drawn, `[n]`.
        sizes: t_i, parts in the divisor of the step's mean, `[n]`: 1, or labelled tokens in a mean over tokens.
        count: picks, 0 < count < n.
        generator: private CPU generator.

    Returns:
        Ascending places, int64 `[count]`, and weights count / n over the probability, float64 `[count]`: of mean 1
        in expectation before exchanges.
    """
    likely = chances.double()
    probabilities = proportional_probabilities(likely.clamp_min(LEAST_CHANCE * float(likely.mean())), count)
    parts = sizes.double()
    deviations = signals.to(torch.float64, copy=True)
    mean = deviations.sum(dim=0) / parts.sum()
    deviations.addr_(parts, mean, alpha=-1.0).div_(probabilities[:, None])
    drawn = exchange_for_balance(systematic_draw(probabilities, generator), deviations, generator)
    places = drawn.nonzero().flatten()
    return places, (count / len(parts)) / probabilities[places]
