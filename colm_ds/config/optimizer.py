"""Check the numbers of an optimizer that torch and DeepSpeed fail on, or train nothing with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from colm_ds.errors import Problems

_BELOW_ONE = "Choose from 0 up to, but not, 1."
_NOT_NEGATIVE = "Write a finite number, 0 or more."


def check_numbers(values: Mapping[str, Any], problems: Problems, prefix: str = "") -> None:
    """Record a learning rate, betas, eps, weight decay, momentum or norm that no optimizer takes; others are passed by.

    Args:
        values: by the names of torch, such as `lr` and `betas`, of DeepSpeed's schedules or of `TrainingArguments`;
            None and "auto" are left out.
        problems: where they are recorded.
        prefix: in front of the names in messages.
    """
    for name, value in values.items():
        if value is None or value == "auto":
            continue
        if name == "betas":
            if not isinstance(value, (list, tuple)) or not all(_is_within(each, 1.0) for each in value):
                problems.add(f"{prefix}{name}", value, "not all from 0 to below 1", _BELOW_ONE)
        elif name in ("adam_beta1", "adam_beta2", "momentum"):
            if not _is_within(value, 1.0):
                problems.add(f"{prefix}{name}", value, "not from 0 to below 1", _BELOW_ONE)
        elif name in _RATES:
            # Adafactor has two eps, a schedule may have a rate for every parameter group
            several = isinstance(value, (list, tuple)) and name.endswith(("eps", "_lr"))
            parts = value if several else [value]
            if not all(each is None or _is_within(each, math.inf) for each in parts):
                problems.add(f"{prefix}{name}", value, "not a finite number of 0 or more", _NOT_NEGATIVE)


_RATES = (
    *("lr", "eps", "weight_decay", "learning_rate", "adam_epsilon", "max_grad_norm"),
    *("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr", "gradient_clipping"),
)


def check_groups(optimizer: Any) -> None:
    """Check the numbers of a torch optimizer's parameter groups; anything without groups passes.

    Raises:
        ConfigError: listing each kind of mistake once, with the first group that has it.
    """
    problems = Problems("optimizer")
    said: set[str] = set()
    for number, group in enumerate(getattr(optimizer, "param_groups", ())):
        own = Problems("")
        check_numbers({key: _plain(value) for key, value in group.items() if key != "params"}, own)
        for message in own.messages:
            if message not in said:
                problems.messages.append(f"param_groups[{number}].{message}")
                said.add(message)
    problems.raise_if_any()


def _is_within(value: Any, end: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < end


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1 else value
