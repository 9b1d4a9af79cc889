"""Tokenizers, templates and rows of conversations for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi é 你"},
    {"role": "assistant", "content": "two words\nand a line"},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "e"},  # also a letter of <|im_end|>
)
_SPECIAL = re.compile(r"<\|[a-zA-Z_0-9]+\|>|<｜[^>]*?｜>|</?(?:start_of_turn|end_of_turn)>")


def special_texts(template: str) -> list[str]:
    """Return what looks like a special token in a template."""
    return sorted(set(_SPECIAL.findall(template)))


def chat_tokenizer(
    specials: Sequence[str] = ("<|im_start|>", "<|im_end|>"), template: str | None = CHATML, *, rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and special tokens, the last of which ends a sequence.

    With `rstrip` special tokens take the blanks behind them, as Phi-3's do.
    """
    every = ["<pad>", "<s>", *(text for text in specials if text != "<s>")]
    vocab = {text: number for number, text in enumerate(every)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=AddedToken(every[-1], rstrip=rstrip, normalized=False, special=True),
        pad_token="<pad>",
        additional_special_tokens=[
            AddedToken(text, rstrip=rstrip, normalized=False, special=True) for text in every[2:]
        ],
    )
    tokenizer.chat_template = template
    return tokenizer


def as_chatml(
    tokenizer: Any, messages: Sequence[dict[str, Any]], trained: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return ids and labels of messages in ChatML, put together piece by piece; `trained` are numbers of messages."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, label: bool) -> None:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(piece)
        labels.extend(piece if label else [-100] * len(piece))

    for number, message in enumerate(messages):
        add(f"<|im_start|>{message['role']}\n", False)
        add(f"{message['content']}<|im_end|>", number in trained)
        add("\n", False)
    return ids, labels
