"""What pays follows from kappa, bias, price and steps, and the sentence says so."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from typing import Any

import pytest

from colm_ds.check.errors_of_coresets import CoresetError, se_of_difference
from colm_ds.check.prices import break_even
from colm_ds.check.verdict import MeasuredWay, gain_over_steps, measured_way, recommend
from colm_ds.check.ways_to_choose import DEFAULT, WayToChoose
from colm_ds.config.colm import CoLMSection, ProbeConfig
from colm_ds.probe.variance import worth_of
from colm_ds.selection import SelectionSettings

SIZE, LARGE, STEPS = 32, 64, 100


def way(
    name: str, kappa: float, *, se: float = 0.02, bias: float = 0.0, price: float = 1.0, steps: int = STEPS
) -> MeasuredWay:
    """A way to choose with these numbers, of a random variance of 0.5."""
    error = CoresetError(kappa, se, worth_of(kappa, SIZE, LARGE), bias, 0.0, bias)
    made = WayToChoose(name, "colm", ProbeConfig(), SelectionSettings(), (), (f"key={name}",))
    return measured_way(made, error, price, 0.5, SIZE, LARGE, steps)


@pytest.mark.parametrize(("price", "kappa"), [(1.25, 0.6), (4 / 3, 0.5), (5 / 3, 0.2), (2.0, 0.0), (1.0, 1.0)])
def test_break_even(price: float, kappa: float) -> None:
    assert break_even(price, 64, 128) == pytest.approx(kappa, abs=1e-9)
    assert worth_of(kappa, 64, 128) / 64 == pytest.approx(price)
    assert gain_over_steps(kappa, 0.0, 0.3, 64, 128, 50) == pytest.approx(price)


def test_a_bias_counts_more_over_more_steps() -> None:
    gains = [gain_over_steps(0.3, 0.003, 0.5, SIZE, LARGE, steps) for steps in (1, 10, 100, 1000)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == pytest.approx(worth_of(0.3, SIZE, LARGE) / SIZE, rel=0.02)
    assert gains[-1] < 1.0


def test_the_best_is_recommended() -> None:
    said = recommend([way("a", 0.5), way("b", 0.3), way("c", 0.2, price=1.6)], SIZE, LARGE, STEPS)
    assert said.startswith("Take b (key=b): with kappa 0.30 ± 0.02 a coreset of 32 is worth 49 random examples")
    assert said.count(". ") == 0
    assert said.endswith("at 1.00 times its price.")


def own(made: MeasuredWay, **changes: Any) -> MeasuredWay:
    return replace(made, way=replace(made.way, is_recipe=True, **changes))


def test_among_equals_the_recipes_own_is_recommended() -> None:
    """Within twice the standard error of the difference, hypot(0.02, 0.02) = 0.028."""
    best = way("best", 0.30)
    said = recommend([best, own(way("own", 0.35))], SIZE, LARGE, STEPS)
    assert said.startswith("Take own (key=own), which is this recipe's, and within the error as good as best with 0.30")
    assert recommend([own(best), way("other", 0.25)], SIZE, LARGE, STEPS).startswith("Take best (key=best), which is")
    for worse in (way("own", 0.36), way("own", 0.3, price=1.1), way("own", 0.3, bias=0.001)):
        assert recommend([best, own(worse)], SIZE, LARGE, STEPS).startswith("Take best (key=best): ")
    default = way(DEFAULT, 0.34)
    assert recommend([best, default], SIZE, LARGE, STEPS).startswith(f"Take {DEFAULT} (")
    assert recommend([best, default, own(way("own", 0.35))], SIZE, LARGE, STEPS).startswith("Take own ")


def test_differences_are_taken_batch_by_batch() -> None:
    """Batches that are hard for both do not blur the difference."""
    noise = [0.5, -0.3, -0.1, -0.1]
    a, b = (
        [value + small for value, small in zip(noise, more, strict=True)] for more in ((0.01, -0.01, 0, 0), (0,) * 4)
    )
    errors = [CoresetError(kappa, 0.2, 40.0, 0.0, 0.0, 0.0, tuple(each)) for kappa, each in ((0.3, a), (0.4, b))]
    assert se_of_difference(*errors) == pytest.approx(statistics.stdev([0.01, -0.01, 0, 0]) / 2)
    bare = [replace(error, deviations=()) for error in errors]
    assert se_of_difference(*bare) == pytest.approx(0.2 * 2**0.5)


def test_the_default_is_that_of_tokens() -> None:
    section = CoLMSection.model_validate({"large_batch_size": 4, "probe": {"estimator": "tokens"}})
    pool = "per source" if section.per_source else "one pool"
    assert f"{section.selector} by {section.probe.estimator}, {pool}" == DEFAULT


@pytest.mark.parametrize(
    ("ways", "why"),
    [
        ([way("a", 1.2), way("b", 0.97)], "no way to choose is better than random by two standard errors; .* b with"),
        ([way("a", 0.9, se=0.06)], "no way to choose is better than random by two standard errors"),
        ([way("a", 0.4, price=2.0)], r"at 2\.00 times the price it gains 1\.43"),
        ([way("a", 0.3, bias=0.01)], r"a bias of at least 0\.0100 .* comes to a gain of 0\.38"),
        ([way("a", 0.95, se=0.01)], "is not 5% more than it costs"),
    ],
)
def test_nothing_pays(ways: list[MeasuredWay], why: str) -> None:
    assert not any(each.pays for each in ways)
    said = recommend(ways, SIZE, LARGE, STEPS)
    assert said.startswith("Nothing pays: train plainly on 32 (colm.selector=random), as ")
    assert re.search(why, said), said
