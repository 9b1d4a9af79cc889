"""Where the last V projection is found, and what is said of models in which it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from colm_ds.errors import ProbeError
from colm_ds.models.architecture import find_architecture
from colm_ds.models.families import FAMILIES
from tests.probe.oracles import target_weight
from tests.tiny_models import VOCABULARY_SIZE, add_lora, randomise, tiny_config, tiny_model

NUM_VALUES = 16  # 2 key-value heads of 8


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_parts(family: str, lora: bool) -> None:
    model = tiny_model(family, lora)
    architecture = find_architecture(model)
    target = architecture.targets[0]
    weight, rows = target_weight(model)
    assert target.module.weight is weight
    assert dict(model.named_modules())[target.name] is target.module
    assert (target.start, target.stop) == (rows.start, weight.shape[0])
    assert (target.out_features, target.in_features) == (NUM_VALUES, weight.shape[1])
    assert target.num_coordinates == weight[rows].numel()
    assert architecture.last_layer is architecture.layers[1]
    assert architecture.head.weight.shape == (VOCABULARY_SIZE, 32)
    assert (architecture.hidden_size, architecture.vocabulary_size) == (32, VOCABULARY_SIZE)


def test_fused_projection_keeps_the_value_rows_only() -> None:
    target = find_architecture(tiny_model("phi3")).targets[0]
    assert (target.start, target.stop) == (32 + NUM_VALUES, 32 + 2 * NUM_VALUES)


def test_head_size_of_its_own() -> None:
    target = find_architecture(tiny_model("llama", head_dim=16)).targets[0]
    assert target.out_features == 2 * 16


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "layers_to_transform": [0]}],
    ids=["no V", "not the last layer"],
)
def test_lora_elsewhere_leaves_the_projection_itself(settings: dict[str, Any]) -> None:
    model = add_lora(tiny_model("llama"), "llama", **settings)
    assert find_architecture(model).targets[0].name.endswith("layers.1.self_attn.v_proj")


def test_adapter_put_on_without_peft_model() -> None:
    model = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model, "default")
    assert find_architecture(model).targets[0].name == "model.layers.1.self_attn.v_proj.lora_B.default"


def test_inactive_second_adapter_does_not_matter() -> None:
    model = tiny_model("llama", lora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    assert find_architecture(model).targets[0].name.endswith("lora_B.default")


def two_active() -> Any:
    model = tiny_model("llama", lora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> Any:
    model = tiny_model("llama", lora=True)
    model.merge_adapter()
    return model


def disabled() -> Any:
    model = tiny_model("llama", lora=True)
    model.base_model.disable_adapter_layers()
    return model


def adalora() -> Any:
    return get_peft_model(tiny_model("llama"), AdaLoraConfig(target_modules=["v_proj"], total_step=10))


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **tiny_config())


def mamba() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("make", "wrong", "advice"),
    [
        (mamba, "type 'mamba': its last layer, MambaBlock, has no attention with a V", "selector without a probe"),
        (lambda: nn.Linear(2, 2), "type 'Linear'", "selector without a probe"),
        (lambda: AutoModel.from_config(config_of("llama")), "LlamaModel", "AutoModelForCausalLM"),
        (lambda: AutoModel.from_config(config_of("phi")), "PhiModel", "AutoModelForCausalLM"),
        (
            lambda: AutoModelForSequenceClassification.from_config(config_of("llama")),
            "LlamaForSequenceClassification",
            "AutoModelForCausalLM",
        ),
        (adalora, "v_proj of the last layer is adapted by a variant of LoRA", "Use LoRA, rsLoRA or DoRA"),
        (two_active, "2 active LoRA adapters", "exactly one active"),
        (merged, "merged: True", "unmerged"),
        (disabled, "disabled: True", "exactly one active"),
    ],
    ids=[
        "mamba",
        "no model",
        "decoder",
        "phi decoder",
        "classifier",
        "adalora",
        "two adapters",
        "merged",
        "disabled",
    ],
)
def test_says_what_is_wrong_and_what_to_do(make: Any, wrong: str, advice: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = make()
    with pytest.raises(ProbeError) as caught:
        find_architecture(model)
    assert wrong in str(caught.value)
    assert advice in str(caught.value)


def test_unmerged_again_is_fine() -> None:
    model = merged()
    model.unmerge_adapter()
    randomise(model)
    assert find_architecture(model).targets[0].name.endswith("lora_B.default")
