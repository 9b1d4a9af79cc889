"""Model backend used by evaluation: generation, candidate scoring, per-text loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from colm_ds.batching.collate import length_sorted_batches
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.data.prompt import encode_pair, encode_text, leading_special_ids
from colm_ds.errors import ConfigError
from colm_ds.evaluation.generate import Generation, end_of_sequence_ids, greedy, most_positions
from colm_ds.evaluation.likelihood import Likelihood, score_candidates
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.types import Example


class Backend(Protocol):
    """Interface of a model backend; results come batch by batch, each with its index in the request.

    Attributes:
        name: recorded with the answers; an evaluation is not resumed with another backend.
        tokenizer: the model's tokenizer.
    """

    name: str
    tokenizer: Any

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str], turn_end: int | None = None
    ) -> Iterator[list[tuple[int, Generation]]]:
        """Yield greedy continuations of texts.

        Args:
            prompts: texts to continue.
            max_new_tokens: maximum tokens of a continuation.
            stop_strings: strings that end one.
            turn_end: given for prompts that a chat template wrote, whose special tokens are tokens and which have all
                of them: id of the token that ends an answer, besides the model's own.
        """
        ...

    def score(self, questions: Sequence[tuple[str, Sequence[str]]]) -> Iterator[list[tuple[int, list[Likelihood]]]]:
        """Yield log-probabilities of the candidates of (prompt, candidates); candidates include their leading space."""
        ...

    def text_losses(self, texts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, float]]]:
        """Yield the summed loss in nats of each text's token ids, of all tokens but the first."""
        ...


class TransformersBackend:
    """A Hugging Face model on this process's device.

    Args:
        model: a causal LM, bare or in a `PeftModel`; put into eval mode.
        tokenizer: the model's tokenizer.
        device: device of the model.
        max_tokens: maximum padded tokens of a batch, generated ones included; the lever on memory.
        max_examples: maximum sequences of a batch.
        share_prompt: compute the tokens that a question's candidates share once, through the key-value cache.
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        device: torch.device,
        *,
        max_tokens: int = 16384,
        max_examples: int = 64,
        share_prompt: bool = True,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.share_prompt = share_prompt and _keeps_cache(model)
        self._device = device
        self._budget = {"max_tokens": max_tokens, "max_examples": max_examples}
        self._leading = leading_special_ids(tokenizer)
        self._positions = most_positions(model)
        self._eos_ids = end_of_sequence_ids(model, tokenizer)

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str], turn_end: int | None = None
    ) -> Iterator[list[tuple[int, Generation]]]:
        """See `Backend.generate`. Prompts too long for the model's positions are cut on the left.

        Raises:
            ConfigError: if the model has no positions left for prompts.
        """
        if self._positions is not None and max_new_tokens >= self._positions:
            raise ConfigError(
                f"--max-new-tokens {max_new_tokens}: the model has {self._positions} positions for prompt and answer. "
                f"Choose at most {self._positions // 2}."
            )
        room = None if self._positions is None else self._positions - max_new_tokens
        if turn_end is None:
            encoded = [encode_text(self.tokenizer, prompt, self._leading) for prompt in prompts]
        else:
            encoded = [
                self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts
            ]
        fitted = [ids if room is None else ids[-room:] for ids in encoded]
        for group in length_sorted_batches([len(ids) + max_new_tokens for ids in fitted], **self._budget):
            answers = greedy(
                self.model,
                self.tokenizer,
                [fitted[place] for place in group],
                max_new_tokens=max_new_tokens,
                stop_strings=stop_strings,
                device=self._device,
                eos_ids=self._eos_ids if turn_end is None else self._eos_ids | {turn_end},
            )
            yield [
                (place, replace(answer, prompt_truncated=len(fitted[place]) < len(encoded[place])))
                for place, answer in zip(group, answers, strict=True)
            ]

    def score(self, questions: Sequence[tuple[str, Sequence[str]]]) -> Iterator[list[tuple[int, list[Likelihood]]]]:
        """See `Backend.score`.

        Raises:
            ConfigError: if a log-probability is not a number.
        """
        encoded = [
            [encode_pair(self.tokenizer, prompt, text, self._leading, self._positions) for text in candidates]
            for prompt, candidates in questions
        ]
        sizes = [len(candidates) * max(len(candidate.ids) for candidate in candidates) for candidates in encoded]
        for group in length_sorted_batches(sizes, **self._budget):
            batch = [encoded[place] for place in group]
            scores = score_candidates(self.model, batch, device=self._device, share_prompt=self.share_prompt)
            _check_numbers([score.log_probability for of_question in scores for score in of_question])
            yield list(zip(group, scores, strict=True))

    def text_losses(self, texts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, float]]]:
        """See `Backend.text_losses`.

        Raises:
            ConfigError: if a text is longer than the model's positions, or a loss is not a number.
        """
        longest = max(map(len, texts), default=0)
        if self._positions is not None and longest > self._positions:
            raise ConfigError(f"--chunk-tokens {longest}: the model has {self._positions} positions. Choose fewer.")
        head = find_loss_head(self.model)
        for group in length_sorted_batches([len(ids) for ids in texts], **self._budget):
            batch = make_micro_batch([_example(texts[place]) for place in group]).to(self._device)
            with torch.no_grad():
                losses = example_loss_sums(self.model, head, batch)
            _check_numbers(losses.tolist())
            yield list(zip(group, losses.tolist(), strict=True))


def _check_numbers(values: Sequence[float]) -> None:
    """Raise where the model gave no number: an accuracy of such scores would be one of chance."""
    if any(map(math.isnan, values)):
        raise ConfigError("the model's logits are not finite. Try --dtype float32, or check its weights.")


def _example(ids: Sequence[int]) -> Example:
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    return Example(tokens, tokens, 0, 0)


def _keeps_cache(model: Any) -> bool:
    """Return whether rows of the model's cache can be selected and repeated: not for models with a recurrent state."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return not getattr(base, "_is_stateful", False)
