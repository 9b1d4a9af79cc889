"""Compute the cross-entropy at labelled positions only, with at most one chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 23
"""Logits of one chunk (32 MB in float32)."""


def chunk_size(width: int) -> int:
    """Return the rows of one chunk of logits of a width."""
    return max(1, _CHUNK_LOGITS // width)


def token_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary_size: int, smoothing: float = 0.0
) -> Tensor:
    """Compute the cross-entropy of every position in nats, float32 `[n]`.

    With more than one chunk under autograd each chunk's logits are recomputed in the backward pass.

    Args:
        head: maps `[n, hidden]` to logits `[n, vocabulary]`.
        hidden: `[n, hidden]`, after the final norm.
        targets: int64 `[n]`.
        vocabulary_size: width of the logits.
        smoothing: share of every target that is spread evenly over the vocabulary.
    """

    def chunk_loss(part: Tensor, target: Tensor) -> Tensor:
        logits = head(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    size = chunk_size(vocabulary_size)
    if len(targets) <= size:
        return chunk_loss(hidden, targets)
    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(chunk_loss, part, target, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else chunk_loss(part, target)
        for part, target in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([part for part in parts if part is not None])


def in_chunks(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary_size: int
) -> Tensor:
    """Apply a function that computes logits to one chunk of positions at a time, without gradients.

    Args:
        function: maps `[n, hidden]` and targets `[n]` to one number for each row, `[n]`.
        hidden: `[n, hidden]`.
        targets: int64 `[n]`.
        vocabulary_size: width of the logits in between.
    """
    size = chunk_size(vocabulary_size)
    with torch.no_grad():
        return torch.cat(
            [function(part, target) for part, target in zip(hidden.split(size), targets.split(size), strict=True)]
        )


def sums_by_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum the values of every row, `[num_rows]`."""
    return torch.zeros(num_rows, dtype=values.dtype, device=values.device).index_add(0, rows, values)
