"""Interface of tasks: the data that a run trains on, and its measurements."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from colm_ds.engine.engine import CoLMEngine
from colm_ds.engine.reference_losses import read_table
from colm_ds.errors import ConfigError
from colm_ds.evaluation.heldout import heldout_loss
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.selection import Exchange
from colm_ds.types import SourcedDataset


@dataclass(frozen=True)
class InTraining:
    """A model in training, with all that a task needs to measure it."""

    engine: CoLMEngine
    tokenizer: Any
    device: torch.device
    exchange: Exchange
    rank: int


class TrainingTask(Protocol):
    """Data and measurements of a run; made from a recipe's files on every rank, without collectives."""

    @property
    def train(self) -> SourcedDataset:
        """The training examples."""
        ...

    @property
    def target(self) -> SourcedDataset | None:
        """The target examples, for selectors that compare with a target."""
        ...

    def identity(self) -> dict[str, dict[str, str]]:
        """Return, by recipe key, `place` and `digest` of the data; a run is resumed with the same data only."""
        ...

    def begin_step(self, run: InTraining, step: int) -> dict[str, Any]:
        """Prepare for a 1-based step and return entries for its metrics; all ranks call it together."""
        ...

    def heldout(self, run: InTraining) -> dict[str, Any] | None:
        """Measure `overall`, `macro`, `per_source` losses (lower is better) and more; None if nothing is held out.

        All ranks call it together.
        """
        ...

    def finish(self, run: InTraining) -> dict[str, Any]:
        """Return further results for `summary.json` after the last step; all ranks call it together."""
        ...

    def losses_of_data(self) -> list[str]:
        """Return lines about the rows that were read, and about data that is left out or truncated."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the entries of `config.json` about the data, including `num_heldout`."""
        ...


def data_digest(task: TrainingTask) -> str:
    """Return a digest of the training examples of a task."""
    parts = {key: data["digest"] for key, data in task.identity().items() if key.startswith("data.")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def check_reference(recipe: BaseRecipe, task: TrainingTask) -> None:
    """Raise a ConfigError if the selector's table of reference losses is of other data."""
    if not recipe.colm.needs.reference:
        return
    path = recipe.colm.options["table"]
    if read_table(path)["digest"] != data_digest(task):
        raise ConfigError(
            f"colm.options.table = {path}: its losses are of other training data, or tokenised otherwise. "
            "Write another with colm-ds score and this recipe."
        )


def measure_heldout_loss(run: InTraining, dataset: SourcedDataset, max_tokens: int) -> dict[str, Any]:
    """Measure the held-out loss per source of a model in training; see `heldout_loss`."""
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
