"""The data that a recipe names, tokenised, with its held-out part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colm_ds.data import InstructionDataset, load_instructions, split_holdout
from colm_ds.errors import ConfigError
from colm_ds.recipe import Recipe


def load_data(recipe: Recipe, tokenizer: Any) -> tuple[InstructionDataset, InstructionDataset | None]:
    """Training and held-out data of a recipe.

    Args:
        recipe: names files, lengths, the cache and what is held out.
        tokenizer: from `load_tokenizer`.

    Raises:
        DataError: naming file and line of what is wrong.
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
    if recipe.colm.large_batch_size > len(train):
        raise ConfigError(
            f"colm.large_batch_size = {recipe.colm.large_batch_size}: more than the {len(train)} examples of "
            "data.train. Choose fewer, or add data."
        )
    return train, heldout
