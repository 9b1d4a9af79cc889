"""Find the decoder layers, the matrices probed in the last one, and the head of a Hugging Face causal LM."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.errors import ProbeError
from colm_ds.models.dora import OutputHook, hooked
from colm_ds.models.families import FAMILIES
from colm_ds.models.quantized import float_weight
from colm_ds.models.values import (
    ValueRows,
    Values,
    find_values,
    in_features,
    is_conv1d,
    is_linear,
    out_features,
    output_projection,
)

LAYERS = ("v_proj", "qkv", "fc")
"""Parts of the last layer that can be probed: V, all of Q, K and V, or the MLP's output projection."""

WITHOUT_PROBE = "or a selector without a probe of the model (tokens, random, keep_random, full)"
"""What every model can be trained with."""


@dataclass(frozen=True)
class ProbeTarget:
    """A linear map whose gradient is part of the signal: some rows of a module's output.

    A projection that also computes queries and keys is divided into `groups` of equal size, one for a head where heads
    are interleaved; of each group rows `start` to `stop` are the values.

    Attributes:
        name: the module's name in the model.
        module: a linear module; under LoRA the projection's `lora_B`.
        start: first output row, within a group.
        stop: one past the last.
        in_features: width of the module's input.
        groups: parts of equal size that the output is divided into.
        norm: under DoRA, what computes the norm of the adapted weight by passing the identity through the module.
    """

    name: str
    module: nn.Module
    start: int
    stop: int
    in_features: int
    groups: int = 1
    norm: nn.Module | None = None

    @property
    def out_features(self) -> int:
        """ValueRows of the probed matrix."""
        return (self.stop - self.start) * self.groups

    @property
    def num_coordinates(self) -> int:
        """Entries of the probed matrix."""
        return self.out_features * self.in_features

    def rows_of(self, output: Tensor) -> Tensor:
        """Return the probed rows of the module's output, `[..., total]` to `[..., out]`."""
        if self.groups == 1:
            return output[..., self.start : self.stop]
        return output.unflatten(-1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)

    def with_rows(self, output: Tensor, rows: Tensor) -> Tensor:
        """Return the module's output with other probed rows; the rest is detached."""
        if rows.shape[-1] == output.shape[-1]:
            return rows
        grouped = output.detach().unflatten(-1, (self.groups, -1))
        parts = grouped[..., : self.start], rows.unflatten(-1, (self.groups, -1)), grouped[..., self.stop :]
        return torch.cat(parts, dim=-1).flatten(-2)

    def hooking(self, hook: OutputHook) -> AbstractContextManager[None]:
        """Call a forward hook for what passes through the module in the block; see `hooked`."""
        return hooked(self.module, hook, self.norm)

    def weight_rows(self) -> Tensor:
        """Return the probed rows of the module's weight, `[out, in]`; under ZeRO-3 while the module runs only."""
        weight = float_weight(self.module)
        if is_conv1d(self.module):
            return self.rows_of(weight).T
        return weight[self.start : self.stop] if self.groups == 1 else self.rows_of(weight.T).T


@dataclass(frozen=True)
class Architecture:
    """The parts of a causal LM that the probe works with.

    Attributes:
        model: the Hugging Face model, without PEFT around it.
        layers: decoder layers in order.
        norm: final norm, where the last layer is followed by it and the head alone; None where the model's own code is
            run from there on.
        head: maps hidden states to logits.
        mlp: part of the last layer that treats every position by itself and takes hidden states alone, or None.
        targets: where the signal is read; its gradient is theirs, flattened and concatenated.
        hidden_size: width of the hidden states.
        vocabulary_size: rows of the head.
        layout: how the last layer computes its values, in a few words.
    """

    model: nn.Module
    layers: nn.ModuleList
    norm: nn.Module | None
    head: nn.Module
    mlp: nn.Module | None
    targets: tuple[ProbeTarget, ...]
    hidden_size: int
    vocabulary_size: int
    layout: str

    @property
    def last_layer(self) -> nn.Module:
        """The last decoder layer."""
        return self.layers[-1]

    @property
    def model_type(self) -> str:
        """The model's type, for messages."""
        return _model_type(self.model)

    @property
    def num_coordinates(self) -> int:
        """d, the length of the signal's gradient."""
        return sum(target.num_coordinates for target in self.targets)


