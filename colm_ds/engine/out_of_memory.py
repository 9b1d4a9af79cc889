"""Lets PyTorch's out-of-memory error know which micro-batch it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from colm_ds.batching.micro_batch import MicroBatch


@contextmanager
def of_micro_batch(batch: MicroBatch) -> Iterator[None]:
    """Let an `OutOfMemoryError` that leaves the block know its micro-batch, in words."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not hasattr(error, "micro_batch"):
            rows, length = batch.input_ids.shape
            of_candidates = "" if batch.groups is None else f" in {rows} rows"
            error.micro_batch = f"{len(batch.counts)} examples{of_candidates} x {length} tokens"  # type: ignore[attr-defined]
        raise
