"""Facts about model families of the recipes: the final norm, modules that LoRA adapts, the pad token.

Other families are found by their structure (`architecture.py`); these run the shorter way through norm and head.

Precision depends on the machine, not on the family: all are published in 16 bits and train in bfloat16 on GPUs, in
float32 on CPUs, as `model.dtype` of each recipe says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_ds.untrusted.json_text import read_json

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """Facts about one Hugging Face `model_type`.

    Attributes:
        norm: attribute of the decoder that holds the final norm.
        output_projection: attribute of the MLP that computes its output.
        lora_targets: modules that LoRA adapts (paper, appendix C).
    """

    norm: str = "norm"
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
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
}
"""Families by `model_type`; SmolLM2 and Llama-3 are `llama`, Zephyr-7B is `mistral`, Zephyr-3B is `stablelm`."""


GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of the class of a tokenizer that is all in its file, as tokenizer_config.json has them."""


def read_tokenizer(place: str, **options: Any) -> Any:
    """Load a tokenizer by its own file, where it says that it is of no class of its own; else as `AutoTokenizer` does.

    `AutoTokenizer` goes by the model type of a config.json beside it, and reads whatever lies beside a Qwen2 with the
    rules of Qwen2's tokenizer: ids would be others than those that a model was trained on.

    Args:
        place: folder or hub name.
        options: for `from_pretrained`.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        declared = read_json(Path(place) / "tokenizer_config.json").get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        declared = None
    own = declared in GENERIC_TOKENIZERS and (Path(place) / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(place, **options)


def set_pad_token(tokenizer: Any) -> None:
    """Give a tokenizer without a pad token its eos token to pad with; no token is added, no embedding resized.

    Phi-2 and Llama-3 come without one. The choice changes nothing: batches are right-padded, attention is causal and
    padding has no labels; an example's own eos keeps its label.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
