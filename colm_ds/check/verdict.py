"""Conclude from a check: whether each way to choose pays, and a recommendation in one sentence."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from colm_ds.check.errors_of_coresets import CoresetError, se_of_difference
from colm_ds.check.prices import break_even
from colm_ds.check.ways_to_choose import DEFAULT, WayToChoose

MIN_GAIN = 1.05
"""Gain over the price below which nobody would notice: it takes twice the steps to see 5% of the noise."""


@dataclass(frozen=True)
class MeasuredWay:
    """Measurements of one way to choose.

    Attributes:
        way: the way to choose.
        error: error of its coresets.
        price: cost of a step over plain training's on b.
        break_even: kappa at which a coreset without bias is worth its price.
        gain: squared error of plain b's mean gradient over n steps, over that of this way; 1 is plain training. Only
            the significant part of its bias counts.
        least_gain: the same with kappa two standard errors higher.
    """

    way: WayToChoose
    error: CoresetError
    price: float
    break_even: float
    gain: float
    least_gain: float

    @property
    def better_than_random(self) -> bool:
        """Return whether kappa is below 1 by two standard errors."""
        return self.error.kappa + 2.0 * self.error.kappa_se < 1.0

    @property
    def pays(self) -> bool:
        """Return whether it gains more than it costs over the run, with kappa two standard errors higher too."""
        return self.better_than_random and self.least_gain > self.price * MIN_GAIN


def gain_over_steps(kappa: float, bias: float, variance: float, size: int, large: int, steps: int) -> float:
    """Return the squared error of plain b's mean gradient over n steps, over that of a coreset.

    Plain b: V / n. A coreset: (kappa (1 - b/r) + b/r) V / n + bias, as it inherits the large batch's own error, b/r V,
    and its bias is the same in every step. Without bias this is worth / b.

    Args:
        kappa: kappa of the coreset.
        bias: at least 0, relative to |mean gradient|^2.
        variance: V, variance of the mean of b random examples, relative to |mean gradient|^2.
        size: b.
        large: r.
        steps: n.
    """
    own = (kappa * (1.0 - size / large) + size / large) * variance / steps + bias
    return variance / steps / own if own > 0.0 else float("inf")


def measured_way(
    way: WayToChoose, error: CoresetError, price: float, variance: float, size: int, large: int, steps: int
) -> MeasuredWay:
    """Return a way to choose with the numbers derived from its error and price; see `gain_over_steps`."""
    gain, least = (
        gain_over_steps(kappa, error.shown_bias, variance, size, large, steps)
        for kappa in (error.kappa, error.kappa + 2.0 * error.kappa_se)
    )
    return MeasuredWay(way, error, price, break_even(price, size, large), gain, least)


def recommend(ways: Sequence[MeasuredWay], size: int, large: int, steps: int, resets: Sequence[str] = ()) -> str:
    """Return the recommendation, one sentence.

    Args:
        ways: all measured ways.
        size: b.
        large: r.
        steps: n.
        resets: `key=value` that plain training needs in this recipe, beside its selector.
    """
    paying = [way for way in ways if way.pays]
    if paying:
        first = max(paying, key=lambda way: way.gain / way.price)
        best = max((way for way in paying if _is_as_good(way, first)), key=_preference)
        own = ", which is this recipe's" if best.way.is_recipe else ""
        tie = "" if best is first else f", and within the error as good as {first.way.name} with {_pair(first)}"
        keys = shlex.join(best.way.keys)
        return (
            f"Take {best.way.name} ({keys}){own}{tie}: with kappa {_pair(best)} a coreset of {size} "
            f"is worth {best.error.worth:.0f} random examples, and over {steps:,} steps, {_bias(best)}, the squared "
            f"error of the mean gradient falls to {1.0 / best.gain:.2f} of plain {size}'s at {best.price:.2f} times "
            "its price."
        )
    plain = f"Nothing pays: train plainly on {size} ({' '.join(['colm.selector=random', *resets])})"
    better = [way for way in ways if way.better_than_random]
    if not better:
        lowest = min(ways, key=lambda way: way.error.kappa)
        return (
            f"{plain}, as no way to choose is better than random by two standard errors; the best is "
            f"{lowest.way.name} with kappa {_pair(lowest)}."
        )
    best = max(better, key=lambda way: way.gain / way.price)
    cheap = best.error.kappa + 2.0 * best.error.kappa_se < best.break_even
    why = (
        f"over {steps:,} steps, {_bias(best)}, this comes to a gain of {best.gain:.2f}"
        if cheap and best.gain <= best.price
        else f"at {best.price:.2f} times the price it gains {best.gain:.2f} over {steps:,} steps"
    )
    return (
        f"{plain}, as the best, {best.way.name}, has kappa {_pair(best)}, so that {size} of {large} are worth "
        f"{best.error.worth:.0f}, but {why}, which is not {100 * (MIN_GAIN - 1):.0f}% more than it costs."
    )


def _is_as_good(way: MeasuredWay, best: MeasuredWay) -> bool:
    """Return whether a way that pays cannot be told from the best: kappa, bias and price are no worse, or hardly."""
    worse = way.error.kappa - best.error.kappa
    return way is best or (
        worse <= 2.0 * se_of_difference(way.error, best.error)
        and way.error.shown_bias <= best.error.shown_bias
        and way.price <= best.price * MIN_GAIN
    )


def _preference(way: MeasuredWay) -> tuple[bool, bool, float]:
    """Order ways that are as good as each other: the recipe's own, then the default, then the best measured."""
    return way.way.is_recipe, way.way.name == DEFAULT, way.gain / way.price


def _bias(way: MeasuredWay) -> str:
    if way.error.shown_bias == 0.0:
        return "no bias being shown"
    return f"a bias of at least {way.error.shown_bias:.4f} of |mean gradient|² included"


def _pair(way: MeasuredWay) -> str:
    return f"{way.error.kappa:.2f} ± {way.error.kappa_se:.2f}"
