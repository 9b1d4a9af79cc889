"""Model-family facts in one place: where the last layer's parts are and what LoRA adapts."""

from __future__ import annotations

from dataclasses import dataclass

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """Facts about one Hugging Face `model_type`.

    Attributes:
        norm: attribute of the decoder that holds the final norm.
        value_projection: attribute of the attention that computes the values.
        fused: whether that projection also computes queries and keys (values are its last rows).
        output_projection: attribute of the MLP that computes its output.
        lora_targets: modules that LoRA adapts (paper, appendix C).
    """

    norm: str = "norm"
    value_projection: str = "v_proj"
    fused: bool = False
    output_projection: str = "down_proj"
    lora_targets: tuple[str, ...] = _SEPARATE


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "stablelm": Family(),
    "phi": Family(
        norm="final_layernorm",
        output_projection="fc2",
        lora_targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
    ),
    "phi3": Family(
        value_projection="qkv_proj",
        fused=True,
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
}
"""Families by `model_type`; SmolLM2 and Llama-3 are `llama`, Zephyr-7B is `mistral`, Zephyr-3B is `stablelm`."""
