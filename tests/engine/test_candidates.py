"""Training on classification examples is the plain loop over every candidate, at every stage and on 1 and 2 ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.choices import plain_choice_loss, random_choices
from tests.engine.oracle import largest_difference
from tests.engine.training import (
    BETAS,
    EPS,
    LEARNING_RATE,
    NOTHING_PERSISTS,
    WEIGHT_DECAY,
    Case,
    StepRecord,
    parameters,
    start,
    step,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

STEPS = 3
DEEP = {"num_hidden_layers": 3}
REPLAY: dict[str, Any] = {"checkpointing": True, "model": DEEP, "steps": STEPS}

CASES = [
    (Case("exact", colm={"probe": {"estimator": "exact"}, "weights": "cluster"}, steps=STEPS), 1),
    (Case("spsa", lora=True, colm={"micro_batch_tokens": 60}, steps=STEPS), 2),
    (Case("sketch", colm={"probe": {"estimator": "sketch"}, "weights": "matched"}, stage=2, steps=STEPS), 2),
    (Case("exact", colm={"probe": {"estimator": "exact"}}, stage=3, zero=NOTHING_PERSISTS, steps=STEPS), 2),
    (Case("replay", colm={"replay": "on", "probe": {"estimator": "exact"}}, **REPLAY), 2),
    (Case("replay", lora=True, colm={"replay": "on", "probe": {"estimator": "sketch"}}, stage=2, **REPLAY), 1),
    (
        Case(
            "replay",
            colm={"replay": "on", "probe": {"estimator": "exact"}},
            stage=3,
            zero=NOTHING_PERSISTS,
            deepspeed={"train_micro_batch_size_per_gpu": 1},
            **REPLAY,
        ),
        2,
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a run, and the held-out loss at its end."""

    steps: list[StepRecord]
    parameters: dict[str, Tensor]
    heldout: dict[str, Any]
    replays: bool


def dataset() -> Any:
    """Questions of three sources, one of them small."""
    made = random_choices(80)
    made.source_names = ("big", "other", "small")
    made.source_ids = (torch.arange(80) % 11 % 3).numpy().astype("int32")
    made.source_ids[made.source_ids == 2] = 0
    made.source_ids[::9] = 2
    return made


def train(case: Case) -> Outcome:
    """Run a case in a rank."""
    import torch.distributed as dist

    from colm_ds.distributed.exchange import make_exchange
    from colm_ds.evaluation.heldout import heldout_loss

    engine = start(case, training_data=dataset())
    try:
        steps = [step(engine) for _ in range(case.steps)]
        heldout = heldout_loss(
            engine.deepspeed_engine.module,
            engine.deepspeed_engine.module,
            engine.loss_head,
            random_choices(20, seed=5),
            device=torch.device("cpu"),
            exchange=make_exchange(torch.device("cpu")),
            rank=dist.get_rank(),
            max_tokens=100,
        )
        return Outcome(steps, parameters(engine), heldout, steps[-1].replays)
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("case", "world_size"), CASES, ids=[f"{case.name}-stage{case.stage}-{world}ranks" for case, world in CASES]
)
def test_update_is_the_plain_one(case: Case, world_size: int, pools: dict[int, Ranks]) -> None:
    outcomes = pools[world_size].run(train, case)
    data, model = dataset(), case.build_model()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for seen in outcomes[0].steps:
        optimizer.zero_grad()
        total = 0.0
        for index, weight in zip(seen.chosen, seen.weights, strict=True):
            loss = weight * plain_choice_loss(model, data[index]) / len(seen.chosen)
            loss.backward()
            total += loss.item()
        optimizer.step()
        assert seen.stats["loss"] == pytest.approx(total, rel=1e-5)
        assert seen.stats["tokens"] == sum(int(data.lengths[index]) for index in seen.chosen)
        assert 0 <= seen.stats["padding_fraction"] < 1
        assert all(seen.untouched.values()), seen.untouched
    assert largest_difference(outcomes[0].parameters, {name: found.detach() for name, found in trained.items()}) <= 1e-6
    heldout = random_choices(20, seed=5)
    model.eval()
    with torch.no_grad():
        losses = torch.stack([plain_choice_loss(model, one) for one in heldout])
    for outcome in outcomes:
        assert [one.chosen for one in outcome.steps] == [one.chosen for one in outcomes[0].steps]
        assert outcome.heldout["overall"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert 0 <= outcome.heldout["accuracy"] <= 1
        assert outcome.replays == (case.name == "replay")
