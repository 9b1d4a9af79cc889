"""Train on a classification task: its examples, their held-out loss and accuracy."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from colm_ds.data.choice_dataset import ChoiceDataset, load_choices
from colm_ds.recipes.data_check import check_large_batch, place_of_split
from colm_ds.recipes.recipe import ChoiceRecipe
from colm_ds.training.tasks.base import InTraining, measure_heldout_loss


class ChoiceTask:
    """Implements `TrainingTask` for a recipe on a classification task."""

    target = None

    def __init__(self, recipe: ChoiceRecipe, tokenizer: Any) -> None:
        """Read and tokenise; see `load_choice_data` for what it raises."""
        self._settings = recipe.evaluation
        self.train, self._heldout = load_choice_data(recipe, tokenizer)
        self._place = str(recipe.data.train or f"{recipe.data.folder} ({recipe.data.task})")

    def identity(self) -> dict[str, dict[str, str]]:
        """See `TrainingTask.identity`: the training examples."""
        return {"data.train": {"place": self._place, "digest": self._digest}}

    @cached_property
    def _digest(self) -> str:
        """Digest of the training examples, computed when a checkpoint needs it."""
        return self.train.digest()

    def begin_step(self, run: InTraining, step: int) -> dict[str, Any]:
        """See `TrainingTask.begin_step`."""
        return {}

    def heldout(self, run: InTraining) -> dict[str, Any] | None:
        """See `TrainingTask.heldout`: nats per example, and the accuracy."""
        return None if self._heldout is None else measure_heldout_loss(run, self._heldout, self._settings.max_tokens)

    def finish(self, run: InTraining) -> dict[str, Any]:
        """See `TrainingTask.finish`: nothing beyond the last held-out accuracy."""
        return {}

    def losses_of_data(self) -> list[str]:
        """See `TrainingTask.losses_of_data`."""
        dropped = {reason: count for reason, count in self.train.num_dropped.items() if count}
        lines = [f"{count:,} examples were left out: {reason.replace('_', ' ')}." for reason, count in dropped.items()]
        if self.train.num_at_max_length:
            lines.append(f"{self.train.num_at_max_length:,} prompts reach data.max_length and may be cut on the left.")
        return lines

    def describe(self) -> dict[str, Any]:
        """See `TrainingTask.describe`."""
        num_heldout = 0 if self._heldout is None else len(self._heldout)
        facts = {"num_dropped": self.train.num_dropped, "num_at_max_length": self.train.num_at_max_length}
        return {**facts, "num_heldout": num_heldout}


def load_choice_data(recipe: ChoiceRecipe, tokenizer: Any) -> tuple[ChoiceDataset, ChoiceDataset | None]:
    """Load the training and held-out examples of a recipe.

    Raises:
        DataError: naming file and line.
        ConfigError: if the folder lacks a file of the task, or the large batch is larger than the data.
    """
    data = recipe.data
    cache = None if data.cache_dir is None else Path(data.cache_dir).expanduser()

    def load(split: str, given: Any, limit: int | None) -> ChoiceDataset | None:
        place = place_of_split(data.folder, data.task, split) if data.folder is not None else given
        if place is None:
            return None
        return load_choices(
            data.task,
            place,
            tokenizer,
            data.max_length,
            split=split,
            cache_dir=cache,
            limit=limit,
            seed=recipe.seed,
        )

    train = load("train", data.train, data.limit)
    assert train is not None
    check_large_batch(recipe, len(train))
    return train, load("validation", data.heldout, data.heldout_limit)
