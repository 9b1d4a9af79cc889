"""Balanced draws: sizes, inclusion probabilities and imbalance, against counting and the laws that they promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.config.colm import CoLMSection
from colm_ds.config.resolve import resolve_config
from colm_ds.errors import ConfigError, SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection import Exchange, SelectionSettings, SelectorContext, Signals, make_selector, select_coreset
from colm_ds.selection.balanced import balanced_draw, principal_components
from colm_ds.types import Coreset
from tests.selection.batches import SMALL, SOURCES, B, R, all_finite
from tests.selection.oracles import randn
from tests.selection.test_ranks import run_ranks


def draws(features: Tensor, count: int, runs: int) -> np.ndarray:
    """Which examples each run drew, bool `[runs, n]`."""
    found = np.zeros((runs, len(features)), dtype=bool)
    for run in range(runs):
        found[run, balanced_draw(features, count, private_generator(run, "test")).numpy()] = True
    return found


def imbalance(features: Tensor, chosen: np.ndarray) -> float:
    """Mean squared distance of the chosen ones' mean features to those of all."""
    x = features.double().numpy()
    count = chosen[0].sum()
    return float((((chosen.astype(float) @ x) / count - x.mean(axis=0)) ** 2).sum(axis=1).mean())


def simple_random_imbalance(features: Tensor, count: int) -> float:
    """The same of drawing without looking: (1 - count / n) / count times the variance."""
    n = len(features)
    return float((1 - count / n) / count * features.double().var(dim=0, correction=1).sum())


@pytest.mark.parametrize(("n", "count", "q"), [(12, 4, 2), pytest.param(16, 8, 3, marks=pytest.mark.slow), (20, 7, 4)])
def test_size_inclusion_and_balance(n: int, count: int, q: int) -> None:
    features, runs = randn(n, q, seed=n), 700
    chosen = draws(features, count, runs)
    assert (chosen.sum(axis=1) == count).all()
    share = count / n
    deviation = (share * (1 - share) / runs) ** 0.5
    assert np.abs(chosen.mean(axis=0) - share).max() < 4 * deviation
    assert imbalance(features, chosen) < 0.6 * simple_random_imbalance(features, count)


def test_many_examples_are_balanced_closely() -> None:
    features = randn(200, 4, seed=1)
    chosen = draws(features, 50, 60)
    assert imbalance(features, chosen) < 0.05 * simple_random_imbalance(features, 50)


def test_given_cases(shared_data: Path) -> None:
    """Statistics of another implementation, with other random numbers."""
    cases = json.loads((shared_data.parent / "systems_vectors" / "cube.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        features, runs = torch.tensor(case["features"]), 1000
        chosen = draws(features, case["b"], runs)
        assert set(chosen.sum(axis=1).tolist()) == set(case["sizes"])
        deviation = (case["target"] * (1 - case["target"]) / runs) ** 0.5
        assert np.abs(chosen.mean(axis=0) - case["target"]).max() < 4 * deviation
        assert imbalance(features, chosen) == pytest.approx(case["mean_squared_imbalance"], rel=0.25)
        wanted = simple_random_imbalance(features, case["b"])
        assert wanted == pytest.approx(case["same_of_simple_random"], rel=0.1)


def test_edges() -> None:
    features, generator = randn(6, 2, seed=3), private_generator(0, "edges")
    assert balanced_draw(features, 0, generator).tolist() == []
    assert balanced_draw(features, 6, generator).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(balanced_draw(torch.zeros(6, 0), 2, generator)) == 2
    assert len(balanced_draw(torch.ones(6, 3), 5, generator)) == 5
    with pytest.raises(SelectionError, match="7 of 6 examples"):
        balanced_draw(features, 7, generator)


def test_without_features_it_is_a_random_draw() -> None:
    chosen = draws(torch.zeros(10, 0), 3, 1500)
    pairs = chosen.T.astype(float) @ chosen / 1500
    off = pairs[~np.eye(10, dtype=bool)]
    assert np.abs(off - 3 / 10 * 2 / 9).max() < 0.04


def test_principal_components() -> None:
    signals = randn(40, 3, seed=5) @ randn(3, 30, seed=6)
    found = principal_components(signals, 4)
    assert found.shape == (40, 3)  # there are no more directions
    torch.testing.assert_close(found.T @ found / 40, torch.eye(3, dtype=torch.float64))
    assert principal_components(torch.ones(5, 4)).shape == (5, 0)


def make_signals(step: int) -> Signals:
    return Signals(torch.arange(R), all_finite(), vectors=randn(R, 9, seed=step))


def test_selector_keeps_small_sources_and_quotas() -> None:
    settings = SelectionSettings(picks="balanced")
    medoids = select_coreset(SOURCES, make_signals(1), B, small=SMALL)
    drawn = select_coreset(SOURCES, make_signals(1), B, small=SMALL, settings=settings)
    assert SOURCES[drawn.positions].bincount().tolist() == SOURCES[medoids.positions].bincount().tolist()
    assert drawn.weights.tolist() == [1.0] * B
    again = select_coreset(SOURCES, make_signals(1), B, small=SMALL, settings=settings)
    assert again.positions.tolist() == drawn.positions.tolist()
    later = select_coreset(SOURCES, make_signals(1), B, small=SMALL, settings=settings, step=2)
    assert later.positions.tolist() != drawn.positions.tolist()


@pytest.mark.parametrize("picks", ["balanced", "importance"])
def test_ranks_draw_alike(picks: str) -> None:
    settings = SelectionSettings(picks=picks, per_source=False)
    vectors = randn(R, 9, seed=1)
    wanted = select_coreset(SOURCES, make_signals(1), B, settings=settings)

    def choose(exchange: Exchange) -> Coreset:
        mine = torch.arange(R)[int(not exchange.is_main) :: 2]
        signals = Signals(mine, all_finite(), vectors=vectors[mine])
        return select_coreset(SOURCES, signals, B, settings=settings, exchange=exchange)

    for found, _ in run_ranks(choose):
        assert found.positions.tolist() == wanted.positions.tolist()
        assert found.weights.tolist() == wanted.weights.tolist()


def test_by_name_and_in_a_section() -> None:
    assert make_selector("balanced", SelectorContext(B, SMALL)).signal == "gradient"
    section = {"large_batch_size": 8, "coreset_size": 4, "selector": "balanced", "probe": {"estimator": "tokens"}}
    assert CoLMSection.model_validate(section).weights == "uniform"
    with pytest.raises(ConfigError, match=r"colm\.weights = 'matched': 'balanced' has weights"):
        resolve_config({"colm": section | {"weights": "matched"}}, 1)
