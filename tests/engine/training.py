"""Training runs of the engine's tests: one description, run on W ranks by the engine and plainly by the oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colm_ds.randomness import private_generator
from tests.tiny_models import VOCABULARY_SIZE, tiny_model

SOURCES = {"algebra": 44, "biology": 37, "code": 30, "drama": 7, "essays": 5}
"""Examples by source; the last two have fewer than |V|/c = 24.6."""

SMALL_SOURCES = ("drama", "essays")

LARGE, CORESET = 29, 13
"""r and b: neither can be divided by 2 ranks, nor b by micro-batches of 3."""

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-3, 0.01

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""For GPT-2, which has dropout by default."""

NOTHING_PERSISTS = {"stage3_param_persistence_threshold": 0}
"""Lets ZeRO-3 cut up even parameters as small as those of the tiny models."""

Record = dict[str, Any]


SKETCH_SIDE = 128
"""Side of gradient sketches in ranks: beyond every dimension of the models, so that they are the gradients."""


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: for messages.
        family: model type.
        lora: whether a LoRA adapter is trained.
        model: overrides of the model's configuration.
        checkpointing: whether activations are recomputed in the backward pass.
        colm: overrides of the `"colm"` section.
        deepspeed: overrides of the DeepSpeed configuration.
        stage: of ZeRO.
        zero: further keys of `zero_optimization`.
        steps: optimizer steps.
        sources: examples of each source in the dataset.
        dtype: of the model's weights.
    """

    name: str
    family: str = "llama"
    lora: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    colm: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    zero: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    sources: dict[str, int] = field(default_factory=lambda: dict(SOURCES))
    dtype: str = "float32"

    def config(self) -> dict[str, Any]:
        """The DeepSpeed configuration with its `"colm"` section."""
        optimizer = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY}
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "optimizer": {"type": "AdamW", "params": optimizer},
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "steps_per_print": 10**9,
            "colm": {"large_batch_size": LARGE, "coreset_size": CORESET, "seed": 3, **self.colm},
        }
        return copy.deepcopy(config | self.deepspeed)

    def build_model(self) -> Any:
        """The model, the same on every rank, in training mode."""
        model = tiny_model(self.family, self.lora, getattr(torch, self.dtype), **self.model).train()
        if self.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    def records(self) -> list[Record]:
        """The dataset."""
        return records(self.sources)


@dataclass(frozen=True)
class StepRecord:
    """What one rank saw of one step.

    Attributes:
        large: dataset indices of the large batch, `[r]`.
        chosen: dataset indices of the coreset in its order, `[b]`.
        weights: loss weight of each, `[b]`.
        stats: `StepStats` as a dictionary.
        shapes: rows and columns of every micro-batch that this rank trained on.
        untouched: by what must be as before: the global random state after selecting, hooks and forwards after the
            step, training mode.
        replays: whether training started from the probe's hidden states.
    """

    large: list[int]
    chosen: list[int]
    weights: list[float]
    stats: dict[str, Any]
    shapes: list[tuple[int, int]]
    untouched: dict[str, bool]
    replays: bool


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a run.

    Attributes:
        steps: a record of every step.
        parameters: trained parameters at the end; on rank 0 only.
        replays: whether training started from the probe's hidden states in the last step.
    """

    steps: list[StepRecord]
    parameters: dict[str, Tensor]
    replays: bool

    @property
    def chosen(self) -> list[list[int]]:
        """Dataset indices of every step's coreset, each in ascending order."""
        return [sorted(step.chosen) for step in self.steps]


def records(counts: dict[str, int], seed: int = 0) -> list[Record]:
    """Random examples of several sources, in mixed order; the first third of each has no labels.

    Every source draws from tokens of its own most of the time, so that gradients cluster.
    """
    generator = private_generator(seed, "records")
    made = []
    for source, count in counts.items():
        own = torch.randint(3, VOCABULARY_SIZE, (12,), generator=generator)
        for _ in range(count):
            length = int(torch.randint(4, 33, (), generator=generator))
            tokens = own[torch.randint(0, 12, (length,), generator=generator)]
            noise = torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator)
            tokens = torch.where(torch.rand(length, generator=generator) < 0.7, tokens, noise)
            labels = tokens.clone()
            labels[: 1 + length // 3] = -100
            made.append({"input_ids": tokens.tolist(), "labels": labels.tolist(), "source": source})
    order = torch.randperm(len(made), generator=generator).tolist()
    return [made[index] for index in order]


def start(case: Case, **arguments: Any) -> Any:
    """The engine of a case, in a rank; arguments of `colm_ds.initialize` go over those that follow from the case."""
    import colm_ds
    from colm_ds.probe import gradient_sketch

    gradient_sketch.SIDE = SKETCH_SIDE
    given = {"model": case.build_model(), "config": case.config(), "training_data": case.records()} | arguments
    return colm_ds.initialize(**given)[0]


def train(case: Case) -> Outcome:
    """Run a case in a rank."""
    engine = start(case)
    try:
        steps = [step(engine) for _ in range(case.steps)]
        return Outcome(steps, parameters(engine), steps[-1].replays)
    finally:
        engine.destroy()


def step(engine: Any) -> StepRecord:
    """One step of an engine, observed."""
    watcher = Watcher(engine.coreset_selector)
    shapes: list[tuple[int, int]] = []

    def note_shape(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:  # the probe runs in eval mode
            rows, columns = kwargs["input_ids"].shape
            shapes.append((rows, columns))

    handle = engine.module.register_forward_pre_hook(note_shape, with_kwargs=True)
    before = attachments(engine.module)
    engine.coreset_selector = watcher
    try:
        stats = engine.train_batch()
    finally:
        engine.coreset_selector = watcher.inner
        after = attachments(engine.module)
        handle.remove()
    batch, coreset = watcher.selection.batch, watcher.selection.coreset
    return StepRecord(
        large=batch.indices.tolist(),
        chosen=batch.indices[coreset.positions].tolist(),
        weights=coreset.weights.tolist(),
        stats=stats.as_dict(),
        shapes=shapes,
        untouched={
            "random state": watcher.random_state_kept,
            "hooks and forwards": before == after,
            "training mode": all(module.training for module in engine.module.modules()),
        },
        replays=watcher.selection.replay is not None,
    )


class Watcher:
    """Stands in for an engine's selector and keeps what went in and out."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.selection: Any = None
        self.random_state_kept = False

    def __call__(self, batch: Any, *args: Any) -> Any:
        state = torch.get_rng_state()
        self.selection = self.inner(batch, *args)
        self.random_state_kept = torch.equal(state, torch.get_rng_state())
        return self.selection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def attachments(model: nn.Module) -> list[tuple[Any, ...]]:
    """Hooks, replaced forwards and checkpointing functions of every module."""
    kinds = [name for name in nn.Module().__dict__ if name.endswith("_hooks")]
    replaced = ("forward", "_gradient_checkpointing_func", "gradient_checkpointing")
    return [
        (name, *(module.__dict__.get(key) for key in replaced), *(tuple(getattr(module, kind)) for kind in kinds))
        for name, module in model.named_modules()
    ]


def parameters(engine: Any) -> dict[str, Tensor]:
    """Trained parameters of an engine in float32, whatever the stage of ZeRO; on rank 0 only."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with whole(parameter):
                if dist.get_rank() == 0:
                    found[name] = parameter.detach().clone().float()
    return found


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Run the block with a parameter that ZeRO-3 may have cut up put together."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        yield
        return
    with deepspeed.zero.GatheredParameters([parameter]):
        yield
