"""Random classification examples, and their loss written plainly: every candidate alone, without sharing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from colm_ds.data.choice_dataset import ChoiceDataset
from colm_ds.randomness import private_generator
from colm_ds.types import Example
from tests.tiny_models import VOCABULARY_SIZE

KINDS = ((1, 1, 1), (1, 2), (3, 1, 2), (2, 2), (1, 1))
"""Tokens of the candidates; those of one token share the pass through the prompt."""


def random_choices(count: int, seed: int = 0, *, kinds: tuple[tuple[int, ...], ...] = KINDS) -> ChoiceDataset:
    """Questions with two or three candidates of several tokens; some candidates begin as others do."""
    generator = private_generator(seed, "choices")

    def draw(size: int) -> list[int]:
        return torch.randint(3, VOCABULARY_SIZE, (size,), generator=generator).tolist()

    tokens: list[int] = []
    lengths, starts, counts, golds = [], [], [], []
    for number in range(count):
        prompt, sizes = draw(4 + int(torch.randint(0, 20, (), generator=generator))), kinds[number % len(kinds)]
        stem = draw(max(sizes))
        for place, size in enumerate(sizes):
            candidate = [*stem[: size - 1], 3 + (stem[-1] + 7 * place) % (VOCABULARY_SIZE - 3)]
            tokens += [*prompt, *candidate]
            lengths.append(len(prompt) + size)
            starts.append(len(prompt))
        counts.append(len(sizes))
        golds.append(int(torch.randint(0, len(sizes), (), generator=generator)))
    columns = [np.array(column, dtype=np.int32) for column in (tokens, lengths, starts, counts, golds)]
    return ChoiceDataset(*columns, num_dropped={})


def plain_scores(model: Any, example: Example) -> Tensor:
    """Mean log-probability of every candidate's tokens, `[c]`, each from a forward of its own."""
    assert example.candidates is not None
    scores = []
    for ids, labels in zip(
        example.input_ids.split(list(example.candidates.lengths)),
        example.labels.split(list(example.candidates.lengths)),
        strict=True,
    ):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        wanted = labels[1:] != -100
        scores.append(-F.cross_entropy(logits[wanted], labels[1:][wanted]))
    return torch.stack(scores)


def plain_choice_loss(model: Any, example: Example) -> Tensor:
    """Cross-entropy over the candidates of one example."""
    assert example.candidates is not None
    return -plain_scores(model, example).log_softmax(0)[example.candidates.gold]
