"""A resumed run goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.errors import CheckpointError
from tests.engine.oracle import largest_difference
from tests.engine.training import NOTHING_PERSISTS, Case, StepRecord, parameters, start, step
from tests.ranks import Ranks

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}

CASES = [
    Case("spsa", colm={"probe": {"estimator": "spsa"}}),
    Case("spsa", lora=True, colm={"probe": {"estimator": "spsa", "num_probes": 3, "refresh": "run"}}, stage=2),
    Case("sketch", colm={"probe": {"estimator": "sketch", "num_probes": 32}}, stage=2),
    Case("sketch", lora=True, colm={"probe": {"estimator": "sketch", "num_probes": 32, "refresh": "run"}}),
    Case("exact", colm={"probe": {"estimator": "exact"}}, stage=2),
    Case("exact", colm={"probe": {"estimator": "exact"}}, stage=3, zero=NOTHING_PERSISTS),
    Case("tokens", colm={"probe": {"estimator": "tokens"}}, stage=3, zero=NOTHING_PERSISTS),
    Case("workers", colm={"selector": "keep_random", "num_workers": 1}, stage=1),
    Case("dropout", family="phi", model=DROPOUT, colm={"probe": {"estimator": "spsa"}}),
    Case("dropout", family="phi", model=DROPOUT, colm={"probe": {"estimator": "sketch", "num_probes": 32}}, stage=2),
    Case(
        "dropout", family="phi", model=DROPOUT, colm={"probe": {"estimator": "exact"}}, stage=3, zero=NOTHING_PERSISTS
    ),
    Case("exact", lora=True, colm={"probe": {"estimator": "exact"}}, stage=1),
    Case("exact", lora=True, colm={"probe": {"estimator": "exact"}}, stage=3, zero=NOTHING_PERSISTS),
]


def weights_alone(folder: str) -> tuple[list[Any], list[Any]]:
    """In a rank: a checkpoint after two steps is loaded without anything but weights; counts, and the weights."""
    case = Case("exact", colm={"probe": {"estimator": "exact"}})
    engine = start(case)
    for _ in range(2):
        step(engine)
    engine.save_checkpoint(folder, 7, {}, False, False)  # DeepSpeed's order; a step's number as a tag
    saved = parameters(engine)
    engine.destroy()
    engine = start(case)
    path, _ = engine.load_checkpoint(folder, 7, load_module_only=True)
    loaded = parameters(engine)
    counts = [Path(path).name, engine.step_count, engine.loader.next_step, engine.num_samples]
    step(engine)
    engine.save_checkpoint(folder)
    counts.append(sorted(path.name for path in Path(folder).iterdir()))
    engine.destroy()
    return counts, [saved, loaded]


@pytest.mark.distributed
def test_weights_alone(pools: dict[int, Ranks], tmp_path: Path) -> None:
    """The run from them is a new one: it begins at its first step."""
    counts, (saved, loaded) = pools[1].run(weights_alone, str(tmp_path))[0]
    assert counts == ["7", 0, 1, 0, ["7", "latest", "step_1"]]  # the checkpoint of a later step stays
    assert largest_difference(saved, loaded) == 0.0


def weights_alone_at_stage_3(folder: str) -> str:
    """In a rank: what is said where DeepSpeed would load nothing."""
    engine = start(Case("random", colm={"selector": "random"}, stage=3, zero=NOTHING_PERSISTS))
    step(engine)
    engine.save_checkpoint(folder)
    try:
        engine.load_checkpoint(folder, load_module_only=True)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.distributed
def test_weights_alone_at_stage_3_are_refused(pools: dict[int, Ranks], tmp_path: Path) -> None:
    assert "no weights alone at ZeRO stage 3" in pools[1].run(weights_alone_at_stage_3, str(tmp_path))[0]


def another_estimator(folder: str, before: str, after: str) -> int:
    """In a rank: two steps by one estimator, and two from there by another."""
    for number, estimator in enumerate((before, after)):
        probe = {"estimator": estimator, "num_probes": "auto" if estimator in ("tokens", "exact") else 32}
        engine = start(Case(estimator, colm={"probe": probe, "selector": "colm", "mask": {}}))
        if number:
            engine.load_checkpoint(folder)
        for _ in range(2):
            step(engine)
        engine.save_checkpoint(folder)
        count = int(engine.step_count)
        engine.destroy()
    return count


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after"), [("sketch", "tokens"), ("tokens", "projection"), ("projection", "sketch"), ("exact", "tokens")]
)
def test_another_estimator_starts_without_a_history(
    before: str, after: str, pools: dict[int, Ranks], tmp_path: Path
) -> None:
    assert pools[1].run(another_estimator, str(tmp_path), before, after) == [4]


def stop_and_resume(case: Case, folder: str) -> dict[str, Any]:
    """In a rank: three steps, a checkpoint and two steps; and the last two again in an engine that loads it."""
    state = {"epoch_of_mine": 7}
    engine = start(case)
    for _ in range(3):
        step(engine)
    engine.save_checkpoint(folder, client_state=state)
    without_stop = [step(engine) for _ in range(2)], parameters(engine), engine.coreset_selector.state_dict()
    engine.destroy()

    engine = start(case)
    path, client_state = engine.load_checkpoint(folder)
    resumed = [step(engine) for _ in range(2)], parameters(engine), engine.coreset_selector.state_dict()
    counts = engine.step_count, engine.num_samples, engine.loader.next_step
    engine.destroy()
    return {
        "without stop": without_stop,
        "resumed": resumed,
        "path": path,
        "client_state": client_state,
        "counts": counts,
        "state": state,
    }


def seen_by_user(record: StepRecord) -> dict[str, Any]:
    """Everything about a step that may not depend on a stop."""
    changing = ("time_s", "memory_gib", "memory_parts_gib")
    stats = {key: value for key, value in record.stats.items() if key not in changing}
    return {"large": record.large, "chosen": record.chosen, "weights": record.weights, **stats}


def same(one: Any, other: Any) -> bool:
    """Equality of nested states, bitwise for tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case.stage == 3 and "dropout" in case.name else case
        for case in CASES
    ],
    ids=lambda case: f"{case.name}-{'lora' if case.lora else 'full'}-stage{case.stage}",
)
def test_resuming_equals_never_having_stopped(case: Case, pools: dict[int, Ranks], tmp_path: Path) -> None:
    for rank, found in enumerate(pools[2].run(stop_and_resume, case, str(tmp_path))):
        steps, trained, selector = found["without stop"]
        resumed_steps, resumed_trained, resumed_selector = found["resumed"]
        assert [seen_by_user(one) for one in resumed_steps] == [seen_by_user(one) for one in steps]
        assert found["counts"] == (5, 5 * 13, 6)
        assert found["client_state"] == {"epoch_of_mine": 7}
        assert found["state"] == {"epoch_of_mine": 7}  # the caller's dictionary is not added to
        assert "step_3" in found["path"]
        if rank == 0:  # where the history is complete
            assert same(resumed_selector, selector)
            assert largest_difference(resumed_trained, trained) == 0


