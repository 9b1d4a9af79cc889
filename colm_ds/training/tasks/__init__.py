"""Kinds of data to train on, by a recipe's key `task`."""

from __future__ import annotations

from typing import Any

from colm_ds.batching.loader import make_sampler
from colm_ds.recipes.recipe import BaseRecipe, ChoiceRecipe, PretrainingRecipe, Recipe
from colm_ds.training.tasks.base import InTraining, TrainingTask, check_reference, data_digest, measure_heldout_loss
from colm_ds.training.tasks.choices import ChoiceTask
from colm_ds.training.tasks.clusters import ClusteredTask
from colm_ds.training.tasks.instructions import InstructionTask
from colm_ds.training.tasks.pretraining import PretrainingTask
from colm_ds.types import SourcedDataset

__all__ = [
    "ChoiceTask",
    "ClusteredTask",
    "InTraining",
    "InstructionTask",
    "PretrainingTask",
    "TrainingTask",
    "check_reference",
    "data_digest",
    "load_task",
    "measure_heldout_loss",
    "with_steps",
]


def load_task(recipe: BaseRecipe, tokenizer: Any) -> TrainingTask:
    """Read the data of a recipe of any kind.

    Raises:
        ConfigError, DataError: naming the key, or the file and line, that is wrong.
    """
    if isinstance(recipe, PretrainingRecipe):
        return PretrainingTask(recipe, tokenizer)
    assert isinstance(recipe, (Recipe, ChoiceRecipe))
    task: TrainingTask = (
        ChoiceTask(recipe, tokenizer) if isinstance(recipe, ChoiceRecipe) else InstructionTask(recipe, tokenizer)
    )
    if recipe.clusters is None:
        return task
    return ClusteredTask(task, with_steps(recipe, task.train), recipe.clusters, tokenizer)


def with_steps(recipe: BaseRecipe, train: SourcedDataset) -> BaseRecipe:
    """Return the recipe with its number of steps, if it gives epochs.

    Raises:
        ConfigError: if another key contradicts that number.
    """
    return recipe.with_steps(make_sampler(train, recipe.colm.large_batch_size, 0).steps_per_epoch)
