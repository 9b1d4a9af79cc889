"""What a step tells about its selection: losses by source, lengths, and the variance of the coreset's gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from colm_ds.config.resolve import resolve_config
from colm_ds.errors import ConfigError
from tests.engine.conftest import Runner
from tests.engine.oracle import plain_training, token_losses
from tests.engine.training import CORESET, LARGE, SOURCES, Case, Record
from tests.ranks import Ranks

EVERY = 2
EXACT = {"probe": {"estimator": "exact"}, "weights": "matched"}
BY_TOKEN = {"loss_normalization": "token", "geometry": "plain"}
AHEAD = {"tokens": {"probe": {"estimator": "tokens"}}, "random": {"selector": "random"}}

CASES = {
    "CoLM": Case("CoLM with variances", colm={**EXACT, "variance_every": EVERY}, steps=4),
    "random": Case("random with variances", colm={"selector": "random", "variance_every": EVERY}, steps=4),
    "LoRA": Case(
        "LoRA with variances", lora=True, colm={"probe": {"estimator": "sketch"}, "variance_every": EVERY}, steps=4
    ),
    "tokens": Case("mean over tokens with variances", colm={**EXACT, **BY_TOKEN, "variance_every": EVERY}, steps=4),
    "other": Case(
        "a family without a probe, with variances",
        family="qwen3",
        model={"head_dim": 8},
        colm={"selector": "random", "variance_every": EVERY},
        steps=4,
    ),
}


def errors(
    model: Any, records: list[Record], chosen: list[int], weights: list[float], by_token: bool
) -> dict[str, float]:
    """Relative squared errors of the coreset's mean gradient, and what follows, over all trained matrices."""
    modules = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.requires_grad
    ]
    rows, counts = [], []
    for record in records:
        losses = token_losses(model, record)
        gradients = torch.autograd.grad(losses.mean(), [module.weight for module in modules])
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
        counts.append(float(len(losses)) if by_token else 1.0)
    matrix, parts = torch.stack(rows), torch.tensor(counts, dtype=torch.float64)
    mean = parts @ matrix / parts.sum()
    factors = torch.tensor(weights).double() * parts[chosen]
    coreset = factors @ matrix[chosen] / (factors.sum() if by_token else len(chosen))
    variance = float((parts[:, None] * (matrix - mean) / parts.mean()).square().sum()) / (len(matrix) - 1)
    scale = float(mean.square().sum())
    random = (1 / len(chosen) - 1 / len(matrix)) * variance / scale
    own = float((coreset - mean).square().sum()) / scale
    worth = 1 / (own / random * (1 / len(chosen) - 1 / len(matrix)) + 1 / len(matrix))
    return {"coreset": own, "random": random, "kappa": own / random, "worth": worth}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_signals_are_those_of_plain_gradients(name: str, stage: int, outcomes: Runner, data: list[Record]) -> None:
    case = CASES[name]
    if stage:
        case = replace(case, stage=stage)
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
            by_token = case.colm.get("loss_normalization") == "token"
            expected = errors(model, [data[index] for index in step.large], places, step.weights, by_token)
            assert coreset["gradient_variance"] == pytest.approx(expected, rel=1e-3)
            measured.append(coreset["gradient_variance"])

    plain_training(case, data, seen[0].steps, check)
    assert len(measured) == 2
    assert seen[-1].steps[-1].stats["coreset"] == seen[0].steps[-1].stats["coreset"]  # on all ranks
    assert all(all(step.untouched.values()) for step in seen[0].steps)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "world_size", "replays"),
    [*((stage, world_size, False) for stage in (0, 1, 2) for world_size in (1, 2)), (0, 1, True), (2, 2, True)],
)
def test_measuring_changes_nothing(stage: int, world_size: int, replays: bool, outcomes: Runner) -> None:
    """Neither the choice, nor training, nor what is counted as exchanged; nor where a LoRA run replays the probe."""
    case = Case("without variances", lora=replays, checkpointing=replays, colm=EXACT, steps=4, stage=stage)
    _check_same_with_variances(case, world_size, outcomes)
    assert all(rank.replays == replays for rank in outcomes(case, world_size))


@pytest.mark.distributed
@pytest.mark.parametrize("name", AHEAD)
def test_measuring_changes_nothing_of_choices_made_ahead(name: str, outcomes: Runner) -> None:
    """Every chosen example is trained on the rank that would train it without, beside which others are measured."""
    _check_same_with_variances(Case(f"{name} without variances", colm=AHEAD[name], steps=4), 2, outcomes)


def _check_same_with_variances(without: Case, world_size: int, outcomes: Runner) -> None:
    with_it = replace(without, name="with variances", colm={**without.colm, "variance_every": EVERY})
    for one, other in zip(outcomes(with_it, world_size), outcomes(without, world_size), strict=True):
        assert one.replays == other.replays
        assert one.chosen == other.chosen
        assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)
        for place, (ours, theirs) in enumerate(zip(one.steps, other.steps, strict=True), start=1):
            assert ("gradient_variance" in ours.stats["coreset"]) == (place % EVERY == 0)
            assert ours.stats["loss"] == theirs.stats["loss"]
            assert ours.shapes == theirs.shapes
            assert ours.stats["exchange_bytes"] == theirs.stats["exchange_bytes"]
            assert (len(ours.large), len(ours.chosen)) == (LARGE, CORESET)
            assert all(ours.untouched.values())


def test_stage_3_is_refused() -> None:
    config = {"zero_optimization": {"stage": 3}, "colm": {"large_batch_size": 8, "coreset_size": 4}}
    resolve_config(config, 1)
    config["colm"] |= {"variance_every": 2}
    with pytest.raises(ConfigError, match=r"colm\.variance_every = 2: .* at ZeRO stage 0, 1 or 2\. Write 0"):
        resolve_config(config, 1)


def nothing_to_measure(case: Case) -> str:
    """In a rank: the message where only norms are trained, and whose steps are to be measured."""
    import colm_ds
    from colm_ds.errors import ProbeError

    model = case.build_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    try:
        colm_ds.initialize(model=model, config=case.config(), training_data=case.records())
    except ProbeError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_what_cannot_be_measured_is_refused_before_the_first_step(pools: dict[int, Ranks]) -> None:
    case = Case("norms", colm={"selector": "random", "variance_every": 3})
    assert "leave out variance_every" in pools[1].run(nothing_to_measure, case)[0]
