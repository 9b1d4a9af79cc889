"""The `lora` section: names that are checked, and an adapter trained before as the start."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from colm_ds.errors import CheckpointError, ConfigError
from colm_ds.recipes.adapter import load_adapter, section_of, trained_names
from colm_ds.recipes.model import add_lora, load_model
from colm_ds.recipes.recipe import load_recipe
from colm_ds.recipes.sections import LoraConfig, ModelConfig
from colm_ds.training.start_or_resume import recipe_differences
from tests.tiny_models import randomise, tiny_model

SETTINGS = {
    "rank": 3,
    "alpha": 5.0,
    "dropout": 0.0,
    "targets": ["q_proj", "v_proj"],
    "use_rslora": True,
    "use_dora": True,
    "layers_to_transform": [1],
    "rank_pattern": {"q_proj": 2},
    "modules_to_save": ["lm_head"],
}


def made(settings: dict[str, Any], seed: int = 0) -> Any:
    model = add_lora(tiny_model("llama"), LoraConfig.model_validate(settings))
    randomise(model, seed)
    return model.eval()


def write_recipe(folder: Path, **sections: Any) -> Path:
    (folder / "data.jsonl").write_text('{"instruction": "a", "output": "b", "source": "s"}\n')
    values: dict[str, Any] = {
        "output_dir": "run",
        "steps": 1,
        "model": {"name_or_path": "base"},
        "data": {"train": "data.jsonl"},
        "colm": {"large_batch_size": 4, "coreset_size": 2},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def test_an_adapter_written_by_peft_is_the_start(tmp_path: Path) -> None:
    """The recipe names the folder alone: settings and weights are the adapter's, and all of them are trained."""
    first = made(SETTINGS, seed=1)
    first.save_pretrained(tmp_path / "adapter")
    recipe = load_recipe(write_recipe(tmp_path, lora={"adapter": "adapter"}))
    assert recipe.lora is not None
    assert recipe.lora.model_dump(exclude={"adapter"}) == LoraConfig.model_validate(SETTINGS).model_dump(
        exclude={"adapter"}
    )
    second = made(recipe.lora.model_dump(), seed=2)
    ids = torch.arange(3, 12)[None]
    load_adapter(second, recipe.lora.adapter or "")
    for name, value in second.named_parameters():
        if not value.requires_grad:
            value.data.copy_(dict(first.named_parameters())[name])
    assert torch.equal(second(input_ids=ids).logits, first(input_ids=ids).logits)
    trained = {name for name, value in first.named_parameters() if value.requires_grad}
    assert {name for name, value in second.named_parameters() if value.requires_grad} == trained
    assert any("magnitude" in name for name in trained)
    held = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert LoraConfig.model_validate(section_of(held)) == LoraConfig.model_validate(SETTINGS)


def test_names_in_files_are_those_of_peft(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = made(SETTINGS)
    model.save_pretrained(tmp_path)
    written, own = load_file(tmp_path / "adapter_model.safetensors"), dict(model.named_parameters())
    names = trained_names(model)
    assert set(names.values()) == set(written)
    assert all(torch.equal(own[name], written[saved]) for name, saved in names.items())


def test_what_contradicts_the_adapter_is_listed(tmp_path: Path) -> None:
    made(SETTINGS).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "all", "use_qalora": True}))
    lora = {"adapter": "adapter", "rank": 8, "use_dora": False, "dropout": 0.3, "targets": ["v_proj", "q_proj"]}
    with pytest.raises(ConfigError, match="4 problems") as caught:
        load_recipe(write_recipe(tmp_path, lora=lora))
    for part in ("lora.rank = 8", "lora.use_dora = False", "its bias is 'all'", "its use_qalora is True"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "no adapter_config.json there"),
        ({}, "no adapter_config.json there"),
        ({"peft_type": "IA3"}, "an adapter of type IA3"),
    ],
)
def test_no_adapter(content: dict[str, Any] | None, wrong: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=wrong):
        load_recipe(write_recipe(tmp_path, lora={"adapter": "adapter"}))