def find_architecture(model: nn.Module, layer: str = "v_proj") -> Architecture:
    """Describe a causal LM, bare or under PEFT LoRA, by its structure.

    Args:
        model: a Hugging Face causal LM or a `PeftModel` around one; not a DeepSpeed engine.
        layer: one of `LAYERS`.

    Raises:
        ProbeError: if a part is missing or of a kind that the probe cannot handle.
    """
    base: Any = unwrap(model)
    config = getattr(base, "config", None)
    layers, head = decoder_layers(base), find_head(base)
    if config is None or layers is None or head is None:
        raise ProbeError(
            f"{type(base).__name__}, model of type {_model_type(base)!r}: no decoder layers or head with logits. Give "
            f"a causal language model (AutoModelForCausalLM), not a bare decoder or a classifier, {WITHOUT_PROBE}."
        )
    family = FAMILIES.get(_model_type(base))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = find_values(layers[-1], text)
    if values is None:
        raise ProbeError(
            f"model of type {_model_type(base)!r}: its last layer, {type(layers[-1]).__name__}, has no attention with "
            f"a V projection, which the probe reads. Choose another model, {WITHOUT_PROBE}."
        )
    return Architecture(
        model=base,
        layers=layers,
        norm=None if family is None else getattr(base.model, family.norm),
        head=head,
        mlp=_pointwise_mlp(layers[-1]),
        targets=tuple(_find_targets(model, layers[-1], values, layer)),
        hidden_size=int(text.hidden_size),
        vocabulary_size=int(head.weight.shape[0] if not hasattr(head, "out_features") else head.out_features),
        layout=values.layout,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a `PeftModel`; other models as they are."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def attention_projections(model: nn.Module) -> list[str]:
    """Return the names of the linear modules in the decoder layers' attention, for LoRA; empty if there are none.

    Args:
        model: a Hugging Face causal LM.
    """
    layers = decoder_layers(unwrap(model)) or nn.ModuleList()
    names: dict[str, None] = {}
    for layer in layers:
        values = find_values(layer, model.config)
        attention = nn.Module() if values is None else values.attention
        names |= {name.rsplit(".", 1)[-1]: None for name, module in attention.named_modules() if is_linear(module)}
    return [name for name in names if not name.isdigit()]


def _model_type(base: Any) -> str:
    return str(getattr(getattr(base, "config", None), "model_type", type(base).__name__))


def find_head(base: Any) -> Any:
    """Return the module that maps hidden states to logits; None if the model has none."""
    get = getattr(base, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def find_embeddings(model: Any) -> Any:
    """Return the module that maps token ids to vectors; None if the model names none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def embedding_weight(model: Any) -> Tensor | None:
    """Return the weight of a model's input embeddings, partitioned or whole; None if it does not name one."""
    weight = getattr(find_embeddings(model), "weight", None)
    return weight if (isinstance(weight, Tensor) and weight.dim() == 2) or hasattr(weight, "ds_id") else None


def num_embeddings(model: Any) -> int | None:
    """Return the number of token ids that a model has embeddings for; None if it does not say."""
    weight = embedding_weight(model)
    return None if weight is None else int(getattr(weight, "ds_shape", weight.shape)[0])


def decoder_layers(base: Any) -> nn.ModuleList | None:
    """Return the decoder's layers: of the lists that are least deep in it the longest; None if there is none."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    decoder = decoder if isinstance(decoder, nn.Module) else base
    for within in (decoder, base):  # what is called a decoder may be a part of the head
        lists = [
            (name.count("."), -len(module), module)
            for name, module in within.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) > 0 and any(True for _ in module[-1].children())
        ]
        if lists:
            return min(lists, key=lambda each: each[:2])[2]
    return None


def _pointwise_mlp(last: nn.Module) -> nn.Module | None:
    """Return the MLP if it is made of linear maps and activations and takes hidden states alone."""
    mlp = getattr(last, "mlp", None)
    if not isinstance(mlp, nn.Module):
        return None
    leaves = [module for module in mlp.modules() if any(True for _ in module.parameters(recurse=False))]
    inputs = [each for each in inspect.signature(type(mlp).forward).parameters.values() if each.name != "self"]
    is_plain = all(is_linear(module) for module in leaves) and not any(
        isinstance(module, nn.ModuleList) for module in mlp.modules()
    )
    return mlp if is_plain and len(inputs) == 1 else None


def _find_targets(model: nn.Module, last: nn.Module, values: Values, layer: str) -> list[ProbeTarget]:
    has_lora = any(hasattr(module, "lora_B") for module in model.modules())
    if layer == "fc":
        name, module = output_projection(last, values)
        return [_find_target(model, name, module, layer, has_lora)]
    if layer == "v_proj":
        rows = values.rows
        return [_find_target(model, values.name, values.projection, layer, has_lora, rows)]
    return [_find_target(model, name, module, layer, has_lora) for name, module in values.queries_keys_values()]


def _find_target(
    model: nn.Module, name: str, projection: Any, layer: str, has_lora: bool, rows: ValueRows | None = None
) -> ProbeTarget:
    is_adapted = hasattr(projection, "lora_B")
    if has_lora and not is_adapted and layer != "v_proj":
        raise ProbeError(
            f"probe.layer = {layer!r}: {name} of the last layer has no LoRA adapter, so its gradient is of weights "
            f"that are not trained. Add {name} to lora.targets (and the last layer to layers_to_transform), or probe "
            "'v_proj'."
        )
    start, stop, groups = rows or ValueRows(0, out_features(projection), 1)
    module = _lora_b(projection, name) if is_adapted else projection
    if not is_linear(module):
        raise ProbeError(f"{name} of the last layer is a {type(module).__name__}; the probe reads linear modules only.")
    full_name = next((known for known, candidate in model.named_modules() if candidate is module), name)
    norms = getattr(projection, "lora_magnitude_vector", None) if is_adapted else None
    norm = norms[projection.active_adapters[0]] if norms else None
    return ProbeTarget(full_name, module, start, stop, in_features(module), groups, norm)


def _lora_b(projection: Any, name: str) -> Any:
    active = [adapter for adapter in projection.active_adapters if adapter in projection.lora_B]
    if len(active) != 1 or projection.merged or projection.disable_adapters:
        raise ProbeError(
            f"{name} of the last layer: {len(active)} active LoRA adapters (merged: {projection.merged}, disabled: "
            f"{projection.disable_adapters}). Train with exactly one active, unmerged adapter."
        )
    module = projection.lora_B[active[0]]
    variant = type(getattr(projection, "lora_variant", {}).get(active[0])).__name__
    if variant not in ("NoneType", "DoraLinearVariant") or not isinstance(module, nn.Module):
        raise ProbeError(
            f"{name} of the last layer is adapted by a variant of LoRA that the probe does not know "
            f"({variant if variant != 'NoneType' else type(projection).__name__}). Use LoRA, rsLoRA or DoRA, "
            f"{WITHOUT_PROBE}."
        )
    return module
