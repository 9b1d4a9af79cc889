"""Grouping examples of similar length into micro-batches, and padding them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from colm_ds.errors import ConfigError, DataError
from colm_ds.types import Example

IGNORE_INDEX = -100


MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_ON_GPU = 128, 2048
"""Cost of one more micro-batch, in padded tokens that take as long: a new one starts where it saves more.

A GPU waits for the processor to launch the kernels of a small one: on an H100 a micro-batch of at most 2,160 tokens of
Phi-2 with LoRA took about 0.5 s, at 2 to 3% of the peak (docs/MACHINES.md).
"""


def tokens_of_micro_batch() -> int:
    """Return the cost of one more micro-batch on this machine, in padded tokens."""
    return MICRO_BATCH_TOKENS_ON_GPU if torch.cuda.is_available() else MICRO_BATCH_TOKENS


def length_sorted_batches(
    lengths: Sequence[int], *, max_examples: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Group examples of similar length so that little is padded.

    The groups are contiguous slices of the length-sorted order (ties by index), the longest first. Of all such groups
    within the budgets these have the least padded tokens plus `tokens_of_micro_batch()` for each group (dynamic
    programming, O(n) steps of at most a group's size). An example longer than `max_tokens` is a separate group.

    Args:
        lengths: tokens of every example, `[n]`.
        max_examples: maximum examples in a group.
        max_tokens: maximum tokens in a group, padding included: examples times the longest.

    Returns:
        Groups of positions in `lengths`; every position is in exactly one.

    Raises:
        ConfigError: if neither budget is given or one is below 1.
    """
    if max_examples is None and max_tokens is None:
        raise ConfigError("length_sorted_batches: no budget. Give max_examples or max_tokens.")
    for name, budget in (("max_examples", max_examples), ("max_tokens", max_tokens)):
        if budget is not None and budget < 1:
            raise ConfigError(f"{name} = {budget}: must be at least 1.")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    count, extra = len(order), tokens_of_micro_batch()
    cost = np.full(count + 1, np.iinfo(np.int64).max)  # of the first k examples
    cost[0] = 0
    start_of = np.zeros(count + 1, dtype=np.int64)  # of the last group of the first k
    for start, index in enumerate(order):
        longest = int(lengths[index])
        most = min(count - start, max_examples or count)
        if max_tokens is not None:
            most = min(most, max(1, max_tokens // max(1, longest)))
        costs = cost[start] + extra + longest * np.arange(1, most + 1)
        stops = slice(start + 1, start + most + 1)
        better = costs < cost[stops]
        cost[stops][better] = costs[better]
        start_of[stops][better] = start
    groups, stop = [], count
    while stop > 0:
        start = int(start_of[stop])
        groups.append(order[start:stop])
        stop = start
    return groups[::-1]


def pad_batch(examples: Sequence[Example], pad_token_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
    """Pad examples on the right to a common length.

    There is no attention mask: with causal attention no token before the padding attends to it.

    Args:
        examples: examples of the micro-batch, `[n]`, at least one.
        pad_token_id: token id to pad `input_ids` with (`labels` are padded with -100).
        multiple_of: round the common length up to a multiple of this (8 or 64 suit GPU kernels).

    Returns:
        `input_ids` and `labels`, int64 `[n, length]`, and `lengths`, int64 `[n]` (tokens before padding).

    Raises:
        DataError: if there are no examples.
        ConfigError: if `multiple_of` is below 1.
    """
    if not examples:
        raise DataError("pad_batch: no examples to pad.")
    if multiple_of < 1:
        raise ConfigError(f"multiple_of = {multiple_of}: must be at least 1.")
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    width = -(-int(lengths.max()) // multiple_of) * multiple_of
    input_ids = torch.full((len(examples), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = example.input_ids
        labels[row, : len(example.labels)] = example.labels
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths}


def padding_fraction(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding among the tokens computed when every group is padded to its longest example.

    Args:
        lengths: tokens of every example, `[n]`.
        batches: groups of positions in `lengths`.

    Returns:
        Between 0 (no padding; also for no groups) and 1.
    """
    real = sum(int(lengths[index]) for batch in batches for index in batch)
    padded = sum(len(batch) * max(int(lengths[index]) for index in batch) for batch in batches if batch)
    return 1.0 - real / padded if padded else 0.0
