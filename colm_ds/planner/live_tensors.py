"""Run models of any size as shapes only, and count the bytes that their tensors would occupy."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colm_ds.models.patch import patched_forwards
from colm_ds.models.quantized import fused_experts


def make_dataless(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace a model's parameters and buffers (on the meta device) by tensors without data that count as on a CPU.

    Args:
        model: the model, changed in place; shared parameters stay shared.
        mode: mode under which it will run.
        dtype: dtype of all floating-point parameters, as DeepSpeed casts them; None keeps their own.
    """
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                    data = torch.empty(parameter.shape, dtype=kind)
                    made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                    vars(made[id(parameter)]).update(vars(parameter))
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors created while it is active and still in use, each storage once.

    Attributes:
        live: bytes now.
        peak: maximum of `live` since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Start a new peak."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its results."""
        if func is torch.ops.prim.device.default:  # two of three calls, which create nothing
            return args[0].fake_device
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


@contextmanager
def gpu_dropout() -> Iterator[None]:
    """Make dropout keep its mask as a GPU's kernel does, one byte per element, while shapes run as on a CPU."""
    own: Any = F.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p > 0:
            return torch.native_dropout(input, p, True)[0]
        return own(input, p, training, inplace)

    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = own


@contextmanager
def rows_packed(packed: bool) -> Iterator[None]:
    """Tell transformers whether rows are packed, which it cannot see in tensors without data.

    Of whole examples it would otherwise make a mask, and with a mask attention expands keys and values of grouped
    queries.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    own: Any = getattr(masking_utils, name, None)
    if own is None:  # another version
        yield
        return
    setattr(masking_utils, name, lambda position_ids, *_, **__: position_ids.cumsum(-1) if packed else None)
    try:
        yield
    finally:
        setattr(masking_utils, name, own)


@contextmanager
def one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Let fused experts run as one expert that takes all tokens: the most that a loop over experts can need.

    How many tokens an expert really gets depends on the data, which tensors without data do not have.
    """

    def forward_of(experts: Any) -> Any:
        def forward(hidden: Tensor, *routing: Any) -> Tensor:
            states = hidden
            for name in ("gate_up_proj", "up_proj", "down_proj"):
                weight = getattr(experts, name, None)
                if weight is None:
                    continue
                weight = weight[0].t() if getattr(experts, "is_transposed", False) else weight[0]
                states = F.linear(states, weight)
                if name == "gate_up_proj":
                    gate, up = states.chunk(2, dim=-1)
                    states = F.silu(gate) * up
            return hidden.new_zeros(hidden.shape).add(states)

        return forward

    owners = {owner for owner, _ in fused_experts(model)}
    owners |= {module for module in model.modules() if hasattr(module, "parametrizations")}
    with patched_forwards({owner: forward_of(owner) for owner in owners}):
        yield


class _GroupedProduct(torch.autograd.Function):
    """A product of the rows of every group with a matrix of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        return rows.new_empty(rows.shape[0], matrices.shape[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, matrices = ctx.saved_tensors
        for_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        return for_rows, torch.empty_like(matrices) if ctx.needs_input_grad[1] else None


@contextmanager
def grouped_products() -> Iterator[None]:
    """Let grouped products, with which transformers runs experts, work on tensors without data of every dtype."""
    functions: Any = F
    own = functions.grouped_mm

    def grouped(rows: Tensor, matrices: Tensor, *, offs: Tensor | None = None, **options: Any) -> Any:
        return _GroupedProduct.apply(rows, matrices)

    functions.grouped_mm = grouped
    try:
        yield
    finally:
        functions.grouped_mm = own


class _InputKept(torch.autograd.Function):
    """A linear map that keeps its input for the backward pass even if its weight is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
        output = hidden.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (hidden, weight) = gradients, ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_hidden = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        for_weight = flat.t().matmul(hidden.reshape(-1, hidden.shape[-1])) if ctx.needs_input_grad[1] else None
        return for_hidden, for_weight, flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


@contextmanager
def stage3_linear() -> Iterator[None]:
    """Make linear maps keep what DeepSpeed's keep under ZeRO-3, whose weights are released between passes."""
    own: Any = F.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return _InputKept.apply(input, weight, bias)

    F.linear = linear
    try:
        yield
    finally:
        F.linear = own