def history_sizes(case: Case) -> list[int]:
    """In a rank: updates in the selector's and the estimator's history after two steps."""
    engine = start(case)
    for _ in range(2):
        step(engine)
    state = engine.coreset_selector.state_dict()
    engine.destroy()
    return [state[part].get("count", 0) for part in ("selector", "estimator")]


@pytest.mark.distributed
def test_there_is_a_history_to_save(pools: dict[int, Ranks]) -> None:
    """The test above would mean little for an estimator without one."""
    assert pools[2].run(history_sizes, CASES[0])[0] == [2, 0]
    assert pools[2].run(history_sizes, CASES[2]) == [[0, 2], [0, 2]]
    assert pools[2].run(history_sizes, CASES[4]) == [[2, 0], [2, 0]]


def load_what_is_not_ours(folder: str) -> tuple[Any, str]:
    """In a rank: load from an empty folder, and a checkpoint of the plain DeepSpeed engine."""
    engine = start(Case("x"))
    nothing = engine.load_checkpoint(f"{folder}/nothing")
    engine.deepspeed_engine.save_checkpoint(folder, "plain")
    try:
        engine.load_checkpoint(folder, "plain")
        message = ""
    except CheckpointError as error:
        message = str(error)
    engine.destroy()
    return nothing, message


@pytest.mark.distributed
def test_checkpoints_of_others(pools: dict[int, Ranks], tmp_path: Path) -> None:
    for nothing, message in pools[2].run(load_what_is_not_ours, str(tmp_path)):
        assert nothing == (None, {})
        assert "holds no state of colm_ds" in message
        assert "engine.deepspeed_engine.load_checkpoint" in message
