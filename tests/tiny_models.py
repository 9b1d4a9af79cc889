"""Tiny random causal LMs of every family the probe knows, on the CPU, with weights that no symmetry makes special."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colm_ds.models.families import FAMILIES
from colm_ds.randomness import private_generator

VOCABULARY_SIZE = 97
BOS_ID, EOS_ID, PAD_ID = 1, 2, 0


def tiny_model(
    family: str, lora: bool = False, dtype: torch.dtype = torch.float32, *, seed: int = 0, rank: int = 4, **config: Any
) -> Any:
    """A causal LM of 2 layers, hidden size 32, 4 heads and 2 key-value heads, in eval mode.

    All weights are random, also norms, biases and the adapter's `lora_B`; the global RNG is left as it was.

    Args:
        family: a `model_type` of `colm_ds.models.families`, or another one that takes the same configuration.
        lora: put a LoRA adapter on the family's targets; base frozen.
        dtype: of all weights, the adapter's too.
        seed: of the weights.
        rank: of the adapter.
        config: overrides of the model's configuration, such as `tie_word_embeddings=True`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **tiny_config(**config)))
        if lora:
            model = add_lora(model, family, rank)
    randomise(model, seed)
    return model.to(dtype).eval()


def tiny_config(**config: Any) -> dict[str, Any]:
    """Arguments of the configuration of a tiny model, with the given ones put over them."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 128,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "attn_implementation": "sdpa",
    } | config


def add_lora(model: nn.Module, family: str, rank: int = 4, **config: Any) -> Any:
    """The model under PEFT LoRA on the family's targets; its `lora_B` is still zero."""
    from peft import LoraConfig, get_peft_model

    targets = list(FAMILIES[family].lora_targets)
    settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": targets} | config
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter with numbers of its own: matrices of standard deviation 0.2, norms near 1, biases near 0."""
    generator = private_generator(seed, "tiny model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(1.0 + 0.1 * noise if is_scale else 0.2 * noise)
