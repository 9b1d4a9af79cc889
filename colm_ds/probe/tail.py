"""The probe's two halves: the trunk (all layers but the last, no gradient) and the tail (last layer, norm, head)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import Architecture
from colm_ds.models.example_loss import loss_sums
from colm_ds.models.patch import Forward, patched_forwards
from colm_ds.models.token_loss import token_losses

_CAST_ELEMENTS = 1 << 22
"""Weight elements cast at a time (16 MB in float32)."""


@dataclass(frozen=True)
class TailInput:
    """Input of the last layer for one micro-batch.

    Attributes:
        hidden: hidden states, `[batch, length, hidden]`.
        args: further positional arguments of the layer.
        kwargs: its keyword arguments (mask, rotary embeddings, positions).
        batch: the micro-batch, with its labelled positions.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: MicroBatch

    def cast(self, dtype: torch.dtype) -> TailInput:
        """Return the same with every floating-point tensor cast to a dtype."""
        return TailInput(_cast(self.hidden, dtype), _cast(self.args, dtype), _cast(self.kwargs, dtype), self.batch)


def run_trunk(
    model: nn.Module, architecture: Architecture, batch: MicroBatch, dtype: torch.dtype | None = None
) -> TailInput:
    """Run one no-grad pass through every layer but the last; skip the norm and the head.

    Args:
        model: the module to call: that of the DeepSpeed engine, or the model itself.
        architecture: its parts.
        batch: the micro-batch, on the device.
        dtype: compute in this dtype instead of the model's own (autocast); the captured states have the model's.
    """
    captured: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def capture(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        captured.append((hidden_states, args, kwargs))
        return hidden_states

    skip: dict[nn.Module, Forward] = {
        architecture.last_layer: capture,
        architecture.norm: _first_position,
        architecture.head: _same,
    }
    lower = torch.autocast(batch.input_ids.device.type, dtype=dtype) if dtype else nullcontext()
    with torch.no_grad(), patched_forwards(skip), lower:
        model(input_ids=batch.input_ids, use_cache=False)
    if len(captured) != 1:
        raise ProbeError(f"the last decoder layer ran {len(captured)} times in one forward; expected once.")
    tokens, states = tuple(batch.input_ids.shape), tuple(captured[0][0].shape[:2])
    if tokens != states:
        raise ProbeError(
            f"{tokens} tokens became {states} hidden states, so labels would meet the wrong ones. "
            "Train without added tokens (no prompt tuning), with LoRA for example."
        )
    tail = TailInput(*captured[0], batch)
    return tail if dtype is None else tail.cast(next(architecture.norm.parameters()).dtype)


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _first_position(hidden: Tensor) -> Tensor:
    return hidden[:, :1]


def labelled_hidden(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the hidden states after the final norm at labelled positions, `[num_labels, hidden]`.

    Runs the last layer's attention on all positions, its MLP and the norm on labelled ones, as nothing after the
    attention mixes positions. Hooks on the layer's modules apply.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    batch = tail.batch
    mlp = architecture.last_layer.mlp
    plain_mlp: Callable[[Tensor], Tensor] = mlp.forward  # type: ignore[union-attr]

    def labelled_mlp(states: Tensor) -> Tensor:
        values = plain_mlp(states[batch.places])
        return values.new_zeros(states.shape).index_put(batch.places, values)

    with patched_forwards({mlp: labelled_mlp}):  # type: ignore[dict-item]
        output = architecture.last_layer(tail.hidden, *tail.args, **tail.kwargs)
    output = output[0] if isinstance(output, tuple) else output
    hidden: Tensor = architecture.norm(output[batch.rows, batch.positions])
    return hidden


def tail_losses(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the loss of every example in nats, float32 `[batch]`; see `labelled_hidden` and `loss_sums`."""
    return loss_sums(label_losses(architecture, tail), tail.batch) / tail.batch.counts.clamp_min(1.0)


def label_losses(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the loss of every label in nats, float32 `[num_labels]`."""
    head, targets = architecture.head, tail.batch.targets
    plain_head: Callable[[Tensor], Tensor] = head.forward

    def loss_head(states: Tensor) -> Tensor:
        return token_losses(plain_head, states, targets, architecture.vocabulary_size)

    hidden = labelled_hidden(architecture, tail)
    with patched_forwards({head: loss_head}):
        losses: Tensor = head(hidden)
    return losses


@contextmanager
def precise_tail(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Make the last layer, norm and head compute in float32 or float64, whatever the dtype of their weights.

    Weights are cast a part at a time inside the modules' forwards and stay as they are. A finite difference in bf16
    would be noise (DESIGN, section 3); one with TF32 matrix products nearly so, hence full float32 products.

    Raises:
        ProbeError: if a module with weights, or the attention, cannot run in that dtype.
    """
    attention = str(getattr(getattr(architecture.model, "config", None), "_attn_implementation", ""))
    if "flash" in attention:
        raise ProbeError(
            f"attn_implementation = {attention!r} computes in 16 bits, but `spsa` needs float32. "
            'Load the model with attn_implementation="sdpa", or use "estimator": "exact" or "sketch".'
        )
    forwards: dict[nn.Module, Forward] = {}
    casting = []
    for part in (architecture.last_layer, architecture.norm, architecture.head):
        for name, module in part.named_modules():
            if getattr(module, "cast_input_dtype_enabled", False):
                casting.append(module)
            forward = _precise_forward(name, module, dtype)
            if forward is not None:
                forwards[module] = forward
    for module in casting:  # LoRA layers would round their input to the adapter's dtype
        module.cast_input_dtype_enabled = False
    try:
        device_type = str(architecture.head.weight.device.type)
        with patched_forwards(forwards), _full_products(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True


@contextmanager
def _full_products() -> Iterator[None]:
    """Compute float32 matrix products in float32 even if the user allows TF32; then restore the settings."""
    backends = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    settings = [getattr(backend, "fp32_precision", None) for backend in backends]  # since torch 2.9
    precision = None
    with suppress(RuntimeError):  # torch refuses the older interface if the newer one is in use
        precision = torch.get_float32_matmul_precision()
    try:
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        for backend, setting in zip(backends, settings, strict=True):
            if setting is not None:
                backend.fp32_precision = "ieee"
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, setting in zip(backends, settings, strict=True):
            if setting is not None:
                backend.fp32_precision = setting


def _precise_forward(name: str, module: nn.Module, dtype: torch.dtype) -> Forward | None:
    """Return a forward in a higher dtype for a module with weights in a lower one; None if its own forward will do."""
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype != dtype]
    if not weights:
        return None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:  # not a quantised one
        return _precise_linear(module, dtype)
    if isinstance(module, nn.LayerNorm):
        layer_norm = module

        def forward(hidden: Tensor) -> Tensor:
            weight, bias = _cast(layer_norm.weight, dtype), _cast(layer_norm.bias, dtype)
            return F.layer_norm(hidden, layer_norm.normalized_shape, weight, bias, layer_norm.eps)

        return forward
    if "RMSNorm" in type(module).__name__:
        return _precise_rms_norm(module, dtype)
    raise ProbeError(
        f"{name or type(module).__name__} ({type(module).__name__}) cannot be run in {dtype}, which `spsa` needs. "
        'Use "estimator": "exact" or "sketch".'
    )


def _precise_rms_norm(module: nn.Module, dtype: torch.dtype) -> Forward | None:
    if dtype == torch.float32:
        return None  # the module's own forward computes in float32 and multiplies in the input's dtype
    epsilon = float(module.variance_epsilon)  # type: ignore[arg-type]

    def forward(hidden: Tensor) -> Tensor:
        scale = hidden.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        return _cast(module.weight, dtype) * (hidden * scale)

    return forward


def _precise_linear(module: nn.Linear, dtype: torch.dtype) -> Forward:
    def forward(hidden: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if weight.numel() <= _CAST_ELEMENTS:
            return F.linear(hidden, weight.to(dtype), _cast(bias, dtype))
        output = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
        rows = max(1, _CAST_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            stop = start + rows
            part = None if bias is None else _cast(bias[start:stop], dtype)
            output[..., start:stop] = F.linear(hidden, weight[start:stop].to(dtype), part)
        return output

    return forward


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors of a nested structure; leave everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
