"""Tiny configurations of every causal LM class that the installed transformers builds from a configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from tests.tiny_models import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE, randomise

NUM_LAYERS, HIDDEN_SIZE = 2, 32

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "d_model": HIDDEN_SIZE,
    "n_embd": HIDDEN_SIZE,
    "embedding_size": HIDDEN_SIZE,
    "word_embed_proj_dim": HIDDEN_SIZE,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_layers": NUM_LAYERS,
    "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "decoder_layers": NUM_LAYERS,
    "encoder_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "sliding_window": 6,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "moe_latent_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "resid_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "hidden_dropout": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "is_decoder": True,
    "moe_layers": [1],
    "interleave_moe_layer_step": 1,
}
"""Values by name; a configuration gets those whose names it has."""

_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_MANY = {"head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT,
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "longcat_flash": _LATENT,
    "minicpm3": _LATENT,
    "sarvam_mla": _LATENT,
    "youtu": _LATENT,
    "dots1": {"layer_types": ["full_attention"] * 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 24}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "musicgen_decoder": {"dropout": 0.0},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "hunyuan_v1_dense": _MANY,
    "hunyuan_v1_moe": _MANY | {"moe_topk": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": _MANY,
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron": _MANY | {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
    "kimi_linear": _LATENT,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
}
"""What single types need besides."""


def causal_types() -> dict[str, str]:
    """Class of the causal LM of every type that transformers knows, by `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The configuration of a type with two layers, hidden size 32, 4 heads and 2 key-value heads where it has such."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _small(CONFIG_MAPPING[model_type], OWN.get(model_type, {}) | overrides)
    config._experts_implementation = "eager"  # others do not compute in float64
    return config


def _small(kind: Any, own: dict[str, Any]) -> Any:
    default = kind()
    parts = {
        name: part
        for name, part in (getattr(default, "sub_configs", None) or {}).items()
        if part is not AutoConfig and name not in ("attn_config", "ffn_config")
    }
    values: dict[str, Any] = {name: _small(part, OWN.get(part.model_type, {})) for name, part in parts.items()}
    values |= {key: value for key, value in SMALL.items() if _takes(default, key)}
    values |= {key: value for key, value in SMALL.items() if key.endswith("token_id")}
    kinds = getattr(default, "layer_types", None)
    computed = any(isinstance(getattr(kind, name, None), property) for name in ("layer_types", "layers_block_type"))
    if kinds and not computed:
        values["layer_types"] = [*kinds[: NUM_LAYERS - 1], kinds[-1]]
    return kind(**values | own)


def _takes(default: Any, key: str) -> bool:
    """Return whether a configuration has a value of this name that can be set."""
    try:
        known = getattr(type(default), key, None)
        return not isinstance(known, property) and getattr(default, key, None) is not None
    except Exception:  # it varies from layer to layer
        return True


def tiny_causal_lm(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny causal LM of a type, its weights random and its mode eval; the global RNG is left as it was."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))
    randomise(model)
    return model.to(dtype).eval()


def num_parameters(model_type: str) -> int:
    """Elements of the tiny model, without building it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(model_type)).parameters())
