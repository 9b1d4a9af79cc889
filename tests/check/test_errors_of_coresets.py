"""Errors from the Gram matrix are those of the gradients themselves, and a bias is what repeats from batch to batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from colm_ds.check.errors_of_coresets import GradientGram, LargeBatches, coreset_error
from colm_ds.randomness import private_generator
from colm_ds.types import Coreset

COUNT, LARGE, SIZE = 24, 8, 3


def gradients(seed: int = 0, count: int = COUNT) -> Tensor:
    """Of a mean loss each, float64 `[count, 5]`."""
    return 0.3 + torch.randn(count, 5, generator=private_generator(seed, "gradients"), dtype=torch.float64)


def gram_of(rows: Tensor, parts: Tensor | None = None) -> GradientGram:
    """As a check makes it; parts are labelled tokens."""
    ones = torch.ones(len(rows), dtype=torch.float64)
    summands = rows if parts is None else rows * parts[:, None]
    return GradientGram(summands @ summands.T, ones if parts is None else parts, parts is not None)


def random_coresets(batches: LargeBatches, seed: int, size: int = SIZE) -> list[Coreset]:
    """Random examples of every batch."""
    generator = private_generator(seed, "coresets")
    r = batches.examples.shape[1]
    return [Coreset(torch.randperm(r, generator=generator)[:size], torch.ones(size)) for _ in batches.examples]


def test_batches_of_a_round_share_nothing() -> None:
    batches = LargeBatches.draw(COUNT, LARGE, 7, seed=3)
    assert batches.examples.shape == (9, LARGE)
    for number in range(3):
        mine = batches.examples[batches.rounds == number].flatten()
        assert sorted(mine.tolist()) == list(range(COUNT))
    again = LargeBatches.draw(COUNT, LARGE, 7, seed=3)
    assert torch.equal(batches.examples, again.examples)
    assert LargeBatches.draw(19, 8, 4, seed=0).examples.shape == (4, 8)  # three of 19 are left over in each round


@pytest.mark.parametrize("by_token", [False, True])
def test_kappa_of_plain_loops(by_token: bool) -> None:
    rows = gradients()
    parts = torch.randint(1, 9, (COUNT,), generator=private_generator(0, "parts")).double() if by_token else None
    counted = torch.ones(COUNT, dtype=torch.float64) if parts is None else parts
    batches = LargeBatches.draw(COUNT, LARGE, 6, seed=0)
    coresets = [
        Coreset(coreset.positions, torch.tensor([0.5, 1.0, 1.5])) for coreset in random_coresets(batches, seed=1)
    ]
    found = coreset_error(gram_of(rows, parts), batches, coresets)
    own, expected = [], []
    for batch, coreset in zip(batches.examples, coresets, strict=True):
        mean = sum(counted[i] * rows[i] for i in batch) / counted[batch].sum()
        chosen = batch[coreset.positions]
        factors = coreset.weights.double() * counted[chosen]
        estimate = factors @ rows[chosen] / factors.sum()
        own.append(float((estimate - mean).square().sum()))
        residuals = counted[batch][:, None] * (rows[batch] - mean) / counted[batch].mean()
        variance = float(residuals.square().sum()) / (LARGE - 1)
        expected.append((1 / SIZE - 1 / LARGE) * variance)
    assert found.kappa == pytest.approx(sum(own) / sum(expected), rel=1e-9)


def test_kappa_is_one_on_average_over_all_subsets() -> None:
    rows = gradients(count=LARGE)
    batches = LargeBatches(torch.arange(LARGE)[None].expand(56, -1), torch.arange(56))
    coresets = [Coreset(torch.tensor(places), torch.ones(3)) for places in itertools.combinations(range(LARGE), 3)]
    found = coreset_error(gram_of(rows), batches, coresets)
    assert found.kappa == pytest.approx(1.0, rel=1e-9)
    assert found.worth == pytest.approx(SIZE)


def test_random_picks_have_no_bias_and_kappa_one() -> None:
    """Within the standard errors that are given; their size is that of the scatter from seed to seed."""
    gram, kappas, ses, biases = gram_of(gradients()), [], [], []
    for seed in range(40):
        batches = LargeBatches.draw(COUNT, LARGE, 30, seed)
        found = coreset_error(gram, batches, random_coresets(batches, seed))
        kappas.append(found.kappa)
        ses.append(found.kappa_se)
        biases.append(found.bias)
        assert found.bias_se is not None
    values, bias = torch.tensor(kappas), torch.tensor(biases)
    assert abs(float(values.mean()) - 1.0) < 3.0 * float(values.std()) / len(kappas) ** 0.5
    assert float(values.std()) == pytest.approx(sum(ses) / len(ses), rel=0.4)
    assert abs(float(bias.mean())) < 3.0 * float(bias.std()) / len(biases) ** 0.5


def test_a_bias_is_found() -> None:
    """Of a choice that prefers what lies far out in one direction: its mean error, over very many examples."""

    def extreme(rows: Tensor, batches: LargeBatches) -> list[Coreset]:
        order = [rows[batch, 0].argsort(descending=True)[:SIZE] for batch in batches.examples]
        return [Coreset(places, torch.ones(SIZE)) for places in order]

    many = gradients(seed=5, count=8 * 4000)
    large = many.view(4000, LARGE, 5)
    top = large[:, :, 0].argsort(dim=1, descending=True)[:, :SIZE]
    errors = large.gather(1, top[:, :, None].expand(-1, -1, 5)).mean(dim=1) - large.mean(dim=1)
    true = float(errors.mean(dim=0).square().sum())
    found = []
    for seed in range(30):
        rows = gradients(seed=seed, count=48)
        batches = LargeBatches.draw(48, LARGE, 24, seed)
        gram = gram_of(rows)
        error = coreset_error(gram, batches, extreme(rows, batches))
        found.append(error.bias * gram.mean_square())
    disjoint = torch.tensor(found)
    se = float(disjoint.std()) / len(found) ** 0.5
    assert abs(float(disjoint.mean()) - true) < 3.0 * se
    assert error.shown_bias > 0.0


def test_preferred_examples_are_no_bias_of_the_data() -> None:
    """A choice by a mark that says nothing of the gradients is unbiased; pairs that share examples say otherwise."""
    disjoint, every, shown = [], [], 0
    for seed in range(60):
        rows = gradients(seed=seed, count=32)
        mark = torch.randn(32, generator=private_generator(seed, "mark"))
        batches = LargeBatches.draw(32, LARGE, 24, seed)
        coresets = [
            Coreset(mark[batch].argsort(descending=True)[:SIZE], torch.ones(SIZE)) for batch in batches.examples
        ]
        gram = gram_of(rows)
        error = coreset_error(gram, batches, coresets)
        disjoint.append(error.bias * gram.mean_square())
        every.append(error.bias_within_sample * gram.mean_square())
        shown += error.shown_bias > 0.0
    first, second = torch.tensor(disjoint), torch.tensor(every)
    assert abs(float(first.mean())) < 3.0 * float(first.std()) / len(disjoint) ** 0.5
    assert float(second.mean()) > 5.0 * float(second.std()) / len(every) ** 0.5
    assert shown <= 6  # of 60, beyond two standard errors
