"""Pack SmolLM2's quantised weights: read in seconds where transformers takes a minute for the GGUF file.

    python -m benchmarks.gpu.weights pack GGUF FOLDER        # weights.safetensors, config.json, the tokenizer
    python -m benchmarks.gpu.weights unpack FOLDER MODEL     # a model folder in bf16

Packing keeps the quantised rows, under Hugging Face's names and in its order of rows, and compares what they unpack to
with what transformers reads.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of a Llama: names in GGUF and in transformers."""

WEIGHTS = "weights.safetensors"


def main() -> None:
    """Run from the command line."""
    verb, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {"pack": pack, "unpack": unpack}[verb](source, target)


def pack(gguf_file: Path, folder: Path) -> None:
    """Write the packed weights, and check them.

    Args:
        gguf_file: file of a Llama with tied embeddings.
        folder: folder, created if missing.

    Raises:
        SystemExit: if the unpacked weights differ from those that transformers reads.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rows: dict[str, Tensor] = {}
    types: dict[str, int] = {}
    for tensor in GGUFReader(gguf_file).tensors:
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        data = np.array(tensor.data)
        name = hugging_face_name(tensor.name)
        rows[name] = torch.from_numpy(interleaved(data, heads[kind]) if kind in heads else data).contiguous()
        types[name] = int(tensor.tensor_type)
    save_file(rows, folder / WEIGHTS, metadata={"types": json.dumps(types)})
    written, wanted = read(folder / WEIGHTS), model.state_dict()
    wrong = [name for name, value in written.items() if not torch.equal(value, wanted[name])]
    missing = wanted.keys() - written.keys() - {"lm_head.weight"}
    if wrong or missing:
        sys.exit(f"weights: {len(wrong)} differ from what transformers reads, {len(missing)} are missing: {wrong[:3]}")
    print(f"weights: {len(written)} tensors, the same as transformers reads")


def unpack(folder: Path, target: Path) -> None:
    """Write a model folder in bf16; atomically.

    Args:
        folder: folder that `pack` wrote.
        target: folder to create.
    """
    aside = target.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, aside)
    values = {name: value.to(torch.bfloat16) for name, value in read(folder / WEIGHTS).items()}
    save_file(values, aside / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def read(file: Path) -> dict[str, Tensor]:
    """Return the weights in float32 by name."""
    from gguf import GGMLQuantizationType, dequantize

    with safe_open(file, "pt") as opened:
        types: dict[str, Any] = json.loads(opened.metadata()["types"])
    return {
        name: torch.from_numpy(np.array(dequantize(value.numpy(), GGMLQuantizationType(types[name])), dtype=np.float32))
        for name, value in load_file(file).items()
    }


def hugging_face_name(name: str) -> str:
    """Return the name in transformers of a tensor of a GGUF file."""
    if name in NAMES:
        return NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in NAMES:
        raise SystemExit(f"weights: {name}: no such tensor in a Llama")
    return f"model.layers.{match[1]}.{NAMES[match[2]]}.weight"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of queries or keys in transformers' order: halves of a head, where GGUF has pairs."""
    count = len(rows) // heads
    return rows.reshape(heads, count // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


if __name__ == "__main__":
    main()
