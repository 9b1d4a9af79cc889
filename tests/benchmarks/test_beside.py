"""The choice of step t + 1 beside the training of step t, as the GPU measurements make it."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.gpu import beside
from benchmarks.gpu.beside import ChoosingBeside
from colm_ds.config.resolve import resolve_config
from colm_ds.errors import ConfigError
from tests.engine.training import Case, start
from tests.ranks import Ranks

STEPS = 4

Choice = tuple[list[int], list[float]]
"""Dataset indices of a coreset, and their weights."""


def choices(case: Case, lr: float, is_beside: bool) -> tuple[list[Choice], list[float]]:
    """In a rank: the coresets that a run's steps train on, and their losses."""
    engine = start(with_rate(case, lr))
    if is_beside:
        config = resolve_config(with_rate(case, lr).config(), 1)
        engine = ChoosingBeside(engine.deepspeed_engine, config, engine.loader.dataset)
    taken: list[Choice] = []
    update = engine._update

    def noted(selection: Any, *others: Any) -> Any:
        indices = selection.batch.indices[selection.positions].tolist()
        taken.append((indices, selection.weights.tolist()))
        return update(selection, *others)

    engine._update = noted
    try:
        stats = [engine.train_batch() for _ in range(STEPS)]
        assert all({"probe", "exchange", "select", "train", "step"} <= one.time_s.keys() for one in stats)
        return taken, [one.loss for one in stats]
    finally:
        engine.destroy()


def with_rate(case: Case, lr: float) -> Case:
    """Return a case with another learning rate."""
    optimizer = copy.deepcopy(case.config()["optimizer"])
    optimizer["params"] |= {"lr": lr, "weight_decay": 0.0}
    return replace(case, deepspeed={"optimizer": optimizer})


@pytest.mark.distributed
@pytest.mark.parametrize("estimator", ["spsa", "exact"])
def test_signals_are_one_step_old_and_nothing_else_is_different(estimator: str, pools: dict[int, Ranks]) -> None:
    """Without updates all is as ever; with updates step 2 chooses by the first weights, and later ones do not."""
    case = Case("beside", stage=2, lora=True, colm={"replay": "off", "probe": {"estimator": estimator}})
    (still,), (same,), (moved,), (old,) = (
        pools[1].run(choices, case, lr, is_beside)
        for lr, is_beside in ((0.0, False), (0.0, True), (0.5, False), (0.5, True))
    )
    assert same == still
    assert old[0][:2] == still[0][:2]
    assert old[0][:2] != moved[0][:2]
    assert old[0][2:] != still[0][2:]
    assert old[1][1] != still[1][1]  # trained on by the weights after the first update


def runs_beside(kind: str) -> bool:
    """In a rank: whether the choice of step 2 can wait for the training of step 1."""
    case = Case("beside", lora=True, colm={"replay": "off"})
    engine = start(case)
    made = getattr(beside, kind)(engine.deepspeed_engine, resolve_config(case.config(), 1), engine.loader.dataset)
    trained, waited = threading.Event(), []
    choose, update = made.coreset_selector._choose, made._update

    def waiting(observed: Any, meter: Any) -> Any:
        if observed.batch.step == 2:
            waited.append(trained.wait(10.0))
        return choose(observed, meter)

    def noted(*arguments: Any) -> Any:
        result = update(*arguments)
        trained.set()
        return result

    made.coreset_selector._choose, made._update = waiting, noted
    try:
        for _ in range(2):
            made.train_batch()
        return waited == [True]
    finally:
        engine.destroy()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ChoosingBeside", "ChoosingBefore"])
def test_the_choice_runs_beside_training_and_its_control_before_it(kind: str, pools: dict[int, Ranks]) -> None:
    assert pools[1].run(runs_beside, kind) == [kind == "ChoosingBeside"]


def refused(colm: dict[str, Any]) -> str:
    """In a rank: the message of an engine that cannot choose beside training."""
    engine = start(Case("refused", colm={"replay": "off"}))
    try:
        config = resolve_config(Case("refused", colm=colm).config(), 1)
        with pytest.raises(ConfigError) as caught:
            ChoosingBeside(engine.deepspeed_engine, config, engine.loader.dataset)
        return str(caught.value)
    finally:
        engine.destroy()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "colm",
    [
        {"replay": "off", "schedule": {"every": 2}},
        {"replay": "off", "probe": {"estimator": "tokens"}},
        {"replay": "off", "selector": "random"},
        {"replay": "auto"},
    ],
)
def test_what_cannot_be_chosen_beside_training_is_refused(colm: dict[str, Any], pools: dict[int, Ranks]) -> None:
    (message,) = pools[1].run(refused, colm)
    assert "replay: off" in message
