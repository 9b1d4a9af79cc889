"""Skip and count steps whose gradient is not finite, and end a run if they persist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from colm_ds.errors import DivergenceError


def guard_plain_optimizer(engine: Any) -> None:
    """Give stage 0 in float32 what DeepSpeed has elsewhere: the gradient's norm, and no step if it is not finite.

    There DeepSpeed calls the optimizer directly. Here its `step` first computes the norm and clips; if the norm is not
    finite, the step is skipped and `overflow` set, which DeepSpeed respects (its learning-rate schedule waits too).

    Args:
        engine: the DeepSpeed engine; unchanged if its optimizer is one of DeepSpeed's wrappers.
    """
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return
    optimizer = engine.optimizer
    plain_step = optimizer.step
    limit = float(engine.gradient_clipping() or math.inf)

    def step(*args: Any, **kwargs: Any) -> Any:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, limit)) if trained else 0.0
        optimizer._global_grad_norm = norm
        optimizer.overflow = not math.isfinite(norm)
        return None if optimizer.overflow else plain_step(*args, **kwargs)

    optimizer.step = step
    engine.clip_fp32_gradients = lambda: None  # done above


class SkippedSteps:
    """Counts of steps that were skipped because their gradient was not finite.

    Attributes:
        total: skipped since the start.
        in_a_row: consecutive ones up to the last step.
    """

    def __init__(self, limit: int) -> None:
        """Start at zero.

        Args:
            limit: maximum in a row, at which `check` raises; 0: no limit.
        """
        self._limit = limit
        self.total = 0
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Return both counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int] | tuple[int, int]) -> None:
        """Restore both counts.

        Args:
            state: from `state_dict`, or the pair that version 0.1.0 kept.
        """
        if isinstance(state, Mapping):
            self.total, self.in_a_row = state["total"], state["in_a_row"]
        else:
            self.total, self.in_a_row = state

    def note(self, skipped: bool) -> None:
        """Count one step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def check_any_applied(self, step: int) -> None:
        """Raise if no step up to this one changed anything.

        Raises:
            DivergenceError: if all were skipped.
        """
        if 0 < step <= self.total:
            raise DivergenceError(
                f"step {step}: the gradient was not finite in any of the {step} steps, so nothing was trained. "
                "Lower the learning rate, and look at the weights and the examples named in the metrics."
            )

    def check(self, step: int) -> None:
        """Raise if the last steps were all skipped.

        Raises:
            DivergenceError: if there were `limit` in a row.
        """
        if self._limit and self.in_a_row >= self._limit:
            raise DivergenceError(
                f"step {step}: the gradient was not finite in {self.in_a_row} steps in a row; they changed nothing. "
                "Lower the learning rate, look at the examples named in the metrics, or raise colm.max_skipped_steps."
            )
