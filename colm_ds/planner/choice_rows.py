"""Model classification examples in a plan: tokens of every task's candidates, and micro-batches of such examples."""

from __future__ import annotations

import torch

from colm_ds.batching.candidates import computed_rows
from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.micro_batch import MicroBatch, make_micro_batch
from colm_ds.types import Candidates, Example

CANDIDATE_TOKENS: dict[str, tuple[int, ...]] = {
    "sst2": (1, 1),
    "cb": (1, 1, 1),
    "multirc": (1, 1),
    "wic": (1, 1),
    "copa": (16, 16),
    "rte": (1, 1),
    "boolq": (1, 1),
}
"""Tokens of each candidate by task: words such as Yes are one, COPA has at most 12 with SmolLM2's tokenizer."""


def num_rows(candidates: tuple[int, ...]) -> int:
    """Return the sequences computed for an example: candidates of one token share the prompt's (`computed_rows`).

    Args:
        candidates: tokens of each; their first tokens differ.
    """
    if not candidates:
        return 1
    return len(computed_rows([[0, *_candidate(place, size)] for place, size in enumerate(candidates)])[0])


def choice_micro_batch(count: int, length: int, candidates: tuple[int, ...]) -> MicroBatch:
    """Make a micro-batch of examples of one length as training would.

    Args:
        count: number of examples.
        length: tokens of the prompt with its longest candidate.
        candidates: tokens of each candidate.
    """
    size = max(candidates)
    ids, labels = [], []
    for place, tokens in enumerate(candidates):
        ids += [0] * max(1, length - size) + _candidate(place, tokens)
        labels += [IGNORE_INDEX] * max(1, length - size) + _candidate(place, tokens)
    lengths = tuple(max(1, length - size) + tokens for tokens in candidates)
    example = Example(torch.tensor(ids), torch.tensor(labels), 0, 0, Candidates(lengths, 0))
    return make_micro_batch([example] * count)


def _candidate(place: int, size: int) -> list[int]:
    return [place + 1] * size
