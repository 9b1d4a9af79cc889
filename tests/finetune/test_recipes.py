"""Every recipe is valid, and every family of theirs trains end to end from a tiny configuration of its own kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.models.families import FAMILIES
from colm_ds.recipes.recipe import Recipe, load_recipe
from colm_ds.training.tasks.instructions import load_data
from tests.data.chats import CHATML, chat_tokenizer, special_texts
from tests.finetune.test_entry import ROOT

FOLDER = ROOT / "finetune" / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if "_choices" not in path.stem)

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "phi2_math": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "phi3_mini_math": {"model_type": "phi3"},
    "zephyr_3b_math": {"model_type": "stablelm", "partial_rotary_factor": 0.25, "num_key_value_heads": 4},
    "zephyr_7b_math": {"model_type": "mistral", "num_key_value_heads": 2},
    "llama3_8b_math": {"model_type": "llama", "num_key_value_heads": 2},
    "llama3_2_1b_math": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3_0_6b_math": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3_8b_math": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "gemma3_1b_math": {"model_type": "gemma3_text", "head_dim": 16, "num_key_value_heads": 1, "sliding_window": 32},
    "smollm3_3b_math": {"model_type": "smollm3", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mixtral_8x7b_math": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
}
TINY |= {f"{name}_tokens": config for name, config in TINY.items()}
"""The families' own features: fused projections, partial rotary embeddings, grouped queries."""


BY_DEFAULT = ("phi3_mini_math",)
"""Families that train in a default run; the others are slow tests."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture with its tokenizer."""
    folder = tmp_path_factory.mktemp("recipes")
    write_mixture(folder, seed=1, scale=0.05)
    return folder


def overrides_of(name: str, mixture: Path, output: Path) -> list[str]:
    """What lets a recipe run on a small machine: a tiny model of its family, small data, two steps."""
    shape = SHAPE | {"num_key_value_heads": 4} | TINY[name]
    return [
        "model.name_or_path=null",
        f"model.config={json.dumps(shape)}",
        f"tokenizer={mixture / 'tokenizer'}",
        f"data.train={mixture / 'train.jsonl'}",
        "data.max_length=96",
        "data.holdout_per_source=2",
        "data.cache_dir=null",
        "lora.rank=4",
        *([] if name.endswith("_tokens") else ["colm.mask.size=16"]),
        *(["model.quantization=null"] if name.startswith("mixtral") else []),  # random weights are not quantized
        "colm.large_batch_size=16",
        "colm.coreset_size=8",
        "steps=2",
        "deepspeed=ds_configs/zero2.json",
        f"output_dir={output}",
    ]


CHAT_TEMPLATES: dict[str, str | None] = {
    "qwen3_0_6b": "qwen3",
    "qwen3_8b": "qwen3",
    "gemma3_1b": "gemma3",
    "llama3_2_1b": "llama3_2",
    "smollm3_3b": None,
    "mixtral_8x7b": None,
}
"""Families with a recipe on conversations, each with TRL's copy of its model's template; None: it has none."""


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_a_chat_recipe_fits_its_models_template(family: str, tmp_path: Path) -> None:
    """The keys of its data section read conversations of several turns: all of the last turn is trained, to its end."""
    name = CHAT_TEMPLATES[family]
    template = CHATML
    if name is not None:
        folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
        template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = chat_tokenizer([*special_texts(template), "</s>"], template)
    turns = [{"role": role, "content": f"{role} {n}."} for n in range(2) for role in ("user", "assistant")]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": turns, "source": "ab"[n % 2]}) + "\n" for n in range(150)))
    path = FOLDER / f"{family}_chat.yaml"
    all_of_it = ["data.cache_dir=null", "data.holdout_per_source=0", "evaluation.every=0"]
    recipe = load_recipe(path, [f"data.train={chats}", *all_of_it])
    assert isinstance(recipe, Recipe)
    train, _ = load_data(recipe, tokenizer)
    assert (train.source_counts(), train.prompts) == ({"a": 75, "b": 75}, ("chat",))
    example = train[0]
    trained = tokenizer.decode(example.input_ids[example.labels != -100])
    first = "assistant 0." if recipe.data.train_on == "all" else "assistant 1."
    assert trained.startswith(first)
    assert "assistant 1." in trained
    assert trained.count("assistant") == (2 if recipe.data.train_on == "all" else 1)
    math_recipe = load_recipe(FOLDER / f"{family}_math.yaml", [f"data.train={chats}"])
    same = {"colm", "lora", "optimizer", "steps", "micro_batch_size", "deepspeed"}
    assert {key: getattr(recipe, key) for key in same} == {key: getattr(math_recipe, key) for key in same}
    assert recipe.model.model_copy(update={"name_or_path": ""}) == math_recipe.model.model_copy(
        update={"name_or_path": ""}
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, mixture: Path) -> None:
    text = path.read_text(encoding="utf-8")
    inherits = path.stem == "demo"  # the packaged recipe's held-out file
    command = text.split("\n")[0]  # that runs it, or the sweep that it is for
    assert f"finetune/recipes/{path.name}" in command
    data = mixture / "train.jsonl"
    overrides = [f"data.train={data}", f"data.heldout={data if inherits or '  heldout: runs' in text else 'null'}"]
    if "smollm2" in path.stem:
        overrides.append("model.name_or_path=elsewhere")  # the package may not be installed
    recipe = load_recipe(path, overrides)
    if path.stem.endswith("_tokens"):  # but for the choice the recipe beside it
        other = load_recipe(FOLDER / f"{path.stem.removesuffix('_tokens')}.yaml", overrides)
        mine, theirs = (each.model_dump(exclude={"colm", "name", "output_dir"}) for each in (recipe, other))
        assert mine == theirs
        assert recipe.colm.large_batch_size == 4 * (recipe.colm.coreset_size or 0)
        assert (recipe.colm.probe.estimator, recipe.colm.selector) == ("tokens", "importance")
    if path.stem in TINY:
        assert recipe.lora is not None
        assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (128, 512, 0.05)
        by_tokens = path.stem.endswith("_tokens")
        assert (recipe.colm.large_batch_size, recipe.colm.coreset_size) == (256 if by_tokens else 128, 64)
        assert recipe.colm.probe.estimator == ("tokens" if by_tokens else "spsa")
        assert recipe.optimizer.lr == 2e-5


def test_every_family_has_a_recipe() -> None:
    """qwen2 has the architecture of llama with biases; it shares its recipe."""
    assert {config["model_type"] for config in TINY.values()} | {"qwen2"} >= set(FAMILIES)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_family_trains(name: str, mixture: Path, tmp_path: Path) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    recipe = ROOT / "finetune" / "recipes" / f"{name}.yaml"
    command = [sys.executable, "finetune/train.py", str(recipe), *overrides_of(name, mixture, tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["examples_trained"] == 16
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    family = FAMILIES.get(TINY[name]["model_type"])
    expected = ["q_proj", "k_proj", "v_proj", "o_proj"] if family is None else family.lora_targets
    assert sorted(config["target_modules"]) == sorted(expected)
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run["why_not_replay"] is None  # checkpointing is on, so the probe's forward is replayed, if there is one
