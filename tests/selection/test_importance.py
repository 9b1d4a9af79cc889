"""Draws by importance: probabilities, exchanges and weights against counting, brute force and what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.config.colm import CoLMSection
from colm_ds.config.resolve import resolve_config
from colm_ds.errors import ConfigError
from colm_ds.randomness import private_generator
from colm_ds.selection import (
    SINGLE_PROCESS,
    SelectionSettings,
    SelectorContext,
    make_selector,
    select_coreset,
)
from colm_ds.selection.draws import proportional_probabilities, systematic_draw
from colm_ds.selection.importance import (
    LEAST_CHANCE,
    chances_by_labels,
    exchange_for_balance,
    importance_draw,
)
from colm_ds.types import LargeBatch
from tests.selection.batches import SMALL, SOURCES, B, R
from tests.selection.oracles import randn
from tests.selection.test_balanced import make_signals


def probabilities_of(chances: Tensor, count: int) -> Tensor:
    """The probabilities of a draw by importance."""
    return proportional_probabilities(chances.double().clamp_min(LEAST_CHANCE * float(chances.mean())), count)


LENGTHS = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 100, 120, 150, 180, 190, 192])


def generator(seed: int) -> torch.Generator:
    return private_generator(seed, "test")


@pytest.mark.parametrize("count", [1, 3, 8, 15])
def test_probabilities_go_by_chances_up_to_certainty(count: int) -> None:
    found = probabilities_of(chances_by_labels(LENGTHS), count)
    assert float(found.sum()) == pytest.approx(count)
    assert 0.0 < float(found.min()) <= float(found.max()) <= 1.0
    below = found < 1.0
    sizes = LENGTHS.double().rsqrt()
    sizes = sizes.clamp_min(LEAST_CHANCE * sizes.mean())
    ratios = (found / sizes)[below]
    torch.testing.assert_close(ratios, ratios[0].expand_as(ratios))
    if bool((~below).any()):  # certain ones would have had more than one
        assert bool((sizes[~below] * ratios[0] >= 1.0 - 1e-12).all())


def test_chances() -> None:
    assert chances_by_labels(torch.tensor([0, 1, 4])).tolist() == [1.0, 1.0, 0.5]
    parts = torch.tensor([1.0, 4.0, 16.0])  # a mean over tokens sums T g, which grows with the square root of T
    assert chances_by_labels(torch.tensor([1, 4, 16]), parts).tolist() == [1.0, 2.0, 4.0]
    assert probabilities_of(torch.zeros(4), 2).tolist() == [0.5] * 4


def test_draws_have_the_probabilities() -> None:
    wanted, runs = probabilities_of(chances_by_labels(LENGTHS), 6), 2000
    drawn = torch.stack([systematic_draw(wanted, generator(run)) for run in range(runs)])
    assert set(drawn.sum(dim=1).tolist()) == {6}
    deviation = (wanted * (1.0 - wanted) / runs).sqrt()
    assert bool(((drawn.double().mean(dim=0) - wanted).abs() <= 4.0 * deviation + 1e-12).all())


def test_no_exchange_is_left_that_gains() -> None:
    vectors = randn(14, 5, seed=2).double()
    start = systematic_draw(torch.full((14,), 5 / 14, dtype=torch.float64), generator(3))
    found = exchange_for_balance(start, vectors, generator(0))
    assert int(found.sum()) == 5

    def length(places: Tensor) -> float:
        return float(vectors[places].sum(dim=0).square().sum())

    assert length(found) < length(start)
    for out, into in itertools.product(found.nonzero().flatten().tolist(), (~found).nonzero().flatten().tolist()):
        other = found.clone()
        other[out], other[into] = False, True
        assert length(other) >= length(found) - 1e-9


def test_parts_of_a_pool_are_exchanged_in_turn() -> None:
    vectors = randn(90, 6, seed=4).double()
    start = torch.arange(90) % 3 == 0
    found = exchange_for_balance(start, vectors, generator(0), part=20)
    assert int(found.sum()) == 30
    before, after = (float(vectors[places].sum(dim=0).square().sum()) for places in (start, found))
    assert after < 0.02 * before
    nothing_known = exchange_for_balance(start, torch.zeros(90, 3, dtype=torch.float64), generator(0))
    assert nothing_known.tolist() == start.tolist()


@pytest.mark.parametrize("by_token", [False, True])
def test_error_of_the_mean_gradient(by_token: bool) -> None:
    """Gradients of which the signals know a half: unbiased, and with less than half of a uniform draw's error."""
    n, count, runs = 48, 12, 400
    lengths = torch.randint(1, 190, (n,), generator=generator(1))
    parts = lengths.double() if by_token else torch.ones(n, dtype=torch.float64)
    known, unknown = randn(n, 6, seed=5).double(), randn(n, 20, seed=6).double() * 0.5
    gradients = torch.cat([known, unknown], dim=1) * (parts * lengths.double().rsqrt())[:, None]
    signals = gradients[:, :6]
    target = gradients.sum(dim=0) / parts.sum()

    def errors(uniform: bool) -> np.ndarray:
        found = []
        for run in range(runs):
            places, weights = torch.randperm(n, generator=generator(run))[:count], torch.ones(count)
            if not uniform:
                chances = chances_by_labels(lengths, parts)
                places, weights = importance_draw(signals, chances, parts, count, generator(run))
                inverse = count / n / probabilities_of(chances, count)[places]
                torch.testing.assert_close(weights, inverse, rtol=1e-9, atol=0.0)
            wide = weights.double()
            mean = (wide[:, None] * gradients[places]).sum(dim=0) / (wide * parts[places]).sum()
            found.append((mean - target).numpy())
        return np.array(found)

    ours, plain = errors(uniform=False), errors(uniform=True)
    squared = (ours**2).sum(axis=1).mean()
    assert squared < 0.5 * (plain**2).sum(axis=1).mean()
    assert (ours.mean(axis=0) ** 2).sum() < 0.02 * squared + 2.0 * squared / runs


