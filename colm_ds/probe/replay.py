"""Forward replay: the probe's pass is the checkpointed first forward of the examples that are then selected.

With activation checkpointing, training runs every layer forward twice: in the forward pass, and once more in the
backward pass. The probe has already run the forward pass: it keeps the hidden states between the layers, training
starts from them, and only the recomputation is left: b forwards less, with the same gradients (docs/HOW.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.config.colm import CoLMSection
from colm_ds.errors import ConfigError
from colm_ds.memory.meter import GIB, free_bytes
from colm_ds.models.architecture import Architecture
from colm_ds.models.patch import patched_forwards
from colm_ds.models.quantized import float_dtype
from colm_ds.randomness import private_generator
from colm_ds.selection.transfer import to_device

Run = Callable[[Tensor], Any]


class _Replayed(torch.autograd.Function):
    """Forward: the stored output. Backward: run the layer on its input and differentiate it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, attach: Tensor, output: Tensor, run: Run) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run = run
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            output = ctx.run(hidden)
        output = output[0] if isinstance(output, (tuple, list)) else output
        torch.autograd.backward(output, gradients[0])
        return hidden.grad, None, None, None


_Row = tuple[int, int]
"""A position in the large batch, and the index of a row of its example."""


@dataclass(frozen=True)
class _Place:
    """Place of a row in the probe's pass."""

    micro_batch: int
    row: int
    length: int


@dataclass(frozen=True)
class _Part:
    """Rows of a training micro-batch that one micro-batch of the probe had.

    Attributes:
        micro_batch: number of the probe's micro-batch.
        rows: their rows in training, int64 on the device.
        probed: their rows in the probe.
        stored: their rows in what is stored of it.
        lengths: row in training and tokens of each.
        stored_rows: `stored` as numbers.
    """

    micro_batch: int
    rows: Tensor
    probed: Tensor
    stored: Tensor
    lengths: list[tuple[int, int]]
    stored_rows: list[int]


RATES_IN_LAYERS = {
    **dict.fromkeys(
        ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout"), "attention dropout"
    ),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), "the noise of the router"),
}
"""Keys of a model's configuration for what is random within its layers, and what that is."""


def why_not_replay(architecture: Architecture) -> str | None:
    """Return the reason why this model's forwards cannot be replayed; None if they can."""
    layers = list(architecture.layers)
    if not all(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return "activation checkpointing is off, so no forward is computed twice"
    if len(layers) < 2:
        return "the model has a single layer"
    config: Any = architecture.model.config
    for name, what in RATES_IN_LAYERS.items():
        if float(getattr(config, name, 0.0) or 0.0) > 0:
            return f"{name} is {getattr(config, name)}: {what} cannot be repeated"
    for module in architecture.model.modules():
        if (own := _own_rate(module)) is not None:
            rate = f"{type(module).__name__}.{own} is {getattr(module, own)}"
            return (
                f"{rate}: dropout that is no module cannot be repeated; with 0 in the model's config.json there is none"
            )
    inside = {module for layer in layers for module in layer.modules()}
    if any(_drops_under_dora(module) for module in inside):
        return "DoRA leaves its dropout out of every pass but training's; set the dropout of the adapters to 0"
    outside = [module for module in architecture.model.modules() if module not in inside]
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in outside):
        return "there is dropout outside the decoder layers"
    return None


def _own_rate(module: nn.Module) -> str | None:
    """Return the name under which a module keeps a rate by which its forward drops something itself, if it has one.

    Forwards that call `F.dropout` or leave out whole layers, as OPT's and Starcoder2's do, keep the rate as a number.
    """
    rates = (name for name, value in vars(module).items() if isinstance(value, float) and value > 0)
    return next((name for name in rates if any(part in name for part in ("drop", "jitter"))), None)


def _drops_under_dora(module: Any) -> bool:
    """Return whether a module is adapted by DoRA with dropout."""
    dropouts = module.lora_dropout.values() if getattr(module, "lora_magnitude_vector", None) else ()
    return any(isinstance(each, nn.Dropout) and each.p > 0 for each in dropouts)


