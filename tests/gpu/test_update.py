"""The engine's update on the device is that of a plain loop there, at every stage of ZeRO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.engine.oracle import largest_difference, plain_training
from tests.engine.test_matrix import BF16_BOUND, InFloat32
from tests.engine.training import NOTHING_PERSISTS, parameters, start, step
from tests.gpu.device import DEVICE, case_of, on_gpu

pytestmark = on_gpu

FLOAT32_BOUND = 5e-6
"""Largest difference of a parameter after 5 steps of at most 1e-3 each."""

EXACT = {"probe": {"estimator": "exact"}}

STAGES: dict[int, dict[str, Any]] = {0: {}, 2: {}, 3: NOTHING_PERSISTS}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_float32(stage: int, lora: bool, one_process: None) -> None:
    case = case_of("float32", lora=lora, stage=stage, zero=STAGES[stage], checkpointing=lora, colm=EXACT)
    engine = start(case)
    assert torch.device(engine.device).type == DEVICE.type
    try:
        steps = [step(engine) for _ in range(case.steps)]
        trained = parameters(engine)
    finally:
        engine.destroy()
    assert all(seen.replays == lora for seen in steps)
    plain = plain_training(case, case.records(), steps, device=DEVICE)
    assert largest_difference(trained, plain.parameters) <= FLOAT32_BOUND
    for seen, loss in zip(steps, plain.losses, strict=True):
        assert seen.stats["loss"] == pytest.approx(loss, rel=1e-4)
        assert all(seen.untouched.values())


@pytest.mark.parametrize("stage", STAGES)
def test_bf16(stage: int, one_process: None) -> None:
    """Weights moved as in a float32 loop over the same coresets from the same rounded weights, but for rounding."""
    case = case_of("bf16", half=True, lora=True, stage=stage, zero=STAGES[stage], checkpointing=True, colm=EXACT)
    engine = start(case)
    try:
        steps = [step(engine) for _ in range(case.steps)]
        trained = parameters(engine)
    finally:
        engine.destroy()
    started = {name: weight.detach().float().to(DEVICE) for name, weight in case.build_model().named_parameters()}
    plain = plain_training(InFloat32(**vars(case)), case.records(), steps, device=DEVICE)
    error = moved = 0.0
    for name, wanted in plain.parameters.items():
        error += float((trained[name] - wanted).square().sum())
        moved += float((wanted - started[name]).square().sum())
    assert math.sqrt(error / moved) <= 1.2 * BF16_BOUND[stage]


def test_a_step_leaves_nothing_behind(one_process: None) -> None:
    """Hooks, forwards and the random state are as before; the choice reaches the statistics."""
    engine = start(case_of("statistics", lora=True, stage=2, colm=EXACT))
    try:
        seen = step(engine)
    finally:
        engine.destroy()
    assert all(seen.untouched.values())
    assert seen.stats["memory_kind"] == ("allocated" if DEVICE.type == "cuda" else "resident")
    assert sum(seen.stats["coreset"]["per_source"].values()) == len(seen.chosen)
