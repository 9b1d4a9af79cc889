"""A tiny model with a tokenizer of whole words, and text to train it on, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from colm_ds.randomness import private_generator
from tests.tiny_models import VOCABULARY_SIZE, tiny_model

SOURCES = {"algebra": 24, "biology": 20, "code": 4}


def tiny_tokenizer() -> Any:
    """A tokenizer of whole words, `w0` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY_SIZE - 4))]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def rows() -> list[dict[str, str]]:
    """Prompts and completions of three sources, one of them small."""
    generator = private_generator(0, "rows")

    def text() -> str:
        length = int(torch.randint(3, 9, (), generator=generator))
        return " ".join(f"w{word}" for word in torch.randint(0, 93, (length,), generator=generator).tolist())

    return [
        {"prompt": text(), "completion": f" {text()}", "source": source}
        for source, count in SOURCES.items()
        for _ in range(count)
    ]


def save(folder: Path) -> tuple[Path, Path]:
    """Write the model with its tokenizer, and the data; their paths."""
    model, data = folder / "tiny", folder / "train.jsonl"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return model, data
