"""The module of recipes keeps the names that version 0.1.0 had in `colm_ds.recipe`."""

from __future__ import annotations

import json

import pytest

from colm_ds.recipes import recipe
from colm_ds.training.start_or_resume import recipe_differences

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


@pytest.mark.parametrize(
    ("steps", "wanted"), [("3 epochs", 30), ("1 epoch", 10), ("0.25 epochs", 2), ("0.01 epochs", 1)]
)
def test_steps_in_epochs(steps: str, wanted: int) -> None:
    values = {
        "output_dir": "run",
        "steps": steps,
        "model": {"name_or_path": "model"},
        "data": {"train": "data.jsonl"},
        "colm": {"large_batch_size": 8, "coreset_size": 4},
        "deepspeed": {},
    }
    open_ended = recipe.Recipe.model_validate(values)
    assert open_ended.steps == 0
    resolved = open_ended.with_steps(10)
    assert resolved.steps == wanted
    assert recipe.Recipe.model_validate(resolved.model_dump()).with_steps(10) == resolved
    assert recipe_differences(json.loads(json.dumps(resolved.model_dump())), open_ended, ()) == []
