"""Means over seeds and differences between arms, against numpy and scipy by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from colm_ds.report.statistics import Difference, difference, measure, ratio, t_quantile


def of(*values: float) -> dict[int | str, float]:
    return dict(enumerate(values))


def found(mine: dict[int | str, float], theirs: dict[int | str, float]) -> Difference:
    gap = difference(measure(mine), measure(theirs))
    assert gap is not None
    return gap


def test_measure() -> None:
    values = [2.0, 2.5, 3.7, 1.1]
    assert measure(of(*values)).mean == pytest.approx(np.mean(values))
    assert measure(of(*values)).standard_error == pytest.approx(stats.sem(values))
    assert measure(of(2.0)).standard_error is None
    largest = measure(of(*values), largest=True)
    assert (largest.mean, largest.standard_error, largest.num_seeds) == (3.7, None, 4)


@pytest.mark.parametrize("seed", range(20))
def test_verdict_is_that_of_a_paired_t_test(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 8))
    scatter = generator.normal(0, 0.5, count)  # of the seeds, which both share
    mine, theirs = (scatter + generator.normal(mean, 0.05, count) for mean in (2.0, 2.0 + 0.1 * (seed % 3)))
    gap = found(of(*mine), of(*theirs))
    test = stats.ttest_rel(mine, theirs)
    assert gap.mean == pytest.approx(float(np.mean(mine - theirs)))
    assert gap.mean / gap.standard_error == pytest.approx(test.statistic)  # type: ignore[operator]
    assert gap.is_measurable == (test.pvalue < 0.05)
    assert gap.seeds == tuple(range(count))


def test_quantile() -> None:
    assert [round(t_quantile(freedom), 3) for freedom in (1, 2, 10, 100)] == [12.706, 4.303, 2.228, 1.984]


def test_seeds_that_one_arm_has_alone_do_not_count() -> None:
    gap = found({0: 2.0, 1: 2.5, 2: 3.0}, {0: 2.1, 1: 2.62, 7: 9.0})
    assert gap.mean == pytest.approx(-0.11)
    assert gap.standard_error == pytest.approx(0.01)


def test_one_shared_seed_is_compared_on_that_seed() -> None:
    gap = found({0: 2.0}, {0: 1.9, 1: 5.0})
    assert gap.mean == pytest.approx(0.1)
    assert gap.standard_error is None


def test_no_shared_seed_is_compared_between_means() -> None:
    gap = found({0: 2.0, 1: 2.2}, {2: 3.0, 3: 3.4})
    assert gap.mean == pytest.approx(-1.1)
    assert gap.standard_error == pytest.approx(float(np.hypot(stats.sem([2.0, 2.2]), stats.sem([3.0, 3.4]))))
    assert gap.seeds == ()
    assert found({"run 0": 1.0}, {"run 0": 2.0}).seeds == ()  # without seeds nothing is paired


@pytest.mark.parametrize(
    ("value", "best", "verdict"),
    [
        (2.01, "min", "not measurably different"),
        (2.2, "min", "worse (single seed)"),
        (1.5, "min", "better (single seed)"),
        (2.2, "max", "better (single seed)"),
    ],
)
def test_single_seeds(value: float, best: str, verdict: str) -> None:
    assert found(of(value), of(2.0)).verdict(best) == verdict


def test_several_seeds() -> None:
    assert found(of(2.0, 2.5, 3.0), of(2.1, 2.62, 3.11)).verdict() == "better"
    assert found(of(2.0, 2.1, 2.2), of(2.15, 2.05, 2.35)).verdict() == "not measurably different"


def test_unknown_numbers() -> None:
    assert difference(None, measure(of(1.0))) is None
    assert ratio(measure(of(1.0)), None) is None
    assert ratio(measure(of(1.0)), measure(of(4.0))) == 0.25
