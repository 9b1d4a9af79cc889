"""Means over seeds with their standard errors, and differences between arms with a verdict.

± is the standard error of the mean over seeds, everywhere in reports and sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TINY = 0.01
"""Relative difference below which numbers of single seeds are called not measurably different."""


@dataclass(frozen=True)
class Measure:
    """A number of an arm.

    Attributes:
        mean: over seeds.
        standard_error: of that mean; None for one seed, and for peaks, of which the largest counts.
        by_seed: what was averaged; runs without a seed have a text as key and are never paired.
    """

    mean: float
    standard_error: float | None
    by_seed: Mapping[int | str, float]

    @property
    def num_seeds(self) -> int:
        """Return how many seeds it rests on."""
        return len(self.by_seed)


@dataclass(frozen=True)
class Difference:
    """A number of one arm minus that of another.

    Attributes:
        mean: over the seeds that both have; between their means if they share none.
        standard_error: of the mean; None where it rests on a single seed.
        relative: mean over the other's number.
        is_measurable: by its 95% interval (Student's t) over seeds; with a single seed, whether it is at least `TINY`.
        seeds: that were paired.
    """

    mean: float
    standard_error: float | None
    relative: float
    is_measurable: bool
    seeds: tuple[int, ...]

    def verdict(self, best: str | None = "min") -> str:
        """Put the difference into words; `best` says which of two numbers is better, "min" or "max"."""
        if not self.is_measurable:
            return "not measurably different"
        word = "better" if (self.mean < 0) == (best != "max") else "worse"
        return word if self.standard_error is not None else f"{word} (single seed)"


def measure(by_seed: Mapping[int | str, float], *, largest: bool = False) -> Measure:
    """Average a number over seeds; or take the largest, without an error."""
    values = list(by_seed.values())
    if largest:
        return Measure(max(values), None, by_seed)
    return Measure(float(np.mean(values)), standard_error(values), by_seed)


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of the mean of `values`, None for fewer than two."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def difference(mine: Measure | None, theirs: Measure | None) -> Difference | None:
    """Subtract `theirs` from `mine`, seed by seed where they share seeds; None if one of them is missing."""
    if mine is None or theirs is None:
        return None
    seeds = tuple(seed for seed in mine.by_seed if isinstance(seed, int) and seed in theirs.by_seed)
    if seeds:
        gaps = [mine.by_seed[seed] - theirs.by_seed[seed] for seed in seeds]
        mean, error, freedom = float(np.mean(gaps)), standard_error(gaps), len(gaps) - 1
    else:
        mean, error = mine.mean - theirs.mean, None
        freedom = min(mine.num_seeds, theirs.num_seeds) - 1
        if mine.standard_error is not None and theirs.standard_error is not None:
            error = math.hypot(mine.standard_error, theirs.standard_error)
    relative = mean / theirs.mean if theirs.mean else 0.0
    if error is None:
        return Difference(mean, None, relative, abs(relative) >= TINY, seeds)
    return Difference(mean, error, relative, abs(mean) > t_quantile(freedom) * error, seeds)


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95% quantile of Student's t with so many degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def ratio(mine: Measure | None, theirs: Measure | None) -> float | None:
    """Divide one mean by another; None if one of them is missing."""
    return mine.mean / theirs.mean if mine is not None and theirs is not None and theirs.mean else None
