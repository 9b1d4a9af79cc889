"""Numbers that are not finite: one example's loss is left out, a step's gradient changes nothing, many end the run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from colm_ds.errors import DivergenceError
from tests.engine.oracle import largest_difference, plain_training
from tests.engine.training import NOTHING_PERSISTS, Case, StepRecord, parameters, start, step
from tests.ranks import Ranks
from tests.tiny_models import VOCABULARY_SIZE

POISON = VOCABULARY_SIZE - 1
"""A token whose embedding is not a number: examples that hold it have no finite loss."""

PLAIN = {"selector": "random"}


def poisoned_records(case: Case) -> list[dict[str, Any]]:
    """The case's dataset, with the token in every eighth example and in no other."""
    records = case.records()
    for index, record in enumerate(records):
        record["input_ids"] = [min(token, POISON - 1) for token in record["input_ids"]]
        record["labels"] = [min(label, POISON - 1) for label in record["labels"]]
        if index % 8 == 0:
            record["input_ids"][0] = POISON
    return records


def poison(model: Any) -> Any:
    """Make the token's embedding not a number."""
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    return model


def train_poisoned(case: Case) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
    """In a rank: two steps on the poisoned dataset, embeddings frozen."""
    model = poison(case.build_model())
    model.get_input_embeddings().weight.requires_grad_(False)
    engine = start(case, model=model, training_data=poisoned_records(case))
    steps = [step(engine) for _ in range(2)]
    found = steps, parameters(engine)
    engine.destroy()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_examples_loss_is_isolated(stage: int, lora: bool, world_size: int, pools: dict[int, Ranks]) -> None:
    """What is trained is what a plain loop makes of the other examples, and the metrics name those left out."""
    zero = NOTHING_PERSISTS if stage == 3 else {}
    case = Case("poison", lora=lora, stage=stage, zero=zero, colm=PLAIN, model={"tie_word_embeddings": False})
    steps, trained = pools[world_size].run(train_poisoned, case)[0]
    records = poisoned_records(case)
    assert any(index % 8 == 0 for one in steps for index in one.chosen)
    sound = []
    for one in steps:
        bad = sorted(index for index in one.chosen if index % 8 == 0)
        kept = [place for place, index in enumerate(one.chosen) if index % 8]
        sound.append(replace(one, chosen=[one.chosen[p] for p in kept], weights=[one.weights[p] for p in kept]))
        named = one.stats["coreset"]["nonfinite_examples"]
        assert sorted(example["index"] for example in named) == bad
        assert {(example["source"], example["what"]) for example in named} == {
            (records[index]["source"], "loss") for index in bad
        }
        assert one.stats["coreset"]["nonfinite"] == len(bad)
        assert one.stats["examples_trained"] == len(kept)
        assert not one.stats["skipped"]

    class Unpoisoned(Case):
        def build_model(self) -> Any:
            model = super().build_model()
            model.get_input_embeddings().weight.requires_grad_(False)
            return model

    oracle = plain_training(Unpoisoned(**vars(case)), records, sound)
    assert largest_difference(trained, oracle.parameters) <= 1e-6
    assert [one.stats["loss"] for one in steps] == pytest.approx(oracle.losses, rel=1e-5)


def train_with_broken_gradient(case: Case, broken_steps: list[int]) -> list[dict[str, Any]]:
    """In a rank: steps, some of which have a gradient that is not finite; parameters after each."""
    engine = start(case)
    parameter = [one for one in engine.module.parameters() if one.requires_grad][-1]
    breaking: list[bool] = []
    parameter.register_hook(lambda gradient: gradient * math.inf if breaking[-1] else gradient)
    found = []
    for number in range(1, case.steps + 1):
        breaking.append(number in broken_steps)
        stats = engine.train_batch()
        state = {"skipped": stats.skipped, "lr": stats.lr, "grad_norm": stats.grad_norm, "samples": stats.samples}
        found.append(state | {"parameters": parameters(engine)})
    engine.destroy()
    return found


def train_without_a_finite_loss(case: Case) -> tuple[Any, bool, int]:
    """In a rank: a step in which no example has a finite loss."""
    engine = start(case)
    with torch.no_grad():
        engine.module.get_input_embeddings().weight.fill_(math.nan)
    stats = engine.train_batch()
    engine.destroy()
    return stats.loss, stats.skipped, stats.coreset["nonfinite"]


@pytest.mark.distributed
def test_a_step_without_a_finite_loss_has_none(pools: dict[int, Ranks]) -> None:
    for seen in pools[2].run(train_without_a_finite_loss, Case("none", colm={"selector": "random"})):
        assert seen == (None, True, 13)


PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16 stage 0": {"bf16": {"enabled": True}},
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16 stage 0"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_a_broken_gradient_changes_nothing(stage: int, precision: str, pools: dict[int, Ranks]) -> None:
    dtype = "float32" if precision == "fp32" else "bfloat16"
    zero = NOTHING_PERSISTS if stage == 3 else {}
    colm = {"selector": "random"}
    case = Case("broken", stage=stage, zero=zero, colm=colm, dtype=dtype, deepspeed=PRECISIONS[precision], steps=4)
    found = pools[2].run(train_with_broken_gradient, case, [2, 3])[0]
    assert [one["skipped"] for one in found] == [False, True, True, False]
    assert [one["samples"] for one in found] == [13, 13, 13, 26]
    assert largest_difference(found[0]["parameters"], found[2]["parameters"]) == 0
    assert largest_difference(found[2]["parameters"], found[3]["parameters"]) > 0
    assert all(torch.isfinite(value).all() for value in found[3]["parameters"].values())


def train_until_it_gives_up(case: Case) -> tuple[int, str]:
    """In a rank: steps with broken gradients until the engine raises; how many there were and what it said."""
    engine = start(case)
    parameter = [one for one in engine.module.parameters() if one.requires_grad][-1]
    parameter.register_hook(lambda gradient: gradient * math.nan)
    count = 0
    try:
        for _ in range(10):
            engine.train_batch()
            count += 1
    except DivergenceError as error:
        return count, str(error)
    finally:
        engine.destroy()
    return count, ""


@pytest.mark.distributed
def test_many_in_a_row_end_the_run(pools: dict[int, Ranks]) -> None:
    case = Case("diverged", stage=2, colm={"selector": "random", "max_skipped_steps": 3})
    for count, message in pools[2].run(train_until_it_gives_up, case):
        assert count == 3
        assert message.startswith("step 3: the gradient was not finite in 3 steps in a row; they changed nothing.")


@pytest.mark.distributed
def test_no_limit(pools: dict[int, Ranks]) -> None:
    case = Case("diverged", stage=0, colm={"selector": "random", "max_skipped_steps": 0})
    assert pools[2].run(train_until_it_gives_up, case) == [(10, ""), (10, "")]


@pytest.mark.distributed
def test_stage_zero_gives_the_norm_and_clips(pools: dict[int, Ranks]) -> None:
    """DeepSpeed tells no norm at stage 0 in float32; ours is the same as stage 2's, and so is the clipped step."""
    clipped = {"gradient_clipping": 0.05}
    cases = [Case("clipped", stage=stage, colm=PLAIN, deepspeed=clipped, steps=3) for stage in (0, 2)]
    zero, two = (pools[2].run(train_with_broken_gradient, case, [])[0] for case in cases)
    assert [one["grad_norm"] for one in zero] == pytest.approx([one["grad_norm"] for one in two], rel=1e-5)
    assert min(one["grad_norm"] for one in zero) > 0.05
    assert largest_difference(zero[-1]["parameters"], two[-1]["parameters"]) <= 1e-6
