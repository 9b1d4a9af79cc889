"""The same training three ways: the engine, a plain loop and a Trainer, each run in a rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.training import BETAS, EPS, LEARNING_RATE, SOURCES, Case, Record, parameters, records, start, whole
from tests.engine.training import step as engine_step
from tests.tiny_models import tiny_model

LARGE, CORESET, SEED = 28, 12, 3
"""r can be divided by the 4 micro-batches of 3 that b makes; an epoch of the 123 examples has 4 steps."""

OPTIMIZER = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}


@dataclass(frozen=True)
class Trained:
    """What a run did.

    Attributes:
        chosen: dataset indices of every step's coreset, ascending.
        parameters: at the end.
        logs: the Trainer's.
        shapes: rows of every micro-batch trained on by this rank.
        wrapper: what the Trainer's model was wrapped in.
    """

    chosen: list[list[int]]
    parameters: dict[str, Tensor]
    logs: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)
    wrapper: str = ""


def with_engine(colm: dict[str, Any], steps: int) -> Trained:
    """Train with `colm_ds.initialize`."""
    forget_deepspeed()  # of a Trainer under ZeRO-3 before, which would cut this model's weights up, too
    sizes = {"large_batch_size": LARGE, "coreset_size": CORESET, "seed": SEED}
    optimizer = {"type": "AdamW", "params": {**OPTIMIZER, "betas": list(BETAS)}}
    engine = start(Case("engine", colm={**sizes, **colm}, deepspeed={"optimizer": optimizer}))
    try:
        done = [engine_step(engine) for _ in range(steps)]
        return Trained([sorted(step.chosen) for step in done], parameters(engine))
    finally:
        engine.destroy()


def with_plain_loop(colm: dict[str, Any], steps: int) -> Trained:
    """Train in a loop of our own, every rank on what is chosen of its share; gradients are averaged by hand."""
    import colm_ds
    from colm_ds.batching.loader import RecordDataset
    from colm_ds.batching.mixture import MixtureSampler

    data, model = records(SOURCES), tiny_model("llama").train()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    order = MixtureSampler(len(data), LARGE, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    sizes = {"large_batch_size": LARGE, "coreset_size": CORESET, "seed": SEED}
    examples = RecordDataset(data)
    selector = colm_ds.CoresetSelector(model, {**sizes, **colm}, SOURCES, optimizer=optimizer, dataset=examples)
    chosen = []
    for step in range(1, steps + 1):
        indices = order.indices(step).tolist()
        share = LARGE // world_size
        mine = [data[index] for index in indices[rank * share : (rank + 1) * share]]
        selection = selector(mine)
        places, weights = selector.share(selection)
        losses = colm_ds.example_losses(model, [mine[place] for place in places])
        optimizer.zero_grad()
        (losses * weights).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        optimizer.step()
        chosen.append(sorted(indices[position] for position in selection.positions.tolist()))
    return Trained(chosen, {name: p.detach().clone() for name, p in model.named_parameters()})


def pad(rows: Sequence[Record]) -> dict[str, Tensor]:
    """A data collator without a tokenizer; refuses whatever is not text."""
    assert all(set(row) <= {"input_ids", "labels"} for row in rows), rows[0].keys()
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[column < len(row["input_ids"]) for column in range(width)] for row in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask.long()}


def make_trainer(output: str, colm: Any, steps: int, stage: int | None = None, **arguments: Any) -> Any:
    """A `CoLMTrainer` on the tiny model that notes what it chooses (`chosen`) and trains on (`shapes`)."""
    from transformers import TrainingArguments

    from colm_ds.engine.initialization import prepare_deepspeed
    from colm_ds.integrations.transformers import CoLMTrainer

    class Noting(CoLMTrainer):
        chosen: list[list[int]]
        shapes: list[int]

        def get_batch_samples(self, *args: Any) -> Any:
            samples = super().get_batch_samples(*args)
            selection = self.last_selection
            self.chosen.append(sorted(selection.batch.indices[selection.positions].tolist()))
            self.shapes += [len(inputs["input_ids"]) for inputs in samples[0]]
            return samples

    prepare_deepspeed()
    forget_deepspeed()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    deepspeed = None
    if stage is not None:
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        deepspeed = {**dict.fromkeys([*sizes, "gradient_clipping"], "auto"), "zero_optimization": {"stage": stage}}
        deepspeed["zero_allow_untested_optimizer"] = True
    given = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": CORESET // 3 // world_size,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": EPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": SEED,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "deepspeed": deepspeed,
    } | arguments
    extras = {key: given.pop(key) for key in ("train_dataset", "eval_dataset", "sources") if key in given}
    extras.setdefault("train_dataset", records(SOURCES))
    model = (
        given.pop("model", None) or tiny_model("llama").train()
    )  # before the arguments: they would have ZeRO-3 cut its weights up unmade
    colm = {**colm, "log": "all"} if isinstance(colm, dict) else colm
    trainer = Noting(model, TrainingArguments(output, **given), pad, colm=colm, **extras)
    trainer.chosen, trainer.shapes = [], []
    return trainer


def forget_deepspeed() -> None:
    """Undo what a run under DeepSpeed leaves in the environment, so that the next one in this process is without."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def with_trainer(
    output: str, colm: dict[str, Any], steps: int, stage: int | None, resume: str | None = None, **arguments: Any
) -> Trained:
    """Train with `CoLMTrainer`, under DDP or DeepSpeed."""
    trainer = make_trainer(output, {"large_batch_size": LARGE, **colm}, steps, stage, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    found = {}
    for name, parameter in trainer.model.named_parameters():
        with whole(parameter):
            found[name] = parameter.detach().clone().float()
    wrapped = trainer.model_wrapped
    stage_of = getattr(wrapped, "zero_optimization_stage", lambda: "")
    wrapper = f"{type(wrapped).__name__} {stage_of()}".strip()
    return Trained(trainer.chosen, found, trainer.state.log_history, trainer.shapes, wrapper)


def resumed(output: str, colm: dict[str, Any], stage: int | None) -> tuple[Trained, Trained]:
    """Six steps in one go with a checkpoint after three, and the last three from that."""
    whole = with_trainer(output, colm, 6, stage, save_strategy="steps", save_steps=3)
    rest = with_trainer(output, colm, 6, stage, resume=f"{output}/checkpoint-3")
    return whole, rest
