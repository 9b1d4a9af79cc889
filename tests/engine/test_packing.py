"""Packed steps are those of the plain loop over the coreset, and choose what unpacked ones choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from colm_ds.errors import ConfigError
from tests.attention import NAME, attention_by_documents
from tests.choices import plain_choice_loss
from tests.engine.conftest import Oracle, Runner
from tests.engine.oracle import largest_difference, plain_training
from tests.engine.test_candidates import dataset as choices
from tests.engine.test_gradients import check, name
from tests.engine.training import LARGE, NO_DROPOUT, NOTHING_PERSISTS, Case, Outcome, parameters, start, step, train
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

EXACT = {"probe": {"estimator": "exact"}}
SKETCH = {"probe": {"estimator": "sketch", "num_probes": 64}}
ONE = {"train_micro_batch_size_per_gpu": 1}


def packed(kind: str, packing: str | int = "on", colm: dict[str, Any] | None = None, **settings: Any) -> Case:
    """A packed run of a few steps."""
    return Case(f"packed {kind}", colm={"packing": packing, **(colm or {})}, steps=3, **settings)


BY_DEFAULT = [
    (packed("alone", 64, {"weights": "matched", **EXACT}), 1),
    (packed("lora", 64, {"weights": "matched", **EXACT}, family="phi", lora=True, stage=1, checkpointing=True), 2),
    (packed("plain", "on", {"selector": "full", "coreset_size": LARGE}, family="stablelm", stage=2), 2),
    (
        packed("fused", 100, EXACT, family="phi3", stage=3, zero=NOTHING_PERSISTS, checkpointing=True, deepspeed=ONE),
        2,
    ),
]
SLOW = [
    (packed("alone", 64, {"weights": "cluster", "loss_normalization": "token", **SKETCH}, family="mistral"), 2),
    (packed("random", 100, {"selector": "random", "loss_normalization": "token"}, stage=2, deepspeed=ONE), 2),
    (packed("absolute positions", 64, {"selector": "random"}, family="gpt2", model=NO_DROPOUT), 1),
    (packed("by tokens", 64, {"micro_batch_tokens": 70, **EXACT}, family="qwen2", stage=3, zero=NOTHING_PERSISTS), 1),
    (packed("lora", 64, SKETCH, family="phi3", lora=True, stage=3, zero=NOTHING_PERSISTS), 2),
]
RUNS = [
    *(pytest.param(*run, id=name(run)) for run in BY_DEFAULT),
    *(pytest.param(*run, id=name(run), marks=pytest.mark.slow) for run in SLOW),
]


@pytest.mark.parametrize(("case", "world_size"), RUNS)
def test_update_is_the_plain_one(case: Case, world_size: int, outcomes: Runner, plain_runs: Oracle) -> None:
    check(case, world_size, outcomes, plain_runs)
    assert not any(seen.replays for seen in outcomes(case, world_size))


@pytest.mark.parametrize(("case", "world_size"), RUNS)
def test_rows(case: Case, world_size: int, outcomes: Runner) -> None:
    """Few rows of the length asked for, as many micro-batches on every rank, and the step's numbers say so."""
    ranks, config = outcomes(case, world_size), case.config()
    lengths = [len(record["input_ids"]) for record in case.records()]
    row_tokens = max(lengths) if config["colm"]["packing"] == "on" else config["colm"]["packing"]
    for steps in zip(*(seen.steps for seen in ranks), strict=True):
        assert len({len(one.shapes) for one in steps}) == 1
        shapes = [shape for one in steps for shape in one.shapes if shape != (1, 2)]
        assert all(rows <= config["train_micro_batch_size_per_gpu"] for rows, _ in shapes)
        assert max(columns for _, columns in shapes) <= row_tokens
        assert sum(rows for rows, _ in shapes) < 0.75 * len(steps[0].chosen)
        computed, real = sum(rows * columns for rows, columns in shapes), sum(lengths[i] for i in steps[0].chosen)
        for one in steps:
            assert one.stats["padding_fraction"] == pytest.approx(1 - real / computed)
            assert one.stats["micro_batches"]["count"] == len(one.shapes)
            assert one.stats["micro_batches"]["largest_tokens"] == max(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize(
    "estimator", ["exact", pytest.param("spsa", marks=pytest.mark.slow), pytest.param("tokens", marks=pytest.mark.slow)]
)
def test_the_choice_is_that_without_packing(estimator: str, pools: dict[int, Ranks]) -> None:
    """Bitwise: at a learning rate of 0, so that round-off of training has no part in it."""
    still = {"optimizer": {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0}}}
    case = packed("still", 64, {"probe": {"estimator": estimator}}, deepspeed=still)
    unpacked = replace(case, colm={**case.colm, "packing": "off"})
    for seen, wanted in zip(*(pools[2].run(train, each) for each in (case, unpacked)), strict=True):
        for one, other in zip(seen.steps, wanted.steps, strict=True):
            assert (one.large, one.chosen, one.weights) == (other.large, other.chosen, other.weights)
            assert one.stats["loss"] == pytest.approx(other.stats["loss"], rel=1e-6)


