"""Weights that do not fit a model, or hold no numbers, are refused wherever a model is loaded, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colm_ds.errors import ConfigError
from colm_ds.recipes.model import load_model
from colm_ds.recipes.sections import LoraConfig, ModelConfig
from tests.tiny_models import tiny_model

Weights = dict[str, Tensor]


def damaged(folder: Path, change: Callable[[Weights], Weights], **config: Any) -> str:
    tiny_model("llama", **config).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


def renamed(weights: Weights) -> Weights:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def without_a_layer(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}


def without_head(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def wider(weights: Weights) -> Weights:
    name = "model.norm.weight"
    return {**weights, name: torch.ones(len(weights[name]) + 1)}


def with_nan(weights: Weights) -> Weights:
    broken = weights["model.norm.weight"].clone()
    broken[3] = torch.nan
    return {**weights, "model.norm.weight": broken}


CASES: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], list[str]]] = {
    "a prefix": (renamed, {}, ["are missing in its files", "have no place in the model", "module.model"]),
    "a layer missing": (without_a_layer, {}, ["9 tensors are missing", "model.layers.1.input_layernorm.weight"]),
    "an untied head missing": (without_head, {"tie_word_embeddings": False}, ["1 tensors are missing", "lm_head"]),
    "another shape": (wider, {}, ["1 tensors have another shape", "model.norm.weight"]),
    "a NaN": (with_nan, {}, ["1 tensors hold numbers that are not finite: model.norm.weight"]),
}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=["q_proj"])], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_training_refuses(case: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    change, config, said = CASES[case]
    folder = damaged(tmp_path / "model", change, **config)
    with pytest.raises(ConfigError) as caught:
        load_model(ModelConfig(name_or_path=folder), lora, None)
    assert all(part in str(caught.value) for part in (folder, *said)), caught.value


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "model", lambda weights: weights, tie_word_embeddings=True)
    assert load_model(ModelConfig(name_or_path=folder), None, None) is not None


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=["q_proj"])], ids=["full", "lora"])
def test_an_adapter_is_not_a_model(lora: LoraConfig | None, tmp_path: Path) -> None:
    base = damaged(tmp_path / "base", lambda weights: weights)
    model = load_model(ModelConfig(name_or_path=base), None, None)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="a LoRA adapter, not a model"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "adapter")), lora, None)