def test_selector_keeps_small_sources_and_quotas() -> None:
    settings = SelectionSettings(picks="importance")
    medoids = select_coreset(SOURCES, make_signals(1), B, small=SMALL)
    chances = torch.linspace(1.0, 3.0, R)
    drawn = select_coreset(SOURCES, make_signals(1), B, small=SMALL, settings=settings, chances=chances)
    assert SOURCES[drawn.positions].bincount().tolist() == SOURCES[medoids.positions].bincount().tolist()
    assert drawn.weights[: drawn.num_kept].tolist() == [1.0] * drawn.num_kept
    of_draws = drawn.weights[drawn.num_kept :].double()
    assert float(of_draws.mean()) == pytest.approx(1.0)
    wanted = torch.zeros(R, dtype=torch.float64)  # inverse chances in each source, scaled together
    for source in set(SOURCES.unique().tolist()) - set(SMALL):
        members, picks = source == SOURCES, int((SOURCES[drawn.positions] == source).sum())
        wanted[members] = picks / int(members.sum()) / probabilities_of(chances[members], picks)
    inverse = wanted[drawn.positions[drawn.num_kept :]]
    torch.testing.assert_close(of_draws, inverse / inverse.mean(), rtol=1e-6, atol=1e-6)
    assert len(set(drawn.weights.tolist())) > 2
    again = select_coreset(SOURCES, make_signals(1), B, small=SMALL, settings=settings, chances=chances)
    assert again.positions.tolist() == drawn.positions.tolist()
    later = select_coreset(SOURCES, make_signals(1), B, small=SMALL, settings=settings, chances=chances, step=2)
    assert later.positions.tolist() != drawn.positions.tolist()


def test_no_example_has_a_chance_of_next_to_none() -> None:
    """One without a signal would else never be drawn, and one with a tiny one weigh as much as thousands."""
    chances = torch.tensor([0.0, 1e-9, 1.0, 1.0, 1.0, 1.0])
    signals, ones, drawn = torch.zeros(6, 1), torch.ones(6), torch.zeros(6)
    least = LEAST_CHANCE * 4 / 6  # of the mean chance; those of all then add up to 4 + 2 least
    for seed in range(300):
        places, weights = importance_draw(signals, chances, ones, 3, generator(seed))
        drawn[places] += 1
        assert float(weights.max()) <= 3 / 6 / (3 * least / (4 + 2 * least)) * 1.01
    assert float(drawn[:2].min()) > 0


@pytest.mark.parametrize("by", ["labels", "signal"])
def test_selector_weighs_by_labels_or_by_signals(by: str) -> None:
    settings = SelectionSettings(per_source=False, geometry="plain")
    selector = make_selector("importance", SelectorContext(B, (), settings, options={"by": by}))
    lengths = torch.arange(R) % 7 + 1
    signals = make_signals(3)
    batch = LargeBatch(1, torch.arange(R), SOURCES, lengths, lengths, torch.zeros(R, dtype=torch.int64), {})
    coreset = selector.select(batch, signals, SINGLE_PROCESS)
    assert signals.vectors is not None
    sizes = lengths.double().rsqrt() if by == "labels" else signals.vectors.double().norm(dim=1)
    probabilities = probabilities_of(sizes, B)[coreset.positions]
    wanted = 1.0 / probabilities
    torch.testing.assert_close(coreset.weights.double(), wanted / wanted.mean(), rtol=1e-6, atol=1e-6)


def test_by_name_and_in_a_section() -> None:
    assert make_selector("importance", SelectorContext(B, SMALL)).signal == "gradient"
    section = {"large_batch_size": 8, "coreset_size": 4, "selector": "importance", "probe": {"estimator": "tokens"}}
    assert CoLMSection.model_validate(section).weights == "uniform"
    with pytest.raises(ConfigError, match=r"colm\.weights = 'matched': 'importance' has weights of its own"):
        resolve_config({"colm": section | {"weights": "matched"}}, 1)
    with pytest.raises(ConfigError, match=r"colm\.options\.by"):
        resolve_config({"colm": section | {"options": {"by": "length"}}}, 1)
