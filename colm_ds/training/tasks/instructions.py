"""Train on instructions, conversations and texts: tokenised examples, their held-out loss and exact match."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from colm_ds.config.colm import HELD_OUT
from colm_ds.data import TokenDataset, load_examples, split_holdout
from colm_ds.data.chat import ChatEncoder, writes_date
from colm_ds.data.examples import describe_read
from colm_ds.data.holdout import count_common
from colm_ds.data.subset import read_subset
from colm_ds.data.workers import MAX_PROCESSES
from colm_ds.engine.target_stream import draw_targets
from colm_ds.errors import ConfigError
from colm_ds.evaluation.exact_match import Question, exact_match, load_questions
from colm_ds.process.cores import local_ranks, usable_cores
from colm_ds.recipes.data_check import chat_template_of, check_apart, check_large_batch, entries_of
from colm_ds.recipes.recipe import Recipe
from colm_ds.training.tasks.base import InTraining, measure_heldout_loss


class InstructionTask:
    """Implements `TrainingTask` for a recipe on rows of text."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        """Read and tokenise; see `load_data` for what it raises."""
        self._settings = recipe.evaluation
        self._place = str(recipe.data.train)
        self._max_length = recipe.data.max_length
        self._is_subset = recipe.data.subset is not None
        self.train, self._heldout = load_data(recipe, tokenizer)
        by_file = recipe.data.heldout is not None and self._heldout is not None
        self._num_common = count_common(self.train, self._heldout) if by_file and self._heldout is not None else 0
        self._writes_date = self.train.trained is not None and writes_date(tokenizer, recipe.data.chat_template_kwargs)
        self._questions: list[Question] = []
        if recipe.evaluation.exact_match and recipe.data.heldout is not None and self._heldout is not None:
            chat = None
            if self._heldout.trained is not None:
                chat = ChatEncoder(tokenizer, None, recipe.data.train_on, recipe.data.chat_template_kwargs)
            self._questions = load_questions(entries_of(recipe, recipe.data.heldout), tokenizer, chat)
        self.target, self._heldout = load_target(recipe, tokenizer, self.train, self._heldout)
        self._target_place = str(recipe.colm.target.data)

    def identity(self) -> dict[str, dict[str, str]]:
        """See `TrainingTask.identity`: the training examples, and those of the target."""
        data = {"data.train": {"place": self._place, "digest": self._digest}}
        if self.target is not None:
            data["colm.target.data"] = {"place": self._target_place, "digest": self.target.digest()}
        return data

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
        return {
            "num_dropped": self.train.num_dropped,
            "lost": lost,
            "num_heldout": num_heldout,
            "prompts": list(self.train.prompts),
        }

    def losses_of_data(self) -> list[str]:
        """See `TrainingTask.losses_of_data`."""
        parts = describe_read(self.train.read)
        for what, key in (("rows were left out, as their prompt fills", "dropped"), ("responses were cut at", "cut")):
            by_source = self.train.lost[key]
            if by_source:
                named = ", ".join(f"{count:,} of {source}" for source, count in sorted(by_source.items()))
                parts.append(f"{sum(by_source.values()):,} {what} data.max_length = {self._max_length}: {named}.")
        gone = self._gone()
        cut = [name for name in gone if name in self.train.lost["dropped"]]
        if cut:
            parts.append(f"WARNING: nothing is left of {', '.join(cut)}. Choose a larger data.max_length.")
        if others := [name for name in gone if name not in cut]:
            drawn = "data.subset has" if self._is_subset else "data.limit drew"
            parts.append(f"WARNING: {drawn} no example of {', '.join(others)}.")
        if self.train.num_special:
            parts.append(f"WARNING: {self.train.num_special:,} conversations hold the text of a special token.")
        if self._num_common and self._heldout is not None:
            parts.append(
                f"WARNING: {self._num_common:,} of {len(self._heldout):,} held-out examples are trained on too."
            )
        if self._writes_date:
            parts.append(
                "WARNING: the chat template writes today's date into the prompts, so that a run resumed on another day "
                "finds other data unless its cache is there. Give it one: data.chat_template_kwargs={date_string: ...}."
            )
        return parts

    def _gone(self) -> list[str]:
        """Return the sources without any examples left."""
        return [name for name, count in self.train.source_counts().items() if count == 0]


def load_data(recipe: Recipe, tokenizer: Any) -> tuple[TokenDataset, TokenDataset | None]:
    """Load the training and held-out data of a recipe.

    A template file of the recipe becomes the tokenizer's own, so that it is saved with the trained weights.

    Args:
        recipe: recipe with files, lengths, cache and held-out data.
        tokenizer: from `load_tokenizer`.

    Raises:
        DataError: naming file and line.
        ConfigError: if the large batch is larger than the data, a file is both trained on and held out, or schema,
            prompt or chat template do not fit.
    """
    data = recipe.data
    if (template := chat_template_of(recipe)) is not None:
        tokenizer.chat_template = template
    if data.heldout is not None:
        check_apart(entries_of(recipe, data.train), entries_of(recipe, data.heldout))
    train = _load(recipe, data.train, tokenizer, data.limit)
    heldout = _load(recipe, data.heldout, tokenizer, None) if data.heldout is not None else None
    left_out = {
        f"dropped for want of a label within data.max_length = {data.max_length}": sum(train.num_dropped.values())
    }
    if data.holdout_per_source:
        num_examples = len(train)
        train, heldout = split_holdout(train, per_source=data.holdout_per_source, seed=recipe.seed)
        if len(heldout) == 0:
            lost = "".join(f" ({count:,} {what})" for what, count in left_out.items() if count)
            raise ConfigError(
                f"data.holdout_per_source = {data.holdout_per_source}: nothing can be held out of {len(train)} "
                f"examples{lost}: a source keeps at least half of its examples, and equal prompts stay together. Name "
                "a held-out file (data.heldout), or hold out nothing (data.holdout_per_source=0, evaluation.every=0)."
            )
        left_out["held out by data.holdout_per_source"] = num_examples - len(train)
    if data.subset is not None:
        num_examples = len(train)
        train = train.subset(read_subset(data.subset, train.digest(), len(train)))
        left_out["not in data.subset"] = num_examples - len(train)
    check_large_batch(recipe, len(train), left_out)
    return train, heldout


def _load(recipe: Recipe, data: Any, tokenizer: Any, limit: int | None) -> TokenDataset:
    section = recipe.data
    cache = None if section.cache_dir is None else Path(section.cache_dir).expanduser()
    # without a cache all ranks of this machine tokenise at the same time
    ranks = 1 if cache is not None else local_ranks()
    return load_examples(
        data,
        tokenizer,
        section.max_length,
        schema=section.schema,
        prompt=section.prompt,
        source_key=section.source_key,
        train_on=section.train_on,
        chat_template_kwargs=section.chat_template_kwargs,
        cache_dir=cache,
        limit=limit,
        seed=recipe.seed,
        num_processes=section.num_processes or max(1, min(MAX_PROCESSES, usable_cores() // ranks)),
    )


def load_target(
    recipe: Recipe, tokenizer: Any, train: TokenDataset, heldout: TokenDataset | None
) -> tuple[TokenDataset | None, TokenDataset | None]:
    """Load the target data of a recipe whose selector compares with one.

    `held_out` takes as many held-out examples as the target has, by its `mix`, and leaves the others to evaluation.

    Args:
        recipe: recipe with `colm.target.data`.
        tokenizer: from `load_tokenizer`.
        train: the training examples, among which no target may be.
        heldout: the held-out examples, if there are any.

    Returns:
        The target, None where nothing is compared with one, and the examples that are left to evaluate on.

    Raises:
        DataError: naming file and line.
        ConfigError: if examples of the target are trained on, or too few are held out.
    """
    place = recipe.colm.target.data
    if place is None:
        return None, heldout
    if place == HELD_OUT:
        size, num_heldout = recipe.colm.target.size, 0 if heldout is None else len(heldout)
        if heldout is None or num_heldout <= size:
            raise ConfigError(
                f"colm.target.size = {size}: {num_heldout} examples are held out, and some must be left to evaluate "
                "on. Write less, or hold out more."
            )
        drawn = draw_targets(heldout.source_ids, recipe.colm.target, recipe.seed).numpy()
        rest = np.setdiff1d(np.arange(num_heldout), drawn)
        target, heldout = heldout.subset(drawn), heldout.subset(rest)
    else:
        target = _load(recipe, place, tokenizer, None)
    wanted = {example.input_ids.numpy().tobytes() for example in target}
    lengths = {len(example.input_ids) for example in target}
    alike = [index for index in range(len(train)) if int(train.lengths[index]) in lengths]
    both = [index for index in alike if train[index].input_ids.numpy().tobytes() in wanted]
    if both:
        raise ConfigError(
            f"colm.target.data = {place}: {len(both)} of its examples are trained on, the first as example {both[0]} "
            "of data.train. A target must be other examples: take them out of one of the two."
        )
    return target, heldout
