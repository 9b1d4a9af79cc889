"""What a step tells about its selection: losses by source, lengths, and the variance of the coreset's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.conftest import Runner
from tests.engine.oracle import plain_training, token_losses
from tests.engine.training import CORESET, LARGE, NOTHING_PERSISTS, SOURCES, Case, Record

EVERY = 2
EXACT = {"probe": {"estimator": "exact"}, "weights": "matched"}

CASES = {
    "CoLM": Case("CoLM with variances", colm={**EXACT, "variance_every": EVERY}, steps=4),
    "random": Case("random with variances", colm={"selector": "random", "variance_every": EVERY}, steps=4),
    "QKV": Case(
        "QKV with variances",
        lora=True,
        colm={"probe": {"estimator": "sketch", "layer": "qkv"}, "variance_every": EVERY},
        steps=4,
    ),
}


def errors(model: Any, records: list[Record], chosen: list[int], weights: list[float], layer: str) -> dict[str, float]:
    """Relative squared errors of the coreset's mean gradient and, on average, of as many random ones."""
    last = model.get_base_model().model.layers[-1] if hasattr(model, "get_base_model") else model.model.layers[-1]
    names = ("q_proj", "k_proj", "v_proj") if layer == "qkv" else ("v_proj",)
    modules = [getattr(last.self_attn, name) for name in names]
    parameters = [m.lora_B["default"].weight if hasattr(m, "lora_B") else m.weight for m in modules]
    rows = []
    for record in records:
        gradients = torch.autograd.grad(token_losses(model, record).mean(), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    matrix = torch.stack(rows)
    mean = matrix.mean(dim=0)
    coreset = (torch.tensor(weights).double()[:, None] * matrix[chosen]).sum(dim=0) / len(chosen)
    variance = float((matrix - mean).square().sum()) / (len(matrix) - 1)
    scale = float(mean.square().sum())
    random = (1 / len(chosen) - 1 / len(matrix)) * variance
    return {"coreset": float((coreset - mean).square().sum()) / scale, "random": random / scale}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_signals_are_those_of_plain_gradients(name: str, stage: int, outcomes: Runner, data: list[Record]) -> None:
    case = CASES[name]
    if stage == 3:
        case = Case(**{**vars(case), "stage": 3, "zero": NOTHING_PERSISTS})
    seen = outcomes(case, 1 if stage == 0 else 2)
    measured = []

    def check(place: int, model: Any) -> None:
        step = seen[0].steps[place]
        coreset = step.stats["coreset"]
        losses = {index: float(token_losses(model, data[index]).mean()) for index in step.chosen}
        for source in SOURCES:
            mine = [losses[index] for index in step.chosen if data[index]["source"] == source]
            assert coreset["seen"][source] == sum(data[index]["source"] == source for index in step.large)
            assert (source in coreset["loss"]) == bool(mine)
            if mine:
                assert coreset["loss"][source] == pytest.approx(sum(mine) / len(mine), rel=1e-4)
        for kind, indices in (("coreset", step.chosen), ("large_batch", step.large)):
            tokens = [sum(label != -100 for label in data[index]["labels"][1:]) for index in indices]
            assert coreset["label_tokens"][kind] == pytest.approx(sum(tokens) / len(tokens))
        assert ("gradient_variance" in coreset) == ((place + 1) % EVERY == 0)
        if "gradient_variance" in coreset:
            places = [step.large.index(index) for index in step.chosen]
            layer = case.colm.get("probe", {}).get("layer", "v_proj")
            expected = errors(model, [data[index] for index in step.large], places, step.weights, layer)
            assert coreset["gradient_variance"] == pytest.approx(expected, rel=1e-3)
            measured.append(coreset["gradient_variance"])

    plain_training(case, data, seen[0].steps, check)
    assert len(measured) == 2
    assert seen[-1].steps[-1].stats["coreset"] == seen[0].steps[-1].stats["coreset"]  # on all ranks
    assert all(all(step.untouched.values()) for step in seen[0].steps)


@pytest.mark.distributed
def test_measuring_changes_nothing(outcomes: Runner) -> None:
    """Neither the choice, nor training, nor what is counted as exchanged."""
    with_it = CASES["CoLM"]
    without = Case("CoLM without variances", colm=EXACT, steps=4)
    for one, other in zip(outcomes(with_it, 2), outcomes(without, 2), strict=True):
        assert one.chosen == other.chosen
        assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)
        for ours, theirs in zip(one.steps, other.steps, strict=True):
            assert ours.stats["exchange_bytes"] == theirs.stats["exchange_bytes"]
            assert (len(ours.large), len(ours.chosen)) == (LARGE, CORESET)
