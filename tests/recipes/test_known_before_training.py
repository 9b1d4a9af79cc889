"""Faults of a recipe that can be known when it is read: one message that names the key, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.errors import ConfigError
from colm_ds.recipes.model import _check_config, _check_heads
from colm_ds.recipes.recipe import load_recipe

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"source": "a", "instruction": "b", "output": "c"}\n', encoding="utf-8")
    values: dict[str, Any] = {
        "output_dir": "run",
        "steps": 2,
        "model": {"config": CONFIG},
        "tokenizer": str(tmp_path),
        "data": {"train": "rows.jsonl", "cache_dir": None},
        "colm": {"large_batch_size": 4, "coreset_size": 2},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_paths_are_expanded(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("RUNS", "/runs")
    read = load_recipe(recipe, ["output_dir=$RUNS/one", "data.cache_dir=~/tokens"])
    assert (read.output_dir, read.data.cache_dir) == ("/runs/one", "/home/somebody/tokens")  # type: ignore[attr-defined]
    (recipe.parent / "table.pt").write_bytes(b"")
    monkeypatch.setenv("TABLES", str(recipe.parent))
    table = load_recipe(recipe, ["colm.selector=rho_loss", "colm.options={table: $TABLES/table.pt}"]).colm.options
    assert table == {"table": str(recipe.parent / "table.pt")}
    monkeypatch.delenv("RUNS")
    with pytest.raises(ConfigError, match=r"output_dir = '\$RUNS/one': there is no environment variable RUNS"):
        load_recipe(recipe, ["output_dir=$RUNS/one"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas"),
        ("optimizer.betas=[0.9, 0.5, 0.1]", r"optimizer\.betas = .* must have at most 2 items"),
        ("colm.small_share=2", "colm.small_share = 2: must be 'auto' or at most 1"),
        ("optimizer.eps=.nan", "optimizer.eps"),
    ],
)
def test_numbers_that_no_optimizer_takes(recipe: Path, change: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(recipe, [change])


@pytest.mark.parametrize("weights", ["{A: 1, B: -1}", "{A: 0}", "{A: .nan}"])
def test_weights_of_a_mixture(repo_root: Path, weights: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights"):
        load_recipe(repo_root / "pretrain" / "recipes" / "demo.yaml", [f"data.weights={weights}"], needs_files=False)


def test_a_key_that_is_there_twice(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(f"{text}steps: 3\n", encoding="utf-8")
    first = text.splitlines().index("steps: 2") + 1
    with pytest.raises(
        ConfigError, match=rf"line {len(text.splitlines()) + 1}: the key 'steps' is there twice, .* {first}"
    ):
        load_recipe(recipe)


def test_a_misspelled_key_of_the_model() -> None:
    _check_config(CONFIG)
    _check_config({"model_type": "gpt2", "n_embd": 32, "hidden_size": 32})
    with pytest.raises(ConfigError, match=r"num_hidden_layer: unknown key. Did you mean 'num_hidden_layers'"):
        _check_config({**CONFIG, "num_hidden_layer": 2})


def test_heads_that_do_not_divide() -> None:
    from transformers import AutoConfig

    def made(**values: Any) -> Any:
        return AutoConfig.for_model(**{**CONFIG, **values})

    _check_heads(made())
    with pytest.raises(ConfigError, match="num_key_value_heads = 3: does not divide num_attention_heads = 4"):
        _check_heads(made(num_key_value_heads=3))
