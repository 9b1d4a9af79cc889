"""The probe's two halves: the trunk (all layers but the last, no gradient) and the tail (last layer, norm, head)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import Architecture
from colm_ds.models.example_loss import loss_sums
from colm_ds.models.patch import Forward, patched_forwards
from colm_ds.models.precision import full_products
from colm_ds.models.quantized import float_dtype, float_weight, is_quantized
from colm_ds.models.token_loss import chunk_size, in_chunks, token_losses

_CAST_ELEMENTS = 1 << 22
"""Weight elements cast at a time (16 MB in float32, which a CPU's caches hold)."""

_CAST_ELEMENTS_ON_GPU = 1 << 24
"""On a GPU, where every part costs launches of kernels."""

_OWN_CODE = (
    *("transformers.models.", "transformers.activations", "transformers.pytorch_utils", "transformers_modules."),
    "torch.nn.modules.",
)
"""Modules of models, which compute with their weights in any dtype; those of quantisation libraries do not."""


@dataclass(frozen=True)
class TailInput:
    """Input of the last layer for one micro-batch.

    Attributes:
        hidden: hidden states, `[batch, length, hidden]`.
        args: further positional arguments of the layer.
        kwargs: its keyword arguments (mask, rotary embeddings, positions).
        batch: the micro-batch, with its labelled positions.
        num_outputs: length of the tuple that a layer of the model returns; 0 for hidden states alone.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: MicroBatch
    num_outputs: int = 0

    def cast(self, dtype: torch.dtype) -> TailInput:
        """Return the same with every floating-point tensor cast to a dtype."""
        hidden, args, kwargs = (_cast(part, dtype) for part in (self.hidden, self.args, self.kwargs))
        return replace(self, hidden=hidden, args=args, kwargs=kwargs)


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

    def capture(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured.append((hidden_states, args, kwargs))
        return _as_layer_output(hidden_states, num_outputs[-1])

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        num_outputs.append(len(output) if isinstance(output, (tuple, list)) else 0)

    num_outputs = [2 if "tuple" in str(type(architecture.last_layer).forward.__annotations__.get("return")) else 0]
    skip: dict[nn.Module, Forward] = {architecture.last_layer: capture}
    if architecture.norm is None:
        skip[architecture.head] = lambda hidden: _like_logits(architecture, hidden[:, :1])
    else:
        skip |= {architecture.norm: _first_position, architecture.head: _same}
    lower = torch.autocast(batch.input_ids.device.type, dtype=dtype) if dtype else nullcontext()
    with ExitStack() as hooks, torch.no_grad(), patched_forwards(skip), lower:
        for layer in list(architecture.layers)[-2:-1]:
            hooks.callback(layer.register_forward_hook(look).remove)
        model(input_ids=batch.input_ids, use_cache=False)
    if len(captured) != 1:
        raise ProbeError(f"the last decoder layer ran {len(captured)} times in one forward; expected once.")
    tokens, states = tuple(batch.input_ids.shape), tuple(captured[0][0].shape[:2])
    if tokens != states:
        raise ProbeError(
            f"{tokens} tokens became {states} hidden states, so labels would meet the wrong ones. "
            "Train without added tokens (no prompt tuning), with LoRA for example."
        )
    tail = TailInput(*captured[0], batch, num_outputs[-1])
    return tail if dtype is None else tail.cast(float_dtype(architecture.last_layer))


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _first_position(hidden: Tensor) -> Tensor:
    return hidden[:, :1]


def last_states(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the last layer's output at labelled positions, `[num_labels, hidden]`.

    Runs the attention on all positions and an MLP of its own kind (`Architecture.mlp`) on labelled ones, as nothing
    after the attention mixes positions. Hooks on the layer's modules apply.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    batch, mlp = tail.batch, architecture.mlp
    patched: dict[nn.Module, Forward] = {}
    if mlp is not None:
        plain_mlp: Callable[[Tensor], Tensor] = mlp.forward

        def labelled_mlp(states: Tensor) -> Tensor:
            values = plain_mlp(states[batch.places])
            return values.new_zeros(states.shape).index_put(batch.places, values)

        patched[mlp] = labelled_mlp
    with patched_forwards(patched):
        output = architecture.last_layer(tail.hidden, *tail.args, **tail.kwargs)
    output = output[0] if isinstance(output, (tuple, list)) else output
    states: Tensor = output[batch.rows, batch.positions]
    return states


def closing_logits(architecture: Architecture, states: Tensor, num_outputs: int) -> Tensor:
    """Run what the model itself does after its last layer: norm, head, scales, soft-caps.

    Every state is an example of one token, so that masks and positions are those of nothing; no layer runs.

    Args:
        architecture: the model's parts.
        states: output of the last layer, `[n, hidden]`.
        num_outputs: see `TailInput`.

    Returns:
        Logits, `[n, vocabulary]`.
    """
    output = _as_layer_output(states[:, None], num_outputs)
    skipped: dict[nn.Module, Forward] = {layer: lambda *args, **kwargs: output for layer in architecture.layers}
    tokens = torch.zeros(len(states), 1, dtype=torch.int64, device=states.device)
    model = architecture.model
    forward = getattr(model, "_original_forward", model.forward)  # without the autocast that accelerate puts around it
    with patched_forwards(skipped):  # not by __call__: a forward of ZeRO-3's own begins with the outermost module's
        logits: Tensor = forward(input_ids=tokens, use_cache=False).logits
    return logits[:, 0]


def labelled_hidden(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the hidden states that enter the head at labelled positions, `[num_labels, hidden]`.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    states = last_states(architecture, tail)
    if architecture.norm is not None:
        hidden: Tensor = architecture.norm(states)
        return hidden
    entering: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        entering.append(hidden)
        return _like_logits(architecture, hidden)

    with patched_forwards({architecture.head: keep}):
        closing_logits(architecture, states, tail.num_outputs)
    return entering[0].reshape(len(states), -1)


def tail_losses(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the loss of every example in nats, float32 `[batch]`; see `last_states` and `loss_sums`."""
    return loss_sums(label_losses(architecture, tail), tail.batch) / tail.batch.counts.clamp_min(1.0)


def label_losses(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the loss of every label in nats, float32 `[num_labels]`."""
    head, targets = architecture.head, tail.batch.targets
    if architecture.norm is None:

        def closing(states: Tensor) -> Tensor:
            return closing_logits(architecture, states, tail.num_outputs)

        return token_losses(closing, last_states(architecture, tail), targets, architecture.vocabulary_size)
    plain_head: Callable[[Tensor], Tensor] = head.forward

    def loss_head(states: Tensor) -> Tensor:
        if isinstance(plain_head, _PreciseLinear):
            return plain_head.losses(states, targets)
        return token_losses(plain_head, states, targets, architecture.vocabulary_size)

    hidden = labelled_hidden(architecture, tail)
    with patched_forwards({head: loss_head}):
        losses: Tensor = head(hidden)
    return losses


LabelFunction = Callable[[Tensor, Tensor], Tensor]
"""Maps logits `[n, vocabulary]` and targets `[n]` to one number for each, `[n]`."""


def from_logits(architecture: Architecture, tail: TailInput, function: LabelFunction) -> Tensor:
    """Return a function of the logits at every label, float32 `[num_labels]`, without gradients; logits in chunks.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
        function: see `LabelFunction`.
    """
    head, size, targets = architecture.head, architecture.vocabulary_size, tail.batch.targets
    if architecture.norm is None:
        states = last_states(architecture, tail)

        def closing(part: Tensor, labels: Tensor) -> Tensor:
            return function(closing_logits(architecture, part, tail.num_outputs), labels)

        return in_chunks(closing, states, targets, size)
    plain_head = head.forward
    hidden = labelled_hidden(architecture, tail)

    def head_function(states: Tensor) -> Tensor:
        return in_chunks(lambda part, labels: function(plain_head(part), labels), states, targets, size)

    with patched_forwards({head: head_function}):
        values: Tensor = head(hidden)
    return values


def _like_logits(architecture: Architecture, hidden: Tensor) -> Tensor:
    """Return a tensor of the logits' shape without their memory, for the code that comes after the head."""
    return hidden[..., :1].expand(*hidden.shape[:-1], architecture.vocabulary_size)


def _as_layer_output(hidden: Tensor, num_outputs: int) -> Any:
    """Return hidden states in the form in which the model's layers return them: alone or first in a tuple."""
    return (hidden, *[None] * (num_outputs - 1)) if num_outputs else hidden


@contextmanager
def precise_tail(
    architecture: Architecture, dtype: torch.dtype = torch.float32, device_type: str | None = None
) -> Iterator[None]:
    """Make the last layer, norm and head compute in float32 or float64, whatever the dtype of their weights.

    Weights are cast a part at a time inside the modules' forwards and stay as they are. A finite difference in bf16
    would be noise (measured: correlation -0.15 with float32's); one with TF32 matrix products nearly so, hence full
    float32 products.

    Args:
        architecture: the model's parts.
        dtype: float32 or float64.
        device_type: cast parts of the size for this type of device; None: that of the head.

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
    casting: list[Any] = []
    own_code = architecture.norm is None
    computing_on = str(architecture.head.weight.device.type)
    part = _CAST_ELEMENTS if (device_type or computing_on) == "cpu" else _CAST_ELEMENTS_ON_GPU
    for name, module in _tail_modules(architecture):
        if getattr(module, "cast_input_dtype_enabled", False):
            casting.append(module)
        forward = _precise_forward(name, module, dtype, own_code, part)
        if forward is not None:
            forwards[module] = forward
    experts = _plain_experts(architecture) if own_code else nullcontext()
    for module in casting:  # LoRA layers would round their input to the adapter's dtype
        module.cast_input_dtype_enabled = False
    try:
        lower = torch.autocast(computing_on, enabled=False)
        with patched_forwards(forwards), full_products(), lower, TailPrecision(dtype), experts:
            yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True


@contextmanager
def _plain_experts(architecture: Architecture) -> Iterator[None]:
    """Compute experts one after the other, in any dtype: grouped products exist in 16 and 32 bits only."""
    owners: list[Any] = [module for module in architecture.last_layer.modules() if _has_experts(module)]
    configs = {id(owner.config): owner.config for owner in owners}
    saved = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in saved:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in saved:
            config._experts_implementation = implementation


def _has_experts(module: Any) -> bool:
    return getattr(getattr(module, "config", None), "_experts_implementation", None) is not None


def _tail_modules(architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the last layer, and those outside the layers that run before or after it, with names."""
    if architecture.norm is not None:
        for part in (architecture.last_layer, architecture.norm, architecture.head):
            yield from part.named_modules()
        return
    within = {module for layer in architecture.layers for module in layer.modules()}
    yield from architecture.last_layer.named_modules()
    yield from ((name, module) for name, module in architecture.model.named_modules() if module not in within)


def _precise_forward(name: str, module: nn.Module, dtype: torch.dtype, own_code: bool, part: int) -> Forward | None:
    """Return a forward in a higher dtype for a module with weights in a lower one; None if its own forward will do."""
    if is_quantized(module):
        return _precise_quantized(module, dtype)
    if type(module).__name__ in ("DoraLinearLayer", "ParametrizationList"):
        return None  # multiplies one by one, so that factors are promoted; the second makes floats of quantized experts
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype != dtype]
    has_buffers = any(buffer.is_floating_point() and buffer.dtype != dtype for buffer in module.buffers(recurse=False))
    if not weights and own_code and has_buffers and type(module).__module__.startswith(_OWN_CODE):
        return _with_cast_weights(module, dtype)
    if not weights:
        return None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:  # not a quantised one
        return _PreciseLinear(module, dtype, part)
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        layer_norm = module

        def forward(hidden: Tensor) -> Tensor:
            weight, bias = _cast(layer_norm.weight, dtype), _cast(layer_norm.bias, dtype)
            return F.layer_norm(hidden, layer_norm.normalized_shape, weight, bias, layer_norm.eps)

        return forward
    if own_code and isinstance(module, nn.Embedding):
        return _cast_output(module, dtype)
    if own_code and type(module).__module__.startswith(_OWN_CODE) and all(p.is_floating_point() for p in weights):
        return _with_cast_weights(module, dtype)
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


def _cast_output(module: nn.Module, dtype: torch.dtype) -> Forward:
    plain: Forward = module.forward
    return lambda *args, **kwargs: _cast(plain(*args, **kwargs), dtype)


def _with_cast_weights(module: nn.Module, dtype: torch.dtype) -> Forward:
    """Return the module's own forward with cast copies of its weights in their places while it runs."""
    plain: Forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        weights, buffers = dict(module._parameters), dict(module._buffers)
        try:
            for name, weight in weights.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            module._buffers.update({name: _cast(buffer, dtype) for name, buffer in buffers.items()})
            return plain(*_cast(args, dtype), **_cast(kwargs, dtype))
        finally:
            for name, weight in weights.items():
                module._parameters[name] = weight
            module._buffers.update(buffers)

    return forward


_PRODUCTS = (F.linear, F.conv1d, torch.conv1d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
"""Operations that refuse factors of different dtypes."""


class TailPrecision(TorchFunctionMode):
    """Let a model's own code compute in the tail's dtype.

    Factors of products are cast to it where they differ, as weights are that a module reads of another one; and float64
    tensors stay in float64 where the code asks for float32, as norms and softmaxes do.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            return func(*_cast(args, self._dtype), **_cast(kwargs, self._dtype))
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if torch.float32 in args or kwargs.get("dtype") is torch.float32:
                args = tuple(torch.float64 if each is torch.float32 else each for each in args)
                kwargs = {key: torch.float64 if each is torch.float32 else each for key, each in kwargs.items()}
        return func(*args, **kwargs)


class _PreciseLinear:
    """Forward of a linear map in a higher dtype, with at most a part of its weight cast at a time."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype, part: int) -> None:
        self._module, self._dtype, self._part = module, dtype, part

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the outputs."""
        hidden = hidden.to(self._dtype)
        num_rows, width = self._module.weight.shape
        if num_rows * width <= self._part:
            return self._of_rows(hidden, 0, num_rows)
        output = hidden.new_empty(*hidden.shape[:-1], num_rows)
        rows = max(1, self._part // width)
        for start in range(0, num_rows, rows):
            output[..., start : start + rows] = self._of_rows(hidden, start, start + rows)
        return output

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of every position in nats, without gradients, `[n]`; see `token_losses`.

        Parts of the vocabulary come one after another, each with as many logits as `token_losses` has in a chunk, so
        that every weight is cast once and not for every chunk of positions.

        Args:
            hidden: input of the head, `[n, hidden]`.
            targets: int64 `[n]`.
        """
        hidden = hidden.to(self._dtype)
        num_rows, width = self._module.weight.shape
        rows = max(1, min(self._part // width, chunk_size(max(1, len(targets)))))
        sums, own = [], hidden.new_zeros(len(targets))
        for start in range(0, num_rows, rows):
            logits = self._of_rows(hidden, start, start + rows)
            place = targets - start
            is_here = (place >= 0) & (place < logits.shape[1])
            values = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            own = torch.where(is_here, values, own)
            largest = logits.amax(dim=1)
            rest = logits.sub_(largest[:, None]).exp_().sum(dim=1)  # in place: no second copy of the logits
            sums.append(rest.log_().add_(largest))
        return torch.logsumexp(torch.stack(sums), dim=0) - own

    def _of_rows(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        weight, bias = self._module.weight[start:stop], self._module.bias
        return F.linear(hidden, weight.to(self._dtype), None if bias is None else _cast(bias[start:stop], self._dtype))


def _precise_quantized(module: Any, dtype: torch.dtype) -> Forward:
    """Return a forward with the floats that a quantized weight stands for, and inputs that are not rounded."""

    def forward(hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(dtype), float_weight(module).to(dtype), _cast(module.bias, dtype))

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