def test_weights_of_another_model(tmp_path: Path) -> None:
    made(SETTINGS).save_pretrained(tmp_path)
    other = add_lora(tiny_model("llama", vocab_size=50), LoraConfig.model_validate(SETTINGS))
    with pytest.raises(CheckpointError, match="1 of its tensors do not fit"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        (
            {"targets": ["q_porj"], "modules_to_save": ["head"], "layers_to_transform": [1, 2, -1]},
            ("lora.targets = 'q_porj'", "lora.modules_to_save = 'head'", "no layers [2, -1]", "from 0 to 1"),
        ),
        (
            {"rank_pattern": {"w_proj": 2}, "alpha_pattern": {"x": 1}, "target_parameters": ["mlp.experts.w"]},
            ("lora.rank_pattern = 'w_proj'", "lora.alpha_pattern = 'x'", "no fused experts"),
        ),
        ({"targets": "q_porj"}, ("lora.targets = q_porj",)),
    ],
)
def test_names_that_peft_would_pass_over(section: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(tiny_model("llama"), LoraConfig.model_validate({"dropout": 0.0, **section}))
    for part in parts:
        assert part in str(caught.value)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    lora = {"target_parameters": ["x"], "use_dora": True, "targets": []}
    model = {"name_or_path": "base", "quantization": "8bit", "bnb_4bit_quant_type": "fp4", "gguf_file": "x"}
    with pytest.raises(ConfigError, match="4 problems") as caught:
        load_recipe(write_recipe(tmp_path, lora=lora, model=model))
    for part in ("lora.dropout = 0.05", "lora.use_dora = True", "bnb_4bit_quant_type = 'fp4'", "no GGUF files"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="Add a lora section"):
        load_recipe(write_recipe(tmp_path, model={"name_or_path": "base", "quantization": "4bit"}))


def test_runs_of_earlier_versions_can_be_resumed(tmp_path: Path) -> None:
    """Their recipes lack the new keys, which stand for what those versions did."""
    recipe = load_recipe(write_recipe(tmp_path, lora={"rank": 4}))
    before = json.loads(recipe.model_dump_json())
    for section in ("lora", "model"):
        for key in list(before[section]):
            if key.startswith(
                ("use_", "layers_", "rank_", "alpha_", "target_", "modules_", "adapter", "quant", "bnb_")
            ):
                del before[section][key]
    assert len(before["lora"]) == 4
    assert recipe_differences(before, recipe, set()) == []
    other = load_recipe(write_recipe(tmp_path, lora={"rank": 4, "use_dora": True}))
    assert recipe_differences(before, other, set()) == ["lora.use_dora: False there, True here"]


def test_quantization_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_model("mixtral", num_local_experts=3).save_pretrained(tmp_path / "experts")
    if importlib.util.find_spec("bitsandbytes") is not None:
        section = ModelConfig.model_validate({"name_or_path": str(tmp_path / "experts"), "quantization": "8bit"})
        with pytest.raises(ConfigError, match=r"gate_up_proj of MixtralExperts .* Write 4bit"):
            load_model(section, LoraConfig(), None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    section = ModelConfig.model_validate({"name_or_path": str(tmp_path / "base"), "quantization": "4bit"})
    with pytest.raises(ConfigError, match="Run pip install --no-deps bitsandbytes"):
        load_model(section, LoraConfig(), None)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapter_of_embeddings_is_the_start_with_and_without_them(tmp_path: Path, frozen: bool) -> None:
    """PEFT by itself writes the embeddings beside, ours does not; neither warns, nor asks the hub for the base."""
    settings = {**SETTINGS, "targets": ["embed_tokens"], "modules_to_save": [], "rank_pattern": {}, "use_dora": False}
    settings |= {"layers_to_transform": None}
    first, other = made(settings, seed=1), made(settings, seed=2)
    first.save_pretrained(tmp_path / "adapter", save_embedding_layers=frozen)
    load_adapter(other, str(tmp_path / "adapter"))
    named = dict(other.named_parameters())
    for name, value in first.named_parameters():
        if "lora_" in name:
            assert torch.equal(named[name], value), name
