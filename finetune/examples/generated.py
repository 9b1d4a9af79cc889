"""A tiny random model, a tokenizer of whole words and rows of three sources, for examples run without arguments.

python finetune/examples/generated.py FOLDER      # writes FOLDER/model and FOLDER/train.jsonl
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

FOLDER = Path("runs/examples/generated")

NUMBERS = 20

SMALL_SIZES = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "logging_steps": 1,
    "use_cpu": not torch.accelerator.is_available(),  # otherwise a Trainer knows nothing of the other ranks
}
"""A coreset of 8 on one rank, for a trainer."""


def rows(number: int = 240) -> list[dict[str, str]]:
    """Return prompts and completions: sums, differences, and the larger of two numbers as a small source."""
    generator = random.Random(0)
    made = []
    for place in range(number):
        one, other = generator.randrange(NUMBERS), generator.randrange(NUMBERS)
        if place % 12 == 0:
            made.append({"prompt": f"larger {one} {other} =", "completion": f" {max(one, other)}", "source": "larger"})
        elif place % 2:
            made.append({"prompt": f"{one} plus {other} =", "completion": f" {one + other}", "source": "sums"})
        else:
            answer = f" minus {other - one}" if one < other else f" {one - other}"
            made.append({"prompt": f"{one} minus {other} =", "completion": answer, "source": "differences"})
    return made


def write(folder: Path = FOLDER) -> tuple[str, str]:
    """Write the model with its tokenizer, and the rows; return their paths."""
    model, data = folder / "model", folder / "train.jsonl"
    model.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "<s>", "</s>", "<unk>", "plus", "minus", "larger", "=", *map(str, range(2 * NUMBERS))]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(model)
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    LlamaForCausalLM(config).save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return str(model), str(data)


def find(model: str | None = None, named: str | None = None, folder: Path = FOLDER) -> tuple[str, str]:
    """Return the paths of model and data that were named, or of what the first rank of each node then writes.

    Raises:
        SystemExit: if only one of the two is named, or what is written is not there after a minute.
    """
    if model is not None and named is not None:
        return model, named
    if model is not None or named is not None:
        raise SystemExit(f"{model or named}: give model and data together, or neither for a tiny model and made rows.")
    data, begun = folder / "train.jsonl", time.monotonic()
    if os.environ.get("LOCAL_RANK", "0") == "0" and not data.exists():
        aside = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}")
        write(aside)
        try:
            aside.rename(folder)  # at once, so that all is there where anything is
        except OSError:  # another node was first, on a disk that both see
            shutil.rmtree(aside)
    while not data.exists():
        if time.monotonic() - begun > 60:
            raise SystemExit(f"{data}: not there after a minute. Remove {folder}, then start again.")
        time.sleep(0.1)
    return str(folder / "model"), str(data)


if __name__ == "__main__":
    print(*write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
