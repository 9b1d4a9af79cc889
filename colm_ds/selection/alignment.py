"""GREATS and OPUS: picks whose update lowers a target's loss most, less what picks have in common.

GREATS (Wang et al., NeurIPS 2024) takes the best one each time; OPUS (2026) scales gradients as Adam does and draws
from a Boltzmann distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.draws import TIE, first_largest, gumbels
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector
from colm_ds.types import LargeBatch


def greedy_by_utility(
    scores: Tensor, interaction: Tensor, count: int, *, self_term: bool = False, stop: bool = False
) -> Tensor:
    """Pick the largest score, subtract its interaction from all others, and again; ties go to the lower place.

    Each pick adds its gain to the utility sum_i a_i - sum_{i<j} G_ij, with the self term also - sum_i G_ii / 2.

    Args:
        scores: a, first-order decrease of the target's loss by each example, `[n]`.
        interaction: G, `[n, n]`.
        count: picks, at most n.
        self_term: whether an example's own second-order term counts.
        stop: end before the first pick that adds nothing.

    Returns:
        Places in pick order, int64 `[count]`, fewer if stopped; at least one.
    """
    gains = scores.double().clone()
    products = interaction.double()
    if self_term:
        gains -= products.diagonal() / 2.0
    scale = float(gains.abs().max()) if len(gains) else 0.0
    picks: list[int] = []
    while len(picks) < count:
        chosen = first_largest(gains, scale)
        if stop and picks and float(gains[chosen]) <= TIE * scale:
            break
        picks.append(chosen)
        gains -= products[chosen]
        gains[picks] = -torch.inf
    return torch.tensor(picks, dtype=torch.int64)


def boltzmann_greedy(
    scores: Tensor, interaction: Tensor, count: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Draw from softmax(scores / temperature), subtract the drawn one's interaction from all others, and again.

    Args:
        scores: `[n]`.
        interaction: `[n, n]`.
        count: draws, at most n.
        temperature: above 0.
        generator: private CPU generator.

    Returns:
        Places in the order of the draws, int64 `[count]`.
    """
    gains, products = scores.double().clone(), interaction.double()
    picks: list[int] = []
    for _ in range(count):
        chosen = int((gains / temperature + gumbels(len(gains), generator)).argmax())
        picks.append(chosen)
        gains -= products[chosen]
        gains[picks] = -torch.inf
    return torch.tensor(picks, dtype=torch.int64)


def adam_factor(lr: float, beta1: float, step: int) -> float:
    """Return lr (1 - beta1) / (1 - beta1^t): Adam's factor of a gradient over a corrected root of v."""
    return lr * (1.0 - beta1) / (1.0 - beta1**step)


def balancing_rate(scores: Tensor, products: Tensor, count: int) -> float:
    """Return the learning rate at which first and second term of `count` picks are of one size.

    Args:
        scores: first-order terms per unit of the rate, `[n]`.
        products: products of gradients, `[n, n]`.
        count: picks.
    """
    n = len(scores)
    between = (products.abs().sum() - products.diagonal().abs().sum()) / max(1, n * (n - 1))
    return float(scores.abs().mean() / (count * between).clamp_min(1e-300)) if float(between) > 0.0 else 1.0


class _Aligned(PoolSelector):
    """Base of selectors that compare gradients with the mean gradient of a target."""

    signal: str | None = "gradient"
    needs_target = True

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._mean: Tensor | None = None

    def prepare(self, batch: LargeBatch, usable: Tensor, target: Tensor | None) -> None:
        """Take the mean gradient of the step's target examples, averaged over earlier steps if asked for."""
        if target is None:
            raise SelectionError(f"selector {self.name!r} was given no target. Write colm.target.")
        keep, mean = self.options.average, target.mean(dim=0)
        self._mean = mean if self._mean is None or keep == 0.0 else keep * self._mean + (1.0 - keep) * mean

    def state_dict(self) -> dict[str, Any]:
        """Return the average of the target's gradient, if one is kept."""
        return {"target": self._mean} if self.options.average and self._mean is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._mean = state.get("target")

    def _terms(self, pool: PoolExamples) -> tuple[Tensor, Tensor]:
        """Return products with the target's mean, float64 `[n]`, and with each other, `[n, n]`."""
        assert self._mean is not None
        return pool.signals @ self._mean, pool.signals @ pool.signals.T


_AVERAGE = "share of earlier steps in the target's gradient; needs probe.refresh run"


@dataclass(frozen=True)
class GreatsOptions:
    """Options of `greats`."""

    eta: str | float = option(
        "lr", "step size: lr, auto (both terms alike), or a number", choices=("lr", "auto"), low=0.0
    )
    self_term: bool = option(False, "count an example's own second-order term")
    normalise: bool = option(False, "compare directions: gradients and target scaled to length 1")
    stop: bool = option(False, "train on fewer once no pick adds anything")
    average: float = option(
        0.0, "share of earlier steps in the target's gradient; needs probe.refresh run", low=0.0, high=0.999
    )


class GreatsSelector(_Aligned):
    """The picks that lower the target's loss most by the second-order expansion of one step."""

    name = "greats"
    Options = GreatsOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        options = self.options
        first, products = self._terms(pool)
        if options.normalise:
            assert self._mean is not None
            lengths = products.diagonal().clamp_min(0.0).sqrt()
            unit = torch.where(lengths > 0.0, 1.0 / lengths.clamp_min(1e-300), 0.0)
            first = first * unit / self._mean.norm().clamp_min(1e-300)
            products = products * torch.outer(unit, unit)
        if options.eta == "auto":
            eta = balancing_rate(first, products, quota)
        elif options.eta == "lr":
            eta = _known_rate(pool.batch, self.name)
        else:
            eta = float(options.eta)
        # At a rate of 0 (a warm-up's first step) the order is that of vanishing rates.
        second = products * eta if eta > 0.0 else torch.zeros_like(products)
        return Picks(greedy_by_utility(first, second, quota, self_term=options.self_term, stop=options.stop))


@dataclass(frozen=True)
class OpusOptions:
    """Options of `opus`."""

    temperature: float = option(0.9, "of the Boltzmann distribution; the original takes 0.8 for Qwen", low=1e-9)
    scale: str = option(
        "std",
        "std: scores over their standard deviation, interaction as large as they are; or raw as the original",
        choices=("std", "raw"),
    )
    average: float = option(
        0.0, "share of earlier steps in the target's gradient; needs probe.refresh run", low=0.0, high=0.999
    )


class OpusSelector(_Aligned):
    """Draws by Adam-scaled alignment with a target, less what the drawn ones have in common."""

    name = "opus"
    Options = OpusOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        scores, products = self._terms(pool)
        if self.options.scale == "raw":
            rate = _known_rate(pool.batch, self.name)
            unit = adam_factor(rate, self.context.betas[0], pool.batch.step)
            interaction = unit**2
        else:
            deviation = float(scores.std(correction=0))
            unit = 1.0 / deviation if deviation > 0.0 else 0.0
            interaction = unit * balancing_rate(scores, products, quota)  # both keep their size if gradients are scaled
        return Picks(
            boltzmann_greedy(scores * unit, products * interaction, quota, self.options.temperature, generator)
        )


def _known_rate(batch: LargeBatch, name: str) -> float:
    if batch.lr is None:
        raise SelectionError(f"selector {name!r}: the learning rate is unknown. Give the optimizer, or choose options.")
    return batch.lr
