"""Tokenise prompts of training and evaluation: instructions, and texts with a continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colm_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def format_prompt(instruction: str) -> str:
    """Return the text of the prompt for one instruction; the response follows directly after it."""
    return PROMPT_TEMPLATE.format(instruction=instruction)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """Encode the prompt of one instruction, the same in training and in evaluation.

    Args:
        tokenizer: any Hugging Face tokenizer. Its bos is included once if it adds one by itself; an eos that
            it would add after the prompt is left out.
        instruction: the instruction as written in the data.

    Returns:
        Token ids, `[prompt_length]`.
    """
    return leading_special_ids(tokenizer) + _encode(tokenizer, [format_prompt(instruction)])[0]


def encode_example(
    tokenizer: PreTrainedTokenizerBase, instruction: str, output: str, max_length: int
) -> tuple[list[int], int]:
    """Encode one example: prompt, response and eos, truncated on the right.

    Args:
        tokenizer: any Hugging Face tokenizer with an eos token.
        instruction: the instruction.
        output: the response.
        max_length: maximum tokens to keep, at least 1.

    Returns:
        `(input_ids, prompt_length)`: token ids, at most `max_length`, and how many of them belong to the prompt; an
        example whose prompt fills `max_length` has no response left (`prompt_length == len(input_ids)`).

    Raises:
        ConfigError: if `max_length` is below 1 or the tokenizer has no eos token.
    """
    return encode_examples(tokenizer, [instruction], [output], max_length)[0]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], outputs: Sequence[str], max_length: int
) -> list[tuple[list[int], int]]:
    """Encode many examples; the same as `encode_example` of each, but encoded in parallel by fast tokenizers.

    Prompt and response are tokenised separately, so that the prompt has the ids that evaluation gives it. Text that
    looks like a special token ("</s>") is encoded as text.

    Args:
        tokenizer: any Hugging Face tokenizer with an eos token.
        instructions: the instructions, `[n]`.
        outputs: the responses, `[n]`.
        max_length: maximum tokens to keep of each, at least 1.

    Returns:
        `(input_ids, prompt_length)` of each, `[n]`.

    Raises:
        ConfigError: if `max_length` is below 1 or the tokenizer has no eos token.
    """
    check_encoding(tokenizer, max_length)
    whole = encode_completions(tokenizer, list(map(format_prompt, instructions)), outputs)
    return [(ids[:max_length], min(prompt_length, len(ids), max_length)) for ids, prompt_length in whole]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Encode prompts with their responses and eos, each part alone, without a maximum length.

    Args:
        tokenizer: any Hugging Face tokenizer with an eos token.
        prompts: whole prompts as text, `[n]`.
        responses: texts that follow them, `[n]`.

    Returns:
        `(input_ids, prompt_length)` of each, `[n]`.
    """
    leading = leading_special_ids(tokenizer)
    eos_id: int = tokenizer.eos_token_id
    encoded = zip(_encode(tokenizer, list(prompts)), _encode(tokenizer, list(responses)), strict=True)
    return [([*leading, *prompt, *response, eos_id], len(leading) + len(prompt)) for prompt, response in encoded]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts with eos behind each and with the special tokens that the tokenizer puts in front, `[n]`."""
    leading = leading_special_ids(tokenizer)
    return [[*leading, *ids, tokenizer.eos_token_id] for ids in _encode(tokenizer, list(texts))]


def check_encoding(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a ConfigError if no example can be encoded with this tokenizer and maximum length."""
    if max_length < 1:
        raise ConfigError(f"max_length = {max_length}: must be at least 1. The recipes use 512.")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos token, which ends every response. Set tokenizer.eos_token.")


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text by itself: `[bos]` or nothing.

    Determined by a trial, as tokenizers differ in what they add and in what they report about it.

    Raises:
        ConfigError: if the tokenizer changes a text's tokens when it adds special ones.
    """
    probe = "a"
    with_special = list(tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"])
    plain = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    raise ConfigError(
        f"the tokenizer encodes {probe!r} as {with_special} with and {plain} without special tokens: which of them "
        "come first is ambiguous. Use a tokenizer that adds special tokens around the text only."
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode each text alone, without special tokens; the list is encoded in parallel by fast tokenizers."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts longer than the model's maximum: they are truncated above
    )
    return list(encoded["input_ids"])


@dataclass(frozen=True)
class Continuation:
    """A prompt with one candidate behind it, as tokens.

    Attributes:
        ids: token ids of both, at least two.
        start: where the candidate's tokens begin; at least 1.
    """

    ids: tuple[int, ...]
    start: int


def encode_text(tokenizer: Any, text: str, leading: Sequence[int] | None = None) -> list[int]:
    """Encode a text, with the special tokens that the tokenizer puts in front, as `encode_prompt` does.

    Args:
        tokenizer: any Hugging Face tokenizer.
        text: the text; what looks like a special token is encoded as text.
        leading: `leading_special_ids` of the tokenizer, if known.
    """
    front = leading_special_ids(tokenizer) if leading is None else leading
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [*front, *ids]


def encode_pair(
    tokenizer: Any, prompt: str, candidate: str, leading: Sequence[int] | None = None, positions: int | None = None
) -> Continuation:
    """Encode one prompt and candidate; see `encode_pairs`."""
    return encode_pairs(tokenizer, [(prompt, candidate)], leading, positions)[0]


def encode_pairs(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    leading: Sequence[int] | None = None,
    positions: int | None = None,
) -> list[Continuation]:
    """Encode prompts with candidates, each pair together; a candidate's tokens are those beyond the prompt's number.

    So a candidate's first token is the one that the model was trained on, with its leading space; as in lm-eval.
    Fast tokenizers encode in parallel.

    Args:
        tokenizer: any Hugging Face tokenizer.
        pairs: prompts, ending without a space, and candidates, beginning with one where words are separated by it.
        leading: `leading_special_ids` of the tokenizer, if they are known.
        positions: maximum length; longer sequences are cut on the left, but keep a token of the prompt.
    """
    front = list(leading_special_ids(tokenizer) if leading is None else leading)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))  # candidates share them
    sizes = dict(zip(prompts, map(len, _encode(tokenizer, prompts)), strict=True))
    wholes = _encode(tokenizer, [prompt + candidate for prompt, candidate in pairs])
    continuations = []
    for (prompt, _), whole in zip(pairs, wholes, strict=True):
        ids = [*front, *whole]
        start = max(1, min(len(front) + sizes[prompt], len(ids) - 1))  # a token to score, and one to predict it from
        cut = 0 if positions is None else min(max(0, len(ids) - 1 - positions), start - 1)
        continuations.append(Continuation(tuple(ids[cut:]), start - cut))
    return continuations
