"""The module of recipes keeps the names that version 0.1.0 had in `colm_ds.recipe`."""

from __future__ import annotations

import pytest

from colm_ds.recipes import recipe

NAMES_OF_0_1_0 = (
    *("BaseRecipe", "Recipe", "ChoiceRecipe", "PretrainingRecipe", "RECIPES", "PACKAGE_PREFIX"),
    *("kind_of_recipe", "load_recipe", "describe_keys"),
    *("ModelConfig", "LoraConfig", "OptimizerConfig", "LrScheduleConfig"),
    *("DataConfig", "ChunkDataConfig", "ChoiceDataConfig", "ClusterConfig", "PrepareConfig"),
    *("HeldoutConfig", "EvaluationConfig", "PerplexityConfig"),
)


@pytest.mark.parametrize("name", NAMES_OF_0_1_0)
def test_name_can_still_be_imported(name: str) -> None:
    assert hasattr(recipe, name)
