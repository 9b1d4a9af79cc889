"""What a run trains on and measures: one interface, an implementation for every kind of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from colm_ds.engine.engine import CoLMEngine
from colm_ds.errors import ConfigError
from colm_ds.evaluation.heldout import heldout_loss
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.selection import Exchange
from colm_ds.types import SourcedDataset


@dataclass(frozen=True)
class InTraining:
    """A model in training, as a task measures it.

    Attributes:
        engine: the engine.
        tokenizer: of the model.
        device: of this rank.
        exchange: the ranks.
        rank: this rank.
    """

    engine: CoLMEngine
    tokenizer: Any
    device: torch.device
    exchange: Exchange
    rank: int


class TrainingTask(Protocol):
    """What a run trains on and measures; made from a recipe's files on every rank, without collectives."""

    @property
    def train(self) -> SourcedDataset:
        """The training examples."""
        ...

    def identity(self) -> dict[str, dict[str, str]]:
        """By recipe key, `place` and `digest` of data whose content is known; a run goes on with the same one only."""
        ...

    def begin_step(self, run: InTraining, step: int) -> dict[str, Any]:
        """Called by all ranks before a 1-based step; what it returns goes into the step's metrics."""
        ...

    def heldout(self, run: InTraining) -> dict[str, Any] | None:
        """`overall`, `macro`, `per_source` losses (lower is better) and more; None if nothing is held out.

        All ranks call it together.
        """
        ...

    def finish(self, run: InTraining) -> dict[str, Any]:
        """Further results for `summary.json`, after the last step; all ranks call it together."""
        ...

    def losses_of_data(self) -> list[str]:
        """Lines that say what of the data is not trained on, or not whole; nothing to say, no lines."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of the data; `num_heldout` among it."""
        ...


def check_large_batch(recipe: BaseRecipe, train: SourcedDataset) -> None:
    """Raise a ConfigError if there is less data than one large batch."""
    if recipe.colm.large_batch_size > len(train):
        raise ConfigError(
            f"colm.large_batch_size = {recipe.colm.large_batch_size}: more than the {len(train)} examples of "
            "data.train. Choose fewer, or add data."
        )


def measured_loss(run: InTraining, dataset: SourcedDataset, max_tokens: int) -> dict[str, Any]:
    """Held-out loss per source of a model in training; see `heldout_loss`."""
    module = run.engine.deepspeed_engine.module
    return heldout_loss(
        module,
        module,
        run.engine.loss_head,
        dataset,
        device=run.device,
        exchange=run.exchange,
        rank=run.rank,
        max_tokens=max_tokens,
    )
