"""Hooks on modules under DoRA, which runs its own adapter on the identity to compute the norm of the adapted weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

OutputHook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


@contextmanager
def hooked(module: nn.Module, hook: OutputHook, norm: Any = None) -> Iterator[None]:
    """Call a forward hook of a module in the block, but not for the norm of DoRA, which training holds constant.

    Args:
        module: the module.
        hook: as `register_forward_hook` takes it.
        norm: PEFT's `DoraLinearLayer` that the module belongs to, or None.
    """
    inside: list[bool] = []

    def of_tokens(called: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if inside else hook(called, inputs, output)

    def marked(*args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        try:
            return own(*args, **kwargs)
        finally:
            inside.pop()

    handle = module.register_forward_hook(of_tokens)
    before = None if norm is None else norm.__dict__.get("get_lora_weight")
    if norm is not None:
        own = norm.get_lora_weight
        norm.__dict__["get_lora_weight"] = marked
    try:
        yield
    finally:
        handle.remove()
        if norm is not None:
            norm.__dict__.pop("get_lora_weight")
            if before is not None:
                norm.__dict__["get_lora_weight"] = before


def norms_by_adapter(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return what computes DoRA's norm by the `lora_A` and `lora_B` that it runs; empty without DoRA."""
    norms: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        held: Any = getattr(layer, "lora_magnitude_vector", None)
        for adapter, norm in (held or {}).items():
            for part in ("lora_A", "lora_B"):
                factors: Any = getattr(layer, part)
                if adapter in factors:
                    norms[factors[adapter]] = norm
    return norms
