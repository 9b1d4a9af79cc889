"""Betas and eps with which gradients are compared: those of an Adam-like optimizer, or Adam's defaults."""

from __future__ import annotations

from typing import Any

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's defaults."""


def adam_constants(optimizer: Any) -> tuple[tuple[float, float], float, str | None]:
    """Return beta1, beta2 and eps of an optimizer, and its name if these are Adam's defaults for want of its own.

    An optimizer is taken for an Adam if its groups have two betas and one eps above 0. Lion has betas and no eps (or
    0), Adafactor two eps, SGD neither.

    Args:
        optimizer: a torch optimizer, or a wrapper of one that has its `param_groups`.
    """
    while hasattr(inner := getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = inner
    group: dict[str, Any] = next(iter(getattr(optimizer, "param_groups", [])), {})
    betas, eps = group.get("betas"), group.get("eps")
    if isinstance(betas, (tuple, list)) and len(betas) == 2 and isinstance(eps, (int, float)) and eps > 0:
        return (float(betas[0]), float(betas[1])), float(eps), None
    return BETAS, EPS, type(optimizer).__name__
