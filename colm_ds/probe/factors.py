"""Compute the two factors of the probed matrices' exact gradients by one backward pass through the tail only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.models.architecture import Architecture, ProbeTarget
from colm_ds.probe.tail import TailInput, tail_losses


def gradient_factors(architecture: Architecture, tail: TailInput) -> list[tuple[Tensor, Tensor]]:
    """Return delta and x of every token: the gradient of L_i is the sum over its tokens of delta_t x_t^T.

    Runs the last layer and the head forward and backward once; no other layer is differentiated and no parameter
    receives a gradient.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.

    Returns:
        For each target delta `[batch, length, out]`, the gradient of the example's own loss at the projection's output,
        zero at padding; x `[batch, length, in]`, the projection's input; the rows of a classification example are
        concatenated along the length. Both in the model's compute dtype, except delta of an fp16 model, in float32.
    """
    seen: list[tuple[Tensor, Tensor]] = [(tail.hidden, tail.hidden)] * len(architecture.targets)

    def cut(place: int, target: ProbeTarget) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            leaf = target.rows_of(output).detach().requires_grad_(True)
            seen[place] = inputs[0].detach(), leaf
            return target.with_rows(output, leaf)

        return hook

    with ExitStack() as hooks:
        for place, target in enumerate(architecture.targets):
            hooks.enter_context(target.hooking(cut(place, target)))
        with torch.enable_grad():
            losses = tail_losses(architecture, tail)
            leaves = [leaf for _, leaf in seen]
            # In fp16 the gradient of a mean over many tokens underflows; that of their sum does not.
            summed = torch.float16 in (tail.hidden.dtype, leaves[0].dtype)
            loss = (losses * tail.batch.counts if summed else losses).sum()
        deltas = torch.autograd.grad(loss, leaves)
    factors = []
    for delta, (inputs, _) in zip(deltas, seen, strict=True):
        delta, inputs = (tail.batch.by_example(_by_token(part, tail.batch)) for part in (delta, inputs))
        if summed:
            delta = delta.float() / tail.batch.counts.clamp_min(1.0)[:, None, None]
        factors.append((delta, inputs))
    return factors


def example_gradients(factors: list[tuple[Tensor, Tensor]], row: int, length: int) -> Tensor:
    """Return the gradient of one example, all targets concatenated, float32 `[d]`.

    Args:
        factors: from `gradient_factors`.
        row: the example's index in the micro-batch.
        length: its tokens (`MicroBatch.example_lengths`).
    """
    parts = [(delta[row, :length].T.float() @ inputs[row, :length].float()).flatten() for delta, inputs in factors]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _by_token(values: Tensor, batch: MicroBatch) -> Tensor:
    """Expand values of the labelled positions, which alone reach the MLP, to `[batch, length, w]`."""
    if values.dim() == 3:
        return values
    if values.dim() > 3:  # latent attention has a dimension of one head
        return values.reshape(*batch.input_ids.shape, values.shape[-1])
    return values.new_zeros(*batch.input_ids.shape, values.shape[-1]).index_put(batch.places, values)
