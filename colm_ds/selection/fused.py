"""Sums of Adam-normalised rank-one gradients without the [n, w] matrix: one kernel from torch.compile, on GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

COORDINATES = 1 << 22
"""Coordinates of one call, which holds a few vectors of this length."""


def can_fuse(device: torch.device) -> bool:
    """Return whether the kernel can be compiled for a device: a GPU with Triton installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def normalised_sum(coefficients: Tensor, direction: Tensor, m: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    """Sum over i of u_ij for g_ij = c_i z_j, written so that a compiler can fuse it; float64 `[w]`.

    Args:
        coefficients: c, float32 `[n]`.
        direction: z, float32 `[w]`.
        m: first moment, float32 `[w]`.
        v: second moment, float32 `[w]`.
        factors: of g and m in mhat, of g^2 and v in vhat, and eps, float32 `[5]` (see `history.moment_factors`). A
            tensor, as numbers would be compiled in and recompiled in every step.
    """
    gradient = coefficients[:, None] * direction[None, :]
    root = (gradient * gradient * factors[2] + (v * factors[3])[None, :]).sqrt() + factors[4]
    return ((gradient * factors[0] + (m * factors[1])[None, :]) / root).to(torch.float64).sum(dim=0)


@lru_cache(maxsize=1)
def compiled_sum() -> Callable[..., Tensor]:
    """Return `normalised_sum` as one kernel, compiled at its first call for varying sizes."""
    return torch.compile(normalised_sum, dynamic=True)
