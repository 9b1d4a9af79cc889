"""What engine, loader and skip counter hold goes into a state and back, and the next steps are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from colm_ds.engine.skipped_steps import SkippedSteps
from tests.engine.training import Case, parameters, start, step
from tests.ranks import Ranks


def test_skip_counter() -> None:
    counter = SkippedSteps(limit=3)
    for skipped in (True, False, True, True):
        counter.note(skipped)
    for state in (counter.state_dict(), (3, 2)):  # the pair is version 0.1.0's
        other = SkippedSteps(limit=3)
        other.load_state_dict(state)  # type: ignore[arg-type]
        assert (other.total, other.in_a_row) == (3, 2)
        assert other.state_dict() == counter.state_dict()


def round_trip(case: Case, other_sources: bool) -> dict[str, Any]:
    """In a rank: train, take the state, go on; a second engine with the first one's weights and state goes on alike."""
    import copy

    first = start(case)
    if other_sources:
        first.set_sources(["even", "odd", "few"], np.array([n % 2 if n > 8 else 2 for n in range(123)]))
    for _ in range(2):
        first.train_batch()
    state = copy.deepcopy(first.state_dict())
    weights = copy.deepcopy(first.module.state_dict())
    optimizer = copy.deepcopy(first.deepspeed_engine.optimizer.state_dict())
    wanted = [step(first) for _ in range(2)]
    second = start(case)
    second.module.load_state_dict(weights)
    second.deepspeed_engine.optimizer.load_state_dict(optimizer)
    second.load_state_dict(state)
    again = second.state_dict()
    same = all(_equal(state[key], again[key]) for key in state) and state.keys() == again.keys()
    found = [step(second) for _ in range(2)]
    difference = max(float((a - b).abs().max()) for a, b in zip(*map(_values, (first, second)), strict=True))
    chosen = [[(one.large, one.chosen, one.weights) for one in steps] for steps in (wanted, found)]
    counts = (second.step_count, second.num_samples)
    first.destroy()
    second.destroy()
    return {"same state": same, "chosen": chosen, "difference": difference, "counts": counts}


def _values(engine: Any) -> list[torch.Tensor]:
    return list(parameters(engine).values()) or [torch.zeros(1)]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def change_sources(case: Case) -> dict[str, Any]:
    """In a rank: other sources while a micro-batch is handed out, then back to a state from before them."""
    engine = start(case)
    state = engine.state_dict()
    engine.train_batch()
    open_step = engine.next_micro_batch()
    handed_out = open_step.selection.batch.step
    before = list(engine.loader.dataset.source_names)
    engine.set_sources(["even", "odd", "few"], np.array([n % 2 if n > 8 else 2 for n in range(123)]))
    again = engine.train_batch().step
    changed = list(engine.loader.dataset.source_names)
    engine.load_state_dict(state)
    restored = [engine.loader.dataset.source_names, engine.coreset_selector.source_names]
    first = engine.train_batch().step
    engine.destroy()
    return {"steps": (handed_out, again, first), "names": (before, changed, *map(list, restored))}


@pytest.mark.distributed
def test_other_sources_lose_no_step_and_go_with_an_older_state(pools: dict[int, Ranks]) -> None:
    (found,) = pools[1].run(change_sources, Case("sources"))
    assert found["steps"] == (2, 2, 1)
    before, changed, *restored = found["names"]
    assert changed == ["even", "odd", "few"]
    assert restored == [before, before]


@pytest.mark.distributed
@pytest.mark.parametrize("other_sources", [False, True])
@pytest.mark.parametrize("estimator", ["spsa", pytest.param("sketch", marks=pytest.mark.slow)])
def test_engine(estimator: str, other_sources: bool, pools: dict[int, Ranks]) -> None:
    case = Case("state", colm={"probe": {"estimator": estimator}, "num_workers": 1 if other_sources else 0})
    (found,) = pools[1].run(round_trip, case, other_sources)
    assert found["same state"]
    assert found["chosen"][0] == found["chosen"][1]
    assert found["difference"] == 0.0
    assert found["counts"] == (4, 4 * 13)
