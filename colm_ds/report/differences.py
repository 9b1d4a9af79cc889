"""Which arms an arm is held against, and whether a difference can be told from the luck of the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from colm_ds.report.arms import Arm, accumulation_steps, micro_batch_size

TINY = 0.01
"""Relative difference below which losses of single seeds are called not measurably different."""

# Two-sided 95% quantiles of Student's t by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """An arm's loss minus another's.

    Attributes:
        mean: over the seeds that both have; between their means if they share none.
        standard_error: of the mean; None where it rests on a single seed.
        relative: mean over the other's loss.
        is_measurable: by its 95% interval over seeds; with a single seed, whether it is at least `TINY`.
    """

    mean: float
    standard_error: float | None
    relative: float
    is_measurable: bool

    @property
    def is_single(self) -> bool:
        """Whether it rests on a single seed."""
        return self.standard_error is None

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if not self.is_measurable:
            return "not measurably different"
        word = "lower" if self.mean < 0 else "higher"
        return f"{word} (single seed)" if self.is_single else word


def difference(arm: Arm, other: Arm, key: str) -> Difference | None:
    """An arm's scalar minus another's; None if one of them does not have it.

    Args:
        arm: the arm.
        other: what it is held against.
        key: name of the scalar, a loss.
    """
    if key not in arm.scalars or key not in other.scalars:
        return None
    mine, theirs = _by_seed(arm, key), _by_seed(other, key)
    gaps = [mine[seed] - theirs[seed] for seed in mine if seed in theirs and seed is not None]
    a, b = arm.scalars[key], other.scalars[key]
    error: float | None = None
    if gaps:
        mean, freedom = float(np.mean(gaps)), len(gaps) - 1
        error = float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps)) if freedom else None
    else:
        mean, freedom = a.mean - b.mean, min(a.num_seeds, b.num_seeds) - 1
        if a.standard_error is not None and b.standard_error is not None:
            error = math.hypot(a.standard_error, b.standard_error)
    relative = mean / b.mean if b.mean else 0.0
    if error is None:
        return Difference(mean, None, relative, abs(relative) >= TINY)
    return Difference(mean, error, relative, abs(mean) > _t95(freedom) * error)


def ratio(arm: Arm, other: Arm, key: str) -> float | None:
    """An arm's scalar over another's; None if one of them does not have it."""
    mine, theirs = arm.mean(key), other.mean(key)
    return mine / theirs if mine is not None and theirs else None


def references(arm: Arm, arms: Sequence[Arm]) -> dict[str, Arm]:
    """Arms to hold an arm against, those of them that are there.

    Of several plain arms of one size, one with the arm's micro-batch is meant; `plain_r_steps` is another one with as
    many accumulation steps as the arm.

    Returns:
        `plain_r`: plain training on as many examples as it looks at; `plain_r_steps`: see above; `plain_b`: on as many
        as it trains on; `keep_random`: small sources kept and the rest at random, of the same sizes. Never the arm
        itself.
    """
    plain = [other for other in arms if other is not arm and other.is_plain and other.coreset_size]
    large, size = arm.large_batch_size, arm.coreset_size
    if arm.is_plain and large == size:  # trains on all it looks at: the sizes are those of the whole comparison
        sizes = [other.coreset_size for other in [*plain, arm] if other.coreset_size]
        large, size = max(sizes, default=None), min(sizes, default=None)
    found: dict[str, Arm] = {}
    for role, wanted in (("plain_r", large), ("plain_b", size)):
        if arm.is_plain and wanted == arm.coreset_size:
            continue
        of_size = [other for other in plain if other.coreset_size == wanted]
        alike = [other for other in of_size if micro_batch_size(other) == micro_batch_size(arm)]
        if of_size:
            found[role] = (alike or of_size)[0]
        steps = [other for other in of_size if accumulation_steps(other) == accumulation_steps(arm) is not None]
        if role == "plain_r" and alike and steps and found[role] not in steps:
            found["plain_r_steps"] = steps[0]
    if arm.is_plain or arm.selector in (None, "keep_random"):
        return found
    for other in arms:
        sizes_equal = (other.large_batch_size, other.coreset_size) == (arm.large_batch_size, arm.coreset_size)
        if other.selector == "keep_random" and sizes_equal:
            return found | {"keep_random": other}
    return found


def _by_seed(arm: Arm, key: str) -> dict[int | None, float]:
    return {run.seed: facts.scalars[key] for run, facts in arm.counted if key in facts.scalars}


def _t95(freedom: int) -> float:
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.5 / freedom
