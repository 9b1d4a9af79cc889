"""Backends that know what to say, and a tiny model with its tokenizer, for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from colm_ds.data.generated.mixture import generate_records, train_tokenizer
from colm_ds.evaluation.backend import TransformersBackend
from colm_ds.evaluation.generate import Generation
from colm_ds.evaluation.likelihood import Likelihood
from tests.tiny_models import tiny_model

VOCABULARY_SIZE = 512
CPU = torch.device("cpu")


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer of 512 tokens, without bos."""
    from transformers import AutoTokenizer

    train_tokenizer(generate_records(0, 0.05)[0], folder)
    return AutoTokenizer.from_pretrained(folder)


def make_model(family: str = "llama", **config: Any) -> Any:
    """A tiny model with room for a prompt of 1,000 tokens."""
    sizes = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 1}
    return tiny_model(family, **{**sizes, **config})


def make_backend(tokenizer: Any, family: str = "llama", **budget: Any) -> TransformersBackend:
    """A tiny model behind the interface."""
    return TransformersBackend(make_model(family), tokenizer, CPU, **budget)


class StubBackend:
    """Answers from a function of the prompt.

    Args:
        write: what it continues a prompt with.
        choose: place of the candidate that it finds the most probable.
        tokenizer: for texts.
        batch_size: prompts continued at a time.
    """

    name = "stub"

    def __init__(
        self,
        write: Callable[[str], str] = lambda prompt: "",
        choose: Callable[[str, Sequence[str]], int] = lambda prompt, candidates: 0,
        tokenizer: Any = None,
        batch_size: int = 7,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[str] = []
        self._batch_size = batch_size
        self._write = write
        self._choose = choose

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str], turn_end: int | None = None
    ) -> Iterator[list[tuple[int, Generation]]]:
        """See `Backend.generate`; stop strings cut as they do there."""
        for start in range(0, len(prompts), self._batch_size):
            batch = []
            for place in range(start, min(start + self._batch_size, len(prompts))):
                self.prompts.append(prompts[place])
                text = self._write(prompts[place])
                cut = min([text.find(string) for string in stop_strings if string in text], default=len(text))
                reason = "stop" if cut < len(text) else "eos"
                batch.append((place, Generation(text[:cut], reason, len(text))))  # type: ignore[arg-type]
            yield batch

    def score(self, questions: Sequence[tuple[str, Sequence[str]]]) -> Iterator[list[tuple[int, list[Likelihood]]]]:
        """See `Backend.score`: the candidate that is chosen has mean -1, the others -2; longer ones have lower sums."""
        for place, (prompt, candidates) in enumerate(questions):
            self.prompts.append(prompt)
            chosen = self._choose(prompt, candidates)
            scores = []
            for number, candidate in enumerate(candidates):
                mean = -1.0 if number == chosen else -2.0
                scores.append(Likelihood(mean * len(candidate), len(candidate)))
            yield [(place, scores)]

    def text_losses(self, texts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, float]]]:
        """See `Backend.text_losses`: one nat for each predicted token."""
        yield [(place, float(len(ids) - 1)) for place, ids in enumerate(texts)]
