"""The two factors of the last V projection's exact gradient, from one backward pass through the tail only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.probe.architecture import Architecture
from colm_ds.probe.tail import TailInput, tail_losses


def gradient_factors(architecture: Architecture, tail: TailInput) -> tuple[Tensor, Tensor]:
    """delta and x of every token: the gradient of L_i is the sum over its tokens of delta_t x_t^T.

    Runs the last layer and the head forward and backward once; no other layer is differentiated and no parameter
    receives a gradient.

    Args:
        architecture: the model's parts.
        tail: what enters the last layer.

    Returns:
        delta `[batch, length, out]`, the gradient of the example's own loss at the projection's output, zero at
        padding; x `[batch, length, in]`, the projection's input. Both in the model's compute dtype, but delta of an
        fp16 model in float32.
    """
    target = architecture.target
    seen: list[tuple[Tensor, Tensor]] = []

    def cut(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output[..., target.start : target.stop].detach().requires_grad_(True)
        seen.append((inputs[0].detach(), leaf))
        if leaf.shape[-1] == output.shape[-1]:
            return leaf
        before, after = output[..., : target.start].detach(), output[..., target.stop :].detach()
        return torch.cat([before, leaf, after], dim=-1)

    handle = target.module.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            losses = tail_losses(architecture, tail)
            inputs, leaf = seen[0]
            # In fp16 the gradient of a mean over many tokens underflows; that of their sum does not.
            summed = torch.float16 in (tail.hidden.dtype, leaf.dtype)
            loss = (losses * tail.batch.counts if summed else losses).sum()
        (delta,) = torch.autograd.grad(loss, leaf)
        if summed:
            delta = delta.float() / tail.batch.counts.clamp_min(1.0)[:, None, None]
    finally:
        handle.remove()
    return delta, inputs
