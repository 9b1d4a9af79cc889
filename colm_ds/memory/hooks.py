"""Measure memory in any training loop: peaks of forward, backward and step of a torch module or an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.memory.meter import GIB, PeakCounter

OTHER = "other"


class MemoryHooks:
    """Peaks per phase of a module's training, from hooks on the module and its optimizer alone.

    A phase lasts until the next begins: `forward` from the module's forward to its end, `backward` from the first
    gradient of its outputs until the optimizer (or the next forward), `step` within the optimizer; between them is
    `other`, and blocks under `phase(name)` have that name, forward passes without gradients in them included. Hooks
    cost microseconds and do not synchronise a GPU.

    Example:
        >>> with MemoryHooks(model, optimizer) as memory:
        ...     model(inputs).sum().backward()
        ...     optimizer.step()
        >>> memory.peak_gib  # {"other": ..., "forward": ..., "backward": ..., "step": ...}

    Attributes:
        peak_bytes: by phase, the maximum so far; see `PeakCounter.kind` for what is counted.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """Prepare; hooks are active inside the `with` block only.

        Args:
            module: the module that the loop calls, bare or wrapped by DDP, FSDP or DeepSpeed.
            optimizer: a torch optimizer, or one of DeepSpeed's, which has one; without one the backward phase lasts
                until the next forward.
            device: device to measure; default: that of the module's parameters.
        """
        self._module = module
        self._optimizer = optimizer
        self._counter = PeakCounter(device if device is not None else next(module.parameters()).device)
        self._phase = self._around = OTHER
        self._handles: list[Any] = []
        self.peak_bytes: dict[str, int] = {}

    @property
    def kind(self) -> str:
        """`allocated` on a GPU, `resident` on a CPU."""
        return self._counter.kind

    @property
    def peak_gib(self) -> dict[str, float]:
        """Peaks in GiB (2^30 bytes)."""
        return {name: peak / GIB for name, peak in self.peak_bytes.items()}

    def __enter__(self) -> MemoryHooks:
        """Add the hooks."""
        self._handles = [
            self._module.register_forward_pre_hook(self._before_forward),
            self._module.register_forward_hook(self._after_forward),
        ]
        optimizer: Any = self._optimizer
        while optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
            optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(lambda *_: self._begin("step")),
                optimizer.register_step_post_hook(lambda *_: self._begin(self._around)),
            ]
        self._counter.reset()
        self._phase = OTHER
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self._begin(OTHER)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a phase of this name; phases of the module's training inside it keep their own."""
        outer, self._around = self._around, name
        self._begin(name)
        try:
            yield
        finally:
            self._around = outer
            self._begin(outer)

    def _begin(self, name: str) -> None:
        """End the running phase and start another."""
        self.peak_bytes[self._phase] = max(self.peak_bytes.get(self._phase, 0), self._counter.peak())
        self._counter.reset()
        self._phase = name

    def _before_forward(self, *_: object) -> None:
        if torch.is_grad_enabled() or self._around == OTHER:
            self._begin("forward")

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._phase == "forward":
            self._begin(self._around)
        if not torch.is_grad_enabled():
            return
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._first_gradient)

    def _first_gradient(self, gradient: Tensor) -> None:
        if self._phase != "backward":
            self._begin("backward")


def _tensors(value: Any) -> Iterable[Tensor]:
    """Yield all tensors of a module's output: a tensor, or tuples, lists and mappings of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
