"""Optimizers that are not AdamW: engine, plain loop and Trainer choose alike and reach the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.oracle import largest_difference
from tests.engine.training import SOURCES, Case, parameters, records, start
from tests.engine.training import step as engine_step
from tests.integrations.runs import CORESET, LARGE, SEED, Trained, make_trainer
from tests.ranks import Ranks
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.distributed

STEPS, RATE = 3, 1e-3
COLM = {"large_batch_size": LARGE, "coreset_size": CORESET, "seed": SEED, "probe": {"estimator": "exact"}}


def adafactor(weights: Iterable[nn.Parameter]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(weights, lr=RATE, relative_step=False, scale_parameter=False)


def lion(weights: Iterable[nn.Parameter]) -> Any:
    from bitsandbytes.optim import Lion

    return Lion(weights, lr=RATE)


def adam_8bit(weights: Iterable[nn.Parameter]) -> Any:
    """8 bits also for parameters as small as those of the tiny model."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=RATE, min_8bit_size=16)


def schedule_free(weights: Iterable[nn.Parameter]) -> Any:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(weights, lr=RATE)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, tuple[Callable[[Iterable[nn.Parameter]], Any], str]] = {
    "adafactor": (adafactor, "transformers"),
    "lion": (lion, "bitsandbytes"),
    "8-bit Adam": (adam_8bit, "bitsandbytes"),
    "schedule-free": (schedule_free, "schedulefree"),
}


def with_engine(name: str) -> Trained:
    model = tiny_model("llama").train()
    case = Case("engine", colm=COLM)
    config = case.config()
    del config["optimizer"]
    optimizer = OPTIMIZERS[name][0](model.parameters())
    engine = start(case, model=model, optimizer=optimizer, config=config)
    try:
        steps = [engine_step(engine) for _ in range(STEPS)]
        return Trained([sorted(step.chosen) for step in steps], parameters(engine))
    finally:
        engine.destroy()


def with_plain_loop(name: str) -> Trained:
    import colm_ds
    from colm_ds.batching.loader import RecordDataset
    from colm_ds.batching.mixture import MixtureSampler

    data, model = records(SOURCES), tiny_model("llama").train()
    order, optimizer = MixtureSampler(len(data), LARGE, SEED), OPTIMIZERS[name][0](model.parameters())
    dataset = RecordDataset(data)
    selector = colm_ds.CoresetSelector(model, COLM, SOURCES, optimizer=optimizer, dataset=dataset)
    chosen = []
    for step in range(1, STEPS + 1):
        indices = order.indices(step).tolist()
        mine = [data[index] for index in indices]
        selection = selector(mine)
        places, weights = selector.share(selection)
        losses = colm_ds.example_losses(model, [mine[place] for place in places])
        optimizer.zero_grad()
        (losses * weights).sum().backward()
        optimizer.step()
        chosen.append(sorted(indices[position] for position in selection.positions.tolist()))
    return Trained(chosen, {name: p.detach().clone() for name, p in model.named_parameters()})


def with_trainer(name: str, output: str) -> Trained:
    trainer = make_trainer(output, {key: COLM[key] for key in ("large_batch_size", "probe")}, STEPS)
    trainer.optimizer = OPTIMIZERS[name][0](trainer.model.parameters())
    trainer.train()
    return Trained(trainer.chosen, {name: p.detach().clone() for name, p in trainer.model.named_parameters()})


SLOW = {"8-bit Adam", "schedule-free"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OPTIMIZERS]
)
def test_through_each_door(name: str, pools: dict[int, Ranks], tmp_path: Path) -> None:
    pytest.importorskip(OPTIMIZERS[name][1])
    engine = pools[1].run(with_engine, name)[0]
    loop = pools[1].run(with_plain_loop, name)[0]
    trainer = pools[1].run(with_trainer, name, str(tmp_path))[0]
    assert engine.chosen == loop.chosen == trainer.chosen
    # Steps of one size, or moments in 8 bits, turn round-off near 0 into a whole step of few coordinates.
    for other in (loop, trainer):
        assert largest_difference(engine.parameters, other.parameters) <= 2.5 * STEPS * RATE
        apart = torch.cat(
            [(engine.parameters[key] - other.parameters[key]).abs().flatten() for key in other.parameters]
        )
        assert float((apart > 1e-5).float().mean()) <= 0.01
    before = dict(tiny_model("llama").named_parameters())
    assert largest_difference(engine.parameters, {key: value.detach() for key, value in before.items()}) >= 0.5 * RATE
