"""The module of recipes keeps the names that version 0.1.0 had in `colm_ds.recipe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.errors import ConfigError
from colm_ds.recipes import recipe
from colm_ds.recipes.recipe import load_recipe
from colm_ds.training.run import deepspeed_config
from colm_ds.training.start_or_resume import recipe_differences

ROOT = Path(__file__).resolve().parents[2]

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
    for damaged in (["colm"], {"colm": ["spsa"]}):
        assert recipe_differences(damaged, open_ended, ())  # type: ignore[arg-type]


def test_how_long_a_run_is_comes_from_what_is_written_last(tmp_path: Path) -> None:
    """A change over the file, a recipe over the one that it extends; both in one place are refused."""
    values = {"output_dir": "run", "model": {"name_or_path": "model"}, "data": {"train": "data.jsonl"}, "deepspeed": {}}
    values |= {"colm": {"large_batch_size": 8, "coreset_size": 4}}

    def read(own: dict[str, object], *overrides: str, **other: object) -> tuple[int, float | None]:
        (tmp_path / "other.yaml").write_text(yaml.safe_dump({**values, **other}))
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"extends": "other.yaml", **own}))
        made = load_recipe(tmp_path / "own.yaml", overrides, needs_files=False)
        return made.steps, made.epochs

    assert read({}, epochs=3) == (0, 3)
    assert read({}, "steps=20", epochs=3) == (20, None)
    assert read({}, "epochs=1", steps=20) == (0, 1)
    assert read({}, "epochs=1", steps="3 epochs") == (0, 1)
    assert read({}, "epochs=1", "steps=20", steps=5) == (20, None)
    assert read({"steps": 300}, epochs=3) == (300, None)
    assert read({"epochs": 2}, steps=300) == (0, 2)
    assert read({"name": "own"}, steps=300) == (300, None)
    assert read({}, "steps=20", "epochs=null", epochs=3) == (20, None)
    assert read({"epochs": None}, steps=300) == (300, None)
    with pytest.raises(ConfigError, match=r"epochs = 3: written beside steps\. Write one of the two"):
        read({"epochs": 3, "steps": 7})


def test_precision_of_a_deepspeed_file(tmp_path: Path) -> None:
    """What it says besides is kept; another precision than the recipe's is refused."""
    values = {"output_dir": "run", "model": {"name_or_path": "model"}, "data": {"train": "data.jsonl"}, "steps": 1}
    values |= {"colm": {"large_batch_size": 8, "coreset_size": 4}}

    def config(dtype: str, look: Any = deepspeed_config, **sections: object) -> dict[str, Any]:
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **sections}))
        model = {"name_or_path": "model", "dtype": dtype}
        made = recipe.Recipe.model_validate({**values, "model": model, "deepspeed": str(tmp_path / "ds.json")})
        return look(made)

    scaled = config("float16", fp16={"enabled": "auto", "initial_scale_power": 8, "loss_scale": "auto"})
    assert scaled["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert scaled["bf16"] == {"enabled": False}
    assert config("bfloat16", bf16={"enabled": True})["bf16"] == {"enabled": True}
    off = config("bfloat16", fp16={"enabled": "auto", "loss_scale": 0})
    assert off["fp16"] == {"enabled": False}  # as in the checkpoints of earlier versions
    for look in (deepspeed_config, lambda made: made.resolve(1)):
        with pytest.raises(ConfigError, match=r"ds\.json: bf16\.enabled is true, but the recipe trains in float32"):
            config("float32", look, bf16={"enabled": True})


def test_weights_are_compared_where_there_are_medoids() -> None:
    """Runs without them, of a recipe by tokens, were written with `matched` before draws became its default."""

    def differences(selector: str, weights: str) -> list[str]:
        colm = {"large_batch_size": 8, "coreset_size": 4, "selector": selector, "probe": {"estimator": "tokens"}}
        values = {"output_dir": "run", "steps": 3, "model": {"name_or_path": "model"}, "data": {"train": "data.jsonl"}}
        now = recipe.Recipe.model_validate({**values, "colm": colm, "deepspeed": {}})
        before = json.loads(json.dumps(now.model_dump()))
        before["colm"]["weights"] = weights
        return recipe_differences(before, now, ())

    assert differences("random", "matched") == differences("keep_random", "matched") == []
    assert differences("colm", "cluster") == ["colm.weights: 'cluster' there, 'matched' here"]


def test_the_section_is_resolved_for_any_number_of_ranks() -> None:
    """A DeepSpeed file that fits two ranks is previewed and checked by one."""
    values = {
        "output_dir": "run",
        "steps": 2,
        "model": {"name_or_path": "model"},
        "data": {"train": "data.jsonl"},
        "colm": {"large_batch_size": 16, "coreset_size": 8},
        "micro_batch_size": 4,
        "deepspeed": {"gradient_accumulation_steps": 1},
    }
    made = recipe.Recipe.model_validate(values)
    assert made.resolve(2).colm == made.resolve_section()
    with pytest.raises(ConfigError, match="4 per micro-batch x 1 steps x 1 ranks is not the coreset of 8"):
        made.resolve(1)
    by_micro_batches = recipe.Recipe.model_validate(values | {"colm": {"large_batch_size": 16}})
    assert by_micro_batches.resolve_section().coreset_size == 4


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_that_extends_another(tmp_path: Path) -> None:
    """Its sections replace the other's whole, and the other's paths are still those beside the other."""
    base = "output_dir: run\nsteps: 5\nmodel: {name_or_path: m}\ndeepspeed: z.json\n"
    base += "data: {train: d.jsonl, max_length: 7}\n"
    write(tmp_path / "base" / "d.jsonl", "{}")
    write(tmp_path / "base" / "z.json", "{}")
    write(tmp_path / "base" / "base.yaml", base + "colm: {large_batch_size: 8, coreset_size: 4, metric: cosine}\n")
    write(tmp_path / "middle.yaml", "extends: base/base.yaml\nname: middle\nsteps: 6\n")
    last = write(tmp_path / "last.yaml", "extends: middle.yaml\ncolm: {large_batch_size: 16, coreset_size: 4}\n")
    found = recipe.load_recipe(last, ["seed=3"])
    assert isinstance(found, recipe.Recipe)
    assert (found.name, found.steps, found.seed, found.data.max_length) == ("middle", 6, 3, 7)
    assert (found.colm.large_batch_size, found.colm.metric) == (16, "l1")
    assert found.data.train == str(tmp_path / "base" / "d.jsonl")
    assert found.deepspeed == str(tmp_path / "base" / "z.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: other.yaml\n", "other.yaml: extends = 'own.yaml': that recipe extends this one"),
        ("extends: own.yaml\n", "own.yaml: extends = 'own.yaml': that recipe extends this one"),
        ("extends: no.yaml\n", "no.yaml: no such recipe. In that folder: other.yaml, own.yaml."),
        ("extends: [other.yaml]\n", "not a path. Name one recipe file"),
    ],
)
def test_what_can_not_be_extended(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "extends: own.yaml\n")
    with pytest.raises(ConfigError) as caught:
        recipe.load_recipe(write(tmp_path / "own.yaml", text))
    assert said in str(caught.value)


@pytest.mark.parametrize(("changes", "wanted"), [([], 0), (["seed=7"], 7), (["seed=7", "colm.seed=3"], 3)])
def test_the_seed_is_that_of_the_choices_too(changes: list[str], wanted: int) -> None:
    recipe = load_recipe(ROOT / "finetune" / "recipes" / "cpu_lora.yaml", changes, needs_files=False)
    assert recipe.colm.seed == wanted


def test_exact_match_asks_held_out_files() -> None:
    changes = ["data.heldout=null", "data.holdout_per_source=4", "evaluation={exact_match: true}"]
    with pytest.raises(ConfigError, match=r"evaluation\.exact_match = True: asks the rows of data\.heldout"):
        load_recipe(ROOT / "finetune" / "recipes" / "cpu_lora.yaml", changes, needs_files=False)
