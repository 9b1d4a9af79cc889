"""Tokenizers and small files for the tests of colm_ds.data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Writer = Callable[..., Path]


def byte_tokenizer(bos: bool = False, trailing_eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte; it adds a bos or an eos by itself if asked to."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos or trailing_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if trailing_eos else ''}",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, no bos."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer, without pad."""
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")


@pytest.fixture(scope="session")
def mistral(shared_data: Path) -> PreTrainedTokenizerBase:
    """Mistral's first tokenizer (SentencePiece BPE that adds bos), as transformers reads its model file."""
    return LlamaTokenizer.from_pretrained(shared_data / "tokenizers" / "mistral_v1", add_bos_token=True)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Writer:
    """Writes records to a file in the temporary folder and returns its path."""

    def write(records: list[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write