def train_in_one_row(case: Case) -> Outcome:
    """In a rank: with attention that tells documents apart in single rows, as flash attention."""
    attention_by_documents()
    return train(case)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_row_for_each_micro_batch(world_size: int, pools: dict[int, Ranks]) -> None:
    case = packed("by documents", 40, EXACT, model={"attn_implementation": NAME}, stage=2)
    ranks = pools[world_size].run(train_in_one_row, case)
    plain = plain_training(replace(case, model={}), case.records(), ranks[0].steps)
    assert largest_difference(ranks[0].parameters, plain.parameters) <= 1e-6
    for seen in ranks:
        for one in seen.steps:
            assert all(rows == 1 for rows, _ in one.shapes)
            assert max(columns for _, columns in one.shapes) > 40
            assert one.stats["padding_fraction"] == 0.0


def train_on_choices(case: Case) -> Any:
    """In a rank: steps on classification examples."""
    engine = start(case, training_data=choices())
    try:
        return [step(engine) for _ in range(case.steps)], parameters(engine)
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_candidates(stage: int, pools: dict[int, Ranks]) -> None:
    """Classification examples, each with its sequences one after another."""
    zero = NOTHING_PERSISTS if stage == 3 else {}
    case = packed("choices", 90, {"weights": "cluster", **EXACT}, stage=stage, zero=zero)
    (steps, found), _ = pools[2].run(train_on_choices, case)
    data, model = choices(), case.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.01)
    for seen in steps:
        optimizer.zero_grad()
        for index, weight in zip(seen.chosen, seen.weights, strict=True):
            (weight * plain_choice_loss(model, data[index]) / len(seen.chosen)).backward()
        optimizer.step()
        rows = sum(rows for rows, columns in seen.shapes if (rows, columns) != (1, 2))
        assert 0 < rows < 0.5 * len(seen.chosen)
    assert largest_difference(found, {key: one.detach() for key, one in model.named_parameters()}) <= 1e-6


def train_with_an_infinite_loss(case: Case, index: int) -> list[Any]:
    """In a rank: steps in which an example's embeddings are not finite."""
    engine = start(case)
    module = engine.module
    marked = case.records()[index]["input_ids"]

    def spoil(embedding: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        (ids,) = inputs
        if not module.training:
            return output
        spoilt = output.clone()
        for row in range(len(ids)):
            for start_of in range(ids.shape[1] - len(marked) + 1):
                if ids[row, start_of : start_of + len(marked)].tolist() == marked:
                    spoilt[row, start_of : start_of + len(marked)] = float("nan")
        return spoilt

    module.model.embed_tokens.register_forward_hook(spoil)
    try:
        return [step(engine) for _ in range(case.steps)]
    finally:
        engine.destroy()


def test_neighbours_of_a_loss_that_is_not_finite(pools: dict[int, Ranks]) -> None:
    """They are trained on: only the example itself is left out."""
    case = packed("broken", 100, {"selector": "full", "coreset_size": LARGE}, deepspeed={"gradient_clipping": 1.0})
    first = pools[2].run(train, case)[0].steps[0].chosen[5]
    seen = pools[2].run(train_with_an_infinite_loss, case, first)[0][0]
    assert seen.stats["examples_trained"] == LARGE - 1
    assert not seen.stats["skipped"]


def fail(case: Case) -> str:
    """In a rank: the message with which a run does not start."""
    try:
        start(case).destroy()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_model_that_cannot_be_packed_is_refused_on_every_rank(stage: int, pools: dict[int, Ranks]) -> None:
    zero = NOTHING_PERSISTS if stage == 3 else {}
    case = packed("refused", family="bloom", colm={"selector": "random"}, stage=stage, zero=zero, model=BLOOM)
    for message in pools[2].run(fail, case):
        assert message.startswith("colm.packing = 'on': model of type 'bloom' with eager attention: ")


BLOOM = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "attn_implementation": "eager"}
