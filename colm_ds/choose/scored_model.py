"""Load the model that a dataset is passed through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.errors import ConfigError
from colm_ds.export.run import load_at
from colm_ds.recipes.model import load_model
from colm_ds.recipes.model import load_tokenizer as load_its_tokenizer
from colm_ds.recipes.recipe import BaseRecipe


def load_scored_model(recipe: BaseRecipe, tokenizer: Any, at: str | None) -> nn.Module:
    """Return a recipe's model on the GPU if there is one, as training begins or with the trained weights of a run.

    Args:
        recipe: names the model.
        tokenizer: from `load_tokenizer`.
        at: folder of a run or checkpoint of this recipe's model; None: as training begins.

    Raises:
        ConfigError, CheckpointError: if it cannot be loaded.
    """
    model: nn.Module = load_at(recipe, tokenizer, at)[0]
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_reference_model(recipe: BaseRecipe, tokenizer: Any, place: str) -> nn.Module:
    """Return another model, which must have the recipe's tokenizer, as losses are means over its tokens.

    Args:
        recipe: the recipe whose data is scored.
        tokenizer: its tokenizer.
        place: folder or hub name of the model.

    Raises:
        ConfigError: if it cannot be loaded, or has another tokenizer.
    """
    named = recipe.model.model_copy(update={"name_or_path": place, "config": None, "gguf_file": None})
    if describe_tokenizer(load_its_tokenizer(named, None)) != describe_tokenizer(tokenizer):
        raise ConfigError(
            f"--model {place}: its tokenizer is not the recipe's, so its losses are of other tokens. "
            "Take a model with the same tokenizer."
        )
    return load_model(named, None, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
