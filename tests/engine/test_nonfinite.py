"""Signals that are not finite: such examples are left out; a batch of nothing else ends the run with one message."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from colm_ds.errors import SelectionError
from tests.engine.cases import ESTIMATORS
from tests.engine.training import CORESET, LARGE, Case, start, step
from tests.ranks import Ranks


def train_with_broken_signals(case: Case, broken: list[int]) -> tuple[Any, str]:
    """In a rank: two steps in which the signals at the given positions are not finite."""
    engine = start(case)
    estimator: Any = engine.coreset_selector._estimator
    plain_signals = estimator.signals

    def signals(*args: Any) -> Any:
        found = plain_signals(*args)
        finite = found.finite.clone()
        finite[broken] = False
        return dataclasses.replace(found, finite=finite)

    estimator.signals = signals
    try:
        return [step(engine) for _ in range(2)], ""
    except SelectionError as error:
        return None, str(error)
    finally:
        engine.destroy()


@pytest.mark.distributed
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_some(estimator: str, pools: dict[int, Ranks]) -> None:
    broken = list(range(0, LARGE, 2))
    case = Case(estimator, colm={"probe": {"estimator": estimator}}, stage=2)
    (steps, _), other = pools[2].run(train_with_broken_signals, case, broken)
    assert [one.chosen for one in steps] == [one.chosen for one in other[0]]
    for one in steps:
        usable = {index for position, index in enumerate(one.large) if position not in broken}
        assert set(one.chosen) <= usable
        assert len(one.chosen) == one.stats["examples_trained"] == min(CORESET, len(usable))
        assert one.stats["coreset"]["nonfinite"] == len(broken)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_all(stage: int, pools: dict[int, Ranks]) -> None:
    case = Case("all", colm={"small_sources": "none"}, stage=stage)
    for _, message in pools[2].run(train_with_broken_signals, case, list(range(LARGE))):
        assert message.startswith(f"step 1: none of the {LARGE} examples has a finite signal. The model has diverged")


def train_with_broken_model(estimator: str) -> str:
    """In a rank: a step of a model with a weight that is not a number."""
    model = Case("x").build_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    engine = start(Case("x", colm={"small_sources": "none", "probe": {"estimator": estimator}}), model=model)
    try:
        step(engine)
    except SelectionError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_model_that_diverged(estimator: str, pools: dict[int, Ranks]) -> None:
    for message in pools[1].run(train_with_broken_model, estimator):
        assert message.startswith(f"step 1: none of the {LARGE} examples has a finite signal.")
