"""Lets PyTorch's out-of-memory error know which micro-batch it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def of_micro_batch(shape: Sequence[int]) -> Iterator[None]:
    """Let an `OutOfMemoryError` that leaves the block know its micro-batch, `[examples, tokens]`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not hasattr(error, "micro_batch"):
            error.micro_batch = tuple(shape)  # type: ignore[attr-defined]
        raise
