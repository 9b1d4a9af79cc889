"""Report where a device's memory ran out in a step, and what helps there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import DeviceMemoryError
from colm_ds.memory.recorder import MemoryRecorder
from colm_ds.types import LargeBatch

_PROBING = (
    "What helps: a smaller colm.probe.max_tokens (8192 on a GPU by default) cuts the probe's micro-batches; "
    "colm.replay offload or off keeps its hidden states in host memory or nowhere."
)
_TRAINING = (
    "What helps: a smaller train_micro_batch_size_per_gpu or colm.micro_batch_tokens cuts the micro-batches; "
    "activation checkpointing keeps only what enters each layer."
)
_STEPPING = (
    "What helps: ZeRO stage 2 or 3 splits the optimizer's states over the ranks; offload_optimizer keeps them in host "
    "memory."
)

ADVICE = {
    **dict.fromkeys(("probe", "exchange", "select"), _PROBING),
    **dict.fromkeys(("train", "forward", "backward"), _TRAINING),
    **dict.fromkeys(("step", "save"), _STEPPING),
}
"""Advice for each phase, whatever the model; `colm-ds plan RECIPE` gives numbers."""


def memory_error(
    error: torch.OutOfMemoryError, batch: LargeBatch, memory: MemoryRecorder, rank: int
) -> DeviceMemoryError:
    """Return the error to show to the user.

    Args:
        error: PyTorch's error.
        batch: the step's large batch.
        memory: recorder of the step.
        rank: this rank.
    """
    snapshot = memory.write_snapshot("out_of_memory")
    phase = memory.meter.failed_in or "between phases"
    first = str(error).strip().split("\n")[0].partition(". GPU")[0]
    return DeviceMemoryError(
        phase,
        getattr(error, "micro_batch", None),
        step=batch.step,
        rank=rank,
        reason=first or type(error).__name__,
        advice=[ADVICE.get(phase, _TRAINING)],
        snapshot=None if snapshot is None else str(snapshot),
        large_batch=batch,
    )


@contextmanager
def of_micro_batch(batch: MicroBatch) -> Iterator[None]:
    """Attach a description of the micro-batch to an `OutOfMemoryError` that leaves the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not hasattr(error, "micro_batch"):
            rows, length = batch.input_ids.shape
            of_candidates = "" if batch.groups is None else f" in {rows} rows"
            error.micro_batch = f"{len(batch.counts)} examples{of_candidates} x {length} tokens"  # type: ignore[attr-defined]
        raise
