"""Quantized weights as shapes: what bitsandbytes stores of a matrix, and what a pass makes of it for a while."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.models.quantized import fused_experts

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights, and scales of the second quantization, that share a scale."""


def stored_bytes(shape: tuple[int, ...], quantization: str, double_quant: bool) -> int:
    """Return the bytes of a matrix, or of a tensor of experts, with its scales.

    Args:
        shape: `[..., out, in]`.
        quantization: "4bit" or "8bit".
        double_quant: whether the scales of 4 bits are quantized too.
    """
    size = 1
    for length in shape:
        size *= length
    if quantization == "8bit":
        return size + 4 * (size // shape[-1])  # a scale for every row
    blocks = -(-size // _BLOCK)
    scales = blocks + 4 * -(-blocks // _OUTER_BLOCK) if double_quant else 4 * blocks
    return -(-size // 2) + scales


class QuantizedShape(nn.Linear):
    """A frozen linear map that makes floats of its weight in every pass and keeps none for the backward pass."""

    is_quantized = True

    def __init__(self, plain: nn.Linear, quantization: str, double_quant: bool, dtype: torch.dtype) -> None:
        """Take the place of a linear map on the meta device."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.rounds_inputs, self.dtype = quantization == "8bit", dtype
        shape = self.out_features, self.in_features
        self.packed = packed(shape, stored_bytes(shape, quantization, double_quant))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Floats of the matrix, made each time that they are asked for."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.packed.device)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply."""
        output: Tensor = _Product.apply(input, self)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, linear: QuantizedShape) -> Tensor:
        ctx.linear = linear
        if not linear.rounds_inputs:
            return hidden.matmul(linear.weight.t())
        ctx.save_for_backward(hidden)  # as bitsandbytes does, though it computes nothing from it
        half = hidden.to(torch.float16)
        rounded = half.to(torch.int8)
        del half
        sums = torch.empty(*hidden.shape[:-1], linear.out_features, dtype=torch.int32, device=hidden.device)
        del rounded
        return sums.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].matmul(ctx.linear.weight), None


class _Floats(nn.Module):
    """Make the floats of a tensor of experts whenever it is read."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype

    def forward(self, stored: Tensor) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=stored.device)


def packed(shape: tuple[int, ...], num_bytes: int) -> nn.Parameter:
    """Return a frozen parameter of so many bytes on the meta device that counts as a tensor of a shape."""
    stored = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)
    stored.stands_for = torch.Size(shape).numel()  # type: ignore[attr-defined]
    return stored


def quantize_shapes(model: Any, quantization: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Replace what transformers and colm_ds quantize of a model on the meta device: all linear maps but the head.

    Args:
        model: a causal LM without adapters, changed in place.
        quantization: "4bit" or "8bit".
        double_quant: see `stored_bytes`.
        dtype: of the floats.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, QuantizedShape(module, quantization, double_quant, dtype))
    for owner, name in fused_experts(model) if quantization == "4bit" else []:
        shape = getattr(owner, name).shape
        setattr(owner, name, packed(tuple(shape), stored_bytes(tuple(shape), quantization, double_quant)))
        nn.utils.parametrize.register_parametrization(owner, name, _Floats(shape, dtype), unsafe=True)


def num_elements(parameter: Tensor) -> int:
    """Return the weights that a parameter stands for."""
    return int(getattr(parameter, "stands_for", parameter.numel()))


def is_packed(parameter: Tensor) -> bool:
    """Return whether a parameter is from `packed`."""
    return hasattr(parameter, "stands_for")
