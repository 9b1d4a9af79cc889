"""Greedy generation with a key-value cache; a sequence that has stopped leaves the batch at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from colm_ds.errors import ConfigError
from colm_ds.models.architecture import unwrap

TAIL_TOKENS = 8
"""Tokens decoded beyond those that can hold a stop string: the first ones of a piece may decode differently."""

Reason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """A model's continuation of one prompt.

    Attributes:
        text: its text without special tokens, cut before the first stop string.
        reason: why it ended: an end-of-sequence token, a stop string or the maximum number of tokens.
        num_tokens: tokens generated, including the last one.
        prompt_truncated: whether the prompt was cut on the left to fit the model.
    """

    text: str
    reason: Reason
    num_tokens: int
    prompt_truncated: bool = False


class StopStrings:
    """Find stop strings in decoded tokens.

    Args:
        tokenizer: decodes token ids.
        strings: strings that end a generation; may be empty.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = [string for string in strings if string]
        # A token holds at least one byte, so this many last tokens contain every stop string that ends in them.
        self._tail = max((len(string.encode()) for string in self._strings), default=0) + TAIL_TOKENS

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def first(self, text: str) -> int | None:
        """Return the index at which the first stop string begins, or None."""
        return min((place for place in map(text.find, self._strings) if place >= 0), default=None)

    def reached(self, ids: Sequence[int]) -> bool:
        """Return whether the last token completed a stop string."""
        if not self._strings or self.first(self.decode(ids[-self._tail :])) is None:
            return False
        return self.first(self.decode(ids)) is not None

    def cut(self, ids: Sequence[int]) -> str:
        """Return the text before the first stop string."""
        text = self.decode(ids)
        return text[: self.first(text)]


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    device: torch.device,
    eos_ids: frozenset[int],
) -> list[Generation]:
    """Continue every prompt of one batch with its most probable tokens.

    The prompts are padded on the left. After each token the sequences that ended leave the batch and the cache, so
    later steps cost only the sequences that still run.

    Args:
        model: a Hugging Face causal LM in eval mode, bare or in a `PeftModel`.
        tokenizer: the model's tokenizer, for decoding.
        prompts: token ids of each, at least one.
        max_new_tokens: maximum tokens of a continuation.
        stop_strings: strings that end a continuation once complete.
        device: device of the model.
        eos_ids: tokens that end a continuation.

    Returns:
        One continuation for every prompt, in order.

    Raises:
        ConfigError: if the model's logits are not finite, or it keeps no key-value cache.
    """
    stop = StopStrings(tokenizer, stop_strings)
    produced: list[list[int]] = [[] for _ in prompts]
    reasons: list[Reason] = ["length"] * len(prompts)
    running = list(range(len(prompts)))
    ids, mask = left_padded(prompts, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    name = cache_argument(model)
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            cache = output.past_key_values
            best, chosen = output.logits[:, -1].max(-1)
            if not bool(torch.isfinite(best).all()):
                raise ConfigError("the model's logits are not finite. Try --dtype float32, or check its weights.")
            keep = []
            for row, (sequence, token) in enumerate(zip(running, chosen.tolist(), strict=True)):
                produced[sequence].append(token)
                if token in eos_ids:
                    reasons[sequence] = "eos"
                elif stop.reached(produced[sequence]):
                    reasons[sequence] = "stop"
                else:
                    keep.append(row)
            if not keep:
                break
            if len(keep) < len(running):
                rows = torch.tensor(keep, device=device)
                chosen, mask, positions = chosen[rows], mask[rows], positions[rows]
                select_rows(cache, rows)
                running = [running[row] for row in keep]
            ids = chosen[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return [Generation(stop.cut(tokens), reason, len(tokens)) for tokens, reason in zip(produced, reasons, strict=True)]


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of prompts of different lengths, padded on the left.

    Args:
        prompts: token ids of each, `[n]`.
        device: device of the tensors.

    Returns:
        int64 `[n, width]` each; the mask is 0 at the padding, whose token id is 0.
    """
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def cache_argument(model: Any) -> str:
    """Return the name of the argument by which a model takes its key-value cache, which transformers renamed."""
    forward = getattr(unwrap(model), "forward", model)
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep or repeat rows of a key-value cache, in place.

    Args:
        cache: the model's `past_key_values`.
        rows: int64 `[n]`.

    Raises:
        ConfigError: if the model has no such cache.
    """
    if cache is None or not hasattr(cache, "batch_select_indices"):
        raise ConfigError(
            "the model keeps no key-value cache that rows can be taken from, so it cannot generate here. Serve its "
            "folder with vLLM and score it with lm-eval."
        )
    cache.batch_select_indices(rows)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's and those of the model's generation configuration."""
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)):
        values = value if isinstance(value, (list, tuple)) else [value]
        ids.update(int(token) for token in values if token is not None)
    return frozenset(ids)


def most_positions(model: Any) -> int | None:
    """Return the maximum number of tokens of a model, or None if its configuration does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
