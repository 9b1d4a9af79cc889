"""Train on instruction data: tokenised examples, their held-out loss and exact match."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from colm_ds.data import InstructionDataset, load_instructions, split_holdout
from colm_ds.evaluation.exact_match import exact_match, load_questions
from colm_ds.recipes.recipe import Recipe
from colm_ds.training.tasks.base import InTraining, check_large_batch, measure_heldout_loss


class InstructionTask:
    """Implements `TrainingTask` for a recipe on instruction data."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        """Read and tokenise; see `load_data` for what it raises."""
        self._settings = recipe.evaluation
        self._place = str(recipe.data.train)
        self._max_length = recipe.data.max_length
        self.train, self._heldout = load_data(recipe, tokenizer)
        questions = recipe.data.heldout if recipe.evaluation.exact_match else None
        self._questions = load_questions(questions, recipe.data.source_key) if questions else []

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
        """See `TrainingTask.heldout`: nats per labelled token."""
        return None if self._heldout is None else measure_heldout_loss(run, self._heldout, self._settings.max_tokens)

    def finish(self, run: InTraining) -> dict[str, Any]:
        """See `TrainingTask.finish`: `exact_match`, None unless requested."""
        if not self._questions:
            return {"exact_match": None}
        answers = exact_match(
            run.engine.deepspeed_engine.module,
            run.tokenizer,
            self._questions,
            device=run.device,
            exchange=run.exchange,
            rank=run.rank,
            max_new_tokens=self._settings.max_new_tokens,
            max_tokens=self._settings.max_tokens,
            synced=run.engine.zero_optimization_stage() == 3,
        )
        return {"exact_match": answers}

    def describe(self) -> dict[str, Any]:
        """See `TrainingTask.describe`."""
        num_heldout = 0 if self._heldout is None else len(self._heldout)
        lost = {**self.train.lost, "sources": self._gone()}
        return {"num_dropped": self.train.num_dropped, "lost": lost, "num_heldout": num_heldout}

    def losses_of_data(self) -> list[str]:
        """See `TrainingTask.losses_of_data`."""
        parts = []
        for what, key in (("rows were left out, as their prompt fills", "dropped"), ("responses were cut at", "cut")):
            by_source = self.train.lost[key]
            if by_source:
                named = ", ".join(f"{count:,} of {source}" for source, count in sorted(by_source.items()))
                parts.append(f"{sum(by_source.values()):,} {what} data.max_length = {self._max_length}: {named}.")
        if gone := self._gone():
            parts.append(f"WARNING: nothing is left of {', '.join(gone)}. Choose a larger data.max_length.")
        return parts

    def _gone(self) -> list[str]:
        """Return the sources without any examples left."""
        return [name for name, count in self.train.source_counts().items() if count == 0]


def load_data(recipe: Recipe, tokenizer: Any) -> tuple[InstructionDataset, InstructionDataset | None]:
    """Load the training and held-out data of a recipe.

    Args:
        recipe: recipe with files, lengths, cache and held-out data.
        tokenizer: from `load_tokenizer`.

    Raises:
        DataError: naming file and line.
        ConfigError: if the large batch is larger than the data.
    """
    data = recipe.data
    cache = None if data.cache_dir is None else Path(data.cache_dir).expanduser()

    def load(paths: Any, limit: int | None) -> InstructionDataset:
        return load_instructions(
            paths,
            tokenizer,
            data.max_length,
            source_key=data.source_key,
            cache_dir=cache,
            limit=limit,
            seed=recipe.seed,
        )

    train = load(data.train, data.limit)
    heldout = load(data.heldout, None) if data.heldout is not None else None
    if data.holdout_per_source:
        train, heldout = split_holdout(train, per_source=data.holdout_per_source, seed=recipe.seed)
    check_large_batch(recipe, train)
    return train, heldout