class ReplayStore:
    """Hidden states at the layer boundaries of one step's examples, on this rank.

    Attributes:
        num_bytes: bytes stored now.
    """

    def __init__(self, architecture: Architecture, *, offload: bool = False, seed: int = 0) -> None:
        """Prepare for a model.

        Args:
            architecture: its parts.
            offload: keep the states in host memory (pinned where there is a GPU).
            seed: seed of the run, which determines dropout masks of replayed layers.
        """
        self._layers = list(architecture.layers)[:-1]  # the last layer runs as usual: its output was not stored
        self._last = architecture.last_layer
        self._offload = offload
        self._seed = seed
        self._step = 0
        self._states: list[list[Tensor]] = []  # by micro-batch of the probe, by layer
        self._num_outputs = 0  # length of the tuple that a layer returns; 0 for hidden states alone
        self._shapes: list[tuple[int, int]] = []
        self._places: dict[_Row, _Place] = {}
        self._rows: list[dict[int, int]] = []  # by micro-batch: index of a row after the others were dropped
        self._attach: Tensor | None = None
        modules = [module for layer in self._layers for module in layer.modules()]
        dropouts = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0]
        self._dropouts = {module: (number, module.p) for number, module in enumerate(dropouts)}

    @property
    def num_bytes(self) -> int:
        """Bytes stored now."""
        return sum(state.numel() * state.element_size() for states in self._states for state in states)

    def bytes_on(self, device: torch.device) -> int:
        """Return the bytes stored now on a type of device."""
        states = [state for states in self._states for state in states if state.device.type == device.type]
        return sum(state.numel() * state.element_size() for state in states)

    def begin(self, step: int) -> None:
        """Discard the last step."""
        self._step = step
        self._states, self._shapes, self._places, self._rows = [], [], {}, []

    @contextmanager
    def recording(self, positions: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
        """Store the output of every layer but the last in one forward of the trunk.

        Args:
            positions: position in the large batch of every row; rows of one example come in the order of training.
            lengths: tokens of every row.
        """
        states: list[Tensor] = []
        number = len(self._states)

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            is_alone = not isinstance(output, (tuple, list))
            hidden, self._num_outputs = (output, 0) if is_alone else (output[0], len(output))
            states.append(self._put_away(hidden.detach()))
            if len(states) == 1:
                self._shapes.append((hidden.shape[0], hidden.shape[1]))

        def drop(module: nn.Dropout, hidden: Tensor) -> Tensor:
            return hidden * self._mask(number, module, hidden)

        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(record).remove)
            stack.enter_context(patched_forwards({module: _bind(drop, module) for module in self._dropouts}))
            yield
        self._states.append(states)
        self._rows.append({row: row for row in range(len(positions))})
        for row, (key, length) in enumerate(zip(_keys(positions), lengths, strict=False)):  # none for a placeholder
            self._places[key] = _Place(number, row, length)

    def keep(self, positions: Sequence[int]) -> None:
        """Free the memory of all other examples on the device.

        Offloaded states stay where they are; they have arrived, as the choice synchronised. It may be called again with
        fewer positions.
        """
        wanted = set(positions)
        self._places = {key: place for key, place in self._places.items() if key[0] in wanted}
        for number, states in enumerate(self._states):
            rows = sorted(place.row for place in self._places.values() if place.micro_batch == number)
            before = self._rows[number]
            if states and states[0].is_pinned():
                continue  # what is copied from pinned memory alone is copied beside the computation
            self._rows[number] = {row: index for index, row in enumerate(rows)}
            if states:
                index = to_device(torch.tensor([before[row] for row in rows], dtype=torch.int64), states[0].device)
                states[:] = [state[index] for state in states]

    def has(self, positions: Sequence[int]) -> bool:
        """Return whether a micro-batch of these positions can be replayed here."""
        return len(positions) > 0 and all((position, 0) in self._places for position in positions)

    @contextmanager
    def replaying(self, positions: Sequence[int]) -> Iterator[None]:
        """Start the forward and backward of one micro-batch of these positions from the stored states.

        Args:
            positions: position in the large batch of every row of the training micro-batch.
        """
        saved = [layer.__dict__.get("_gradient_checkpointing_func") for layer in self._layers]
        last_setting = self._last.__dict__.get("gradient_checkpointing")
        parts: list[_Part] = []

        def parts_on(device: torch.device) -> list[_Part]:
            if not parts:
                parts.extend(self._parts(positions, device))
            return parts

        def drop(module: nn.Dropout, hidden: Tensor) -> Tensor:
            return hidden * self._mask_of(parts_on(hidden.device), module, hidden)

        try:
            for number, layer in enumerate(self._layers):
                ordinary = layer._gradient_checkpointing_func
                layer.__dict__["_gradient_checkpointing_func"] = self._replay_of(number, parts_on, ordinary)
            self._last.__dict__["gradient_checkpointing"] = False  # its recomputation would cost a forward
            with patched_forwards({module: _bind(drop, module) for module in self._dropouts}):
                yield
        finally:
            for layer, function in zip(self._layers, saved, strict=True):
                _restore(layer, "_gradient_checkpointing_func", function)
            _restore(self._last, "gradient_checkpointing", last_setting)

    def _parts(self, positions: Sequence[int], device: torch.device) -> list[_Part]:
        """Return where the rows of a training micro-batch are, by micro-batch of the probe."""
        places = [self._places[key] for key in _keys(positions)]
        parts = []
        for number in sorted({place.micro_batch for place in places}):
            own = [(row, place) for row, place in enumerate(places) if place.micro_batch == number]
            stored = [self._rows[number][place.row] for _, place in own]
            table = torch.tensor([[row for row, _ in own], [place.row for _, place in own], stored], dtype=torch.int64)
            rows, probed, kept = to_device(table, device)
            parts.append(_Part(number, rows, probed, kept, [(row, place.length) for row, place in own], stored))
        return parts

    def _replay_of(
        self, number: int, parts_on: Callable[[torch.device], list[_Part]], ordinary: Any
    ) -> Callable[..., Any]:
        def replay(run: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
            if _require_gradients((args, getattr(run, "keywords", {}))):  # as Gemma 4's embeddings for every layer do
                return ordinary(run, hidden, *args)
            output = self._assemble(number, parts_on(hidden.device), hidden)
            if self._attach is None:
                self._attach = torch.zeros(1, device=hidden.device, requires_grad=True)
            replayed = _Replayed.apply(hidden, self._attach, output, lambda states: run(states, *args))
            return (replayed, *[None] * (self._num_outputs - 1)) if self._num_outputs else replayed

        return replay

    def _assemble(self, number: int, parts: Sequence[_Part], like: Tensor) -> Tensor:
        """Assemble one layer's stored output for a training micro-batch, `[batch, length, hidden]`.

        At padding it is what the probe had at its padding, or zero: both finite, and no position looks at them.
        """
        output = like.new_zeros(like.shape)
        for part in parts:
            state = self._states[part.micro_batch][number]
            if state.device != like.device:
                for (row, length), stored in zip(part.lengths, part.stored_rows, strict=True):
                    output[row, :length].copy_(state[stored, :length], non_blocking=True)
                continue
            length = min(state.shape[1], like.shape[1])
            output[part.rows, :length] = state[part.stored, :length]
        return output

    def _put_away(self, hidden: Tensor) -> Tensor:
        if not self._offload or hidden.device.type == "cpu":
            return hidden
        host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return host.copy_(hidden, non_blocking=True)

    def _mask(self, micro_batch: int, module: nn.Dropout, like: Tensor) -> Tensor:
        """Draw the scaled dropout mask of a probe micro-batch, from seed, step, micro-batch and module alone."""
        number, probability = self._dropouts[module]
        rows, length = self._shapes[micro_batch] if micro_batch < len(self._shapes) else like.shape[:2]
        generator = private_generator(self._seed, "dropout", self._step, micro_batch, number, device=like.device)
        drawn = torch.rand(rows, length, like.shape[-1], generator=generator, device=like.device)
        return (drawn >= probability).to(like.dtype) / (1.0 - probability)

    def _mask_of(self, parts: Sequence[_Part], module: nn.Dropout, like: Tensor) -> Tensor:
        """Return the same masks for the rows of a training micro-batch; ones beyond the probe's length."""
        mask = torch.ones_like(like)
        for part in parts:
            whole = self._mask(part.micro_batch, module, like)
            length = min(whole.shape[1], like.shape[1])
            mask[part.rows, :length] = whole[part.probed, :length]
        return mask


def _require_gradients(values: Any) -> bool:
    """Return whether any tensor of a nested structure requires a gradient."""
    if isinstance(values, Tensor):
        return values.requires_grad
    if isinstance(values, (tuple, list)):
        return any(_require_gradients(each) for each in values)
    return isinstance(values, dict) and _require_gradients(list(values.values()))


def _keys(positions: Sequence[int]) -> list[_Row]:
    """Return keys of a micro-batch's rows from the position of each."""
    seen: dict[int, int] = {}
    keys = []
    for position in positions:
        seen[position] = seen.get(position, -1) + 1
        keys.append((position, seen[position]))
    return keys


def _bind(drop: Callable[[nn.Dropout, Tensor], Tensor], module: nn.Dropout) -> Callable[[Tensor], Tensor]:
    return lambda hidden: drop(module, hidden)


def _restore(module: nn.Module, name: str, value: Any) -> None:
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


def choose_replay(
    config: CoLMSection, architecture: Architecture, num_tokens: float, device: torch.device
) -> tuple[ReplayStore | None, str | None]:
    """Return the store for forward replay, or None and the reason why `replay: auto` is off, if it is.

    Args:
        config: the `"colm"` section.
        architecture: parts of the model.
        num_tokens: approximate tokens of a rank's share of a large batch.
        device: device for the states.

    Raises:
        ConfigError: if replay is requested but impossible.
    """
    if config.replay == "off":
        return None, None
    offload = config.replay == "offload"
    reason = why_not_replay(architecture)
    if config.packing != "off":
        reason = "training packs examples into rows (colm.packing)"
    if config.probe.dtype != "auto":
        reason = "the probe computes in another dtype than training (colm.probe.dtype)"
    if reason is None and not offload:
        size = float_dtype(architecture.last_layer).itemsize
        needed = (len(architecture.layers) - 1) * num_tokens * architecture.hidden_size * size
        free = free_bytes(device)
        if needed > free / 2 and config.replay == "auto":
            reason = f"it needs about {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB are free"
    if reason is None:
        return ReplayStore(architecture, offload=offload, seed=config.seed), None
    if config.replay != "auto":
        raise ConfigError(f'colm.replay = {config.replay!r}: {reason}. Change that, or write "auto" or "off".')
    return None, reason
