"""The variance of random subsets is the average over all of them, and the coreset's its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from colm_ds.probe.variance import GradientVariance, worth_of
from colm_ds.randomness import private_generator
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.types import Coreset

CPU = torch.device("cpu")
TOKENS = torch.tensor([3.0, 8.0, 1.0, 5.0, 2.0])


def gradients() -> Tensor:
    """Five gradients of seven numbers with a mean that is not small."""
    return 0.5 + torch.randn(5, 7, generator=private_generator(0, "gradients"), dtype=torch.float64)


def measure(coreset: Coreset, rows: Tensor | None = None, parts: Tensor | None = None) -> dict[str, float] | None:
    """What is found of the five, taken in one after the other and two at a time."""
    rows = gradients() if rows is None else rows
    measured = GradientVariance(coreset, 5, 7, CPU, parts)
    for positions in (torch.tensor([4]), torch.tensor([0, 2]), torch.tensor([3, 1])):
        measured.observe(rows[positions], positions)
    return measured.result(SINGLE_PROCESS)


@pytest.mark.parametrize("b", [1, 2, 4, 5])
def test_average_over_all_subsets(b: int) -> None:
    rows = gradients()
    mean = rows.mean(dim=0)
    scale = float(mean.square().sum())

    def error(places: tuple[int, ...]) -> float:
        return float((rows[list(places)].mean(dim=0) - mean).square().sum()) / scale

    subsets = list(itertools.combinations(range(5), b))
    found = measure(Coreset(torch.arange(b), torch.ones(b)))
    assert found is not None
    random = sum(map(error, subsets)) / len(subsets)
    assert found["random"] == pytest.approx(random, rel=1e-9, abs=1e-12)
    assert found["coreset"] == pytest.approx(error(tuple(range(b))), rel=1e-9, abs=1e-12)
    assert ("kappa" in found) == ("worth" in found) == (b < 5)
    if b < 5:
        assert found["kappa"] == pytest.approx(found["coreset"] / random)
        worth = found["worth"]
        variance = random / (1 / b - 1 / 5)
        assert variance * (1 / worth - 1 / 5) == pytest.approx(found["coreset"])  # so many random ones are as far off


def test_weights_count() -> None:
    rows = gradients()
    mean = rows.mean(dim=0)
    found = measure(Coreset(torch.tensor([3, 0]), torch.tensor([1.5, 0.5])))
    expected = (1.5 * rows[3] + 0.5 * rows[0]) / 2 - mean
    assert found is not None
    assert found["coreset"] == pytest.approx(float(expected.square().sum() / mean.square().sum()), rel=1e-9)


def test_a_mean_over_tokens() -> None:
    """Numerator and divisor are sums over tokens, as in the step; random ones to first order."""
    rows, parts = gradients(), TOKENS
    mean = (parts.double()[:, None] * rows).sum(dim=0) / parts.sum()
    found = measure(Coreset(torch.tensor([3, 0, 1]), torch.tensor([1.5, 0.5, 1.0])), parts=parts)
    own = (1.5 * 5.0 * rows[3] + 0.5 * 3.0 * rows[0] + 8.0 * rows[1]) / (1.5 * 5.0 + 0.5 * 3.0 + 8.0)
    scale = float(mean.square().sum())
    assert found is not None
    assert found["coreset"] == pytest.approx(float((own - mean).square().sum()) / scale, rel=1e-9)
    residuals = parts.double()[:, None] * (rows - mean) / parts.double().mean()
    variance = float(residuals.square().sum()) / 4
    assert found["random"] == pytest.approx((1 / 3 - 1 / 5) * variance / scale, rel=1e-9)
    alike = measure(Coreset(torch.tensor([3, 0]), torch.ones(2)), parts=torch.full((5,), 7.0))
    assert alike == pytest.approx(measure(Coreset(torch.tensor([3, 0]), torch.ones(2))))


def test_gradients_that_are_not_finite_are_left_out() -> None:
    rows = gradients()
    rows[4, 2] = torch.nan
    found = measure(Coreset(torch.arange(4), torch.ones(4)), rows)
    assert found is not None
    assert found["coreset"] == pytest.approx(0.0, abs=1e-12)  # all four that are left
    assert measure(Coreset(torch.tensor([4]), torch.ones(1)), rows) is None  # nothing is left to compare


def test_worth() -> None:
    assert worth_of(1.0, 32, 64) == pytest.approx(32)
    assert worth_of(0.0, 32, 64) == pytest.approx(64)
    assert worth_of(0.3, 32, 64) == pytest.approx(49.23, abs=0.01)  # EVIDENCE, section 1
