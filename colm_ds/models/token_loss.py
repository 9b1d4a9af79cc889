"""Compute the cross-entropy at labelled positions only, with at most one chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocabulary_size: int,
    smoothing: float = 0.0,
    *,
    frozen: bool = False,
) -> Tensor:
    """Compute the cross-entropy of every position in nats, float32 `[n]`.

    Under autograd a frozen head's chunks are differentiated at once, as the gradient with respect to a position's
    hidden state is that of its own loss times a number; else, with more than one chunk, each one's logits are
    recomputed in the backward pass.

    Args:
        head: maps `[n, hidden]` to logits `[n, vocabulary]`, every position by itself.
        hidden: `[n, hidden]`, after the final norm.
        targets: int64 `[n]`.
        vocabulary_size: width of the logits.
        smoothing: share of every target that is spread evenly over the vocabulary.
        frozen: whether nothing in `head` is trained.
    """

    def chunk_loss(part: Tensor, target: Tensor) -> Tensor:
        logits = head(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    size = chunk_size(vocabulary_size)
    recompute = torch.is_grad_enabled()
    if frozen and recompute and hidden.requires_grad and hidden.dtype != torch.float16:  # whose gradients are scaled
        losses: Tensor = _FrozenHeadLosses.apply(hidden, targets, head, size, smoothing)
        return losses
    if len(targets) <= size:
        return chunk_loss(hidden, targets)
    parts = [
        checkpoint(chunk_loss, part, target, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else chunk_loss(part, target)
        for part, target in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([part for part in parts if part is not None])


class _FrozenHeadLosses(torch.autograd.Function):
    """Forward: losses, and their gradients with respect to the hidden states. Backward: these times a number each."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], size: int, smoothing: float
    ) -> Tensor:
        parts = [
            _losses_and_gradients(part, target, head, smoothing)
            for part, target in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        losses, gradients = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * above[0][:, None]).to(gradients.dtype), None, None, None, None


def _losses_and_gradients(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return a chunk's losses and their gradients with respect to its hidden states, `[n]` and `[n, hidden]`."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = head(leaf)
    logits = output.detach() if output.dtype == torch.float64 else output.detach().float()
    place, largest = targets[:, None], logits.amax(dim=1)
    aims = (1.0 - smoothing) * logits.gather(1, place)[:, 0]
    if smoothing:
        aims += smoothing * logits.mean(dim=1)
    is_copy = logits.dtype != output.dtype
    slopes = (logits.sub_(largest[:, None]) if is_copy else logits - largest[:, None]).exp_()
    total = slopes.sum(dim=1)
    losses = total.log() + largest - aims
    slopes.div_(total[:, None]).scatter_add_(1, place, torch.full_like(total, smoothing - 1.0)[:, None])
    if smoothing:
        slopes -= smoothing / slopes.shape[1]
    (gradients,) = torch.autograd.grad(output, leaf, slopes.to(output.dtype))
    return losses, gradients


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
