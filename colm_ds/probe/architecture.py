"""Finds the last decoder layer, its V projection, the final norm and the head of a Hugging Face causal LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from colm_ds.errors import ProbeError
from colm_ds.families import FAMILIES, Family


@dataclass(frozen=True)
class ProbeTarget:
    """The linear map whose gradient is the signal: rows `start` to `stop` of a module's output.

    Attributes:
        name: the module's name in the model.
        module: a linear module; under LoRA the V projection's `lora_B`.
        start: first output row of the values.
        stop: one past the last.
        in_features: width of the module's input.
    """

    name: str
    module: nn.Module
    start: int
    stop: int
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of the probed matrix."""
        return self.stop - self.start

    @property
    def num_coordinates(self) -> int:
        """d, the length of the signal's gradient."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Architecture:
    """The parts of a causal LM that the probe works with.

    Attributes:
        family: facts about the model's type.
        model: the Hugging Face model, without PEFT around it.
        layers: decoder layers in order.
        norm: final norm.
        head: maps hidden states to logits.
        target: where the signal is read.
        hidden_size: width of the hidden states.
        vocabulary_size: rows of the head.
    """

    family: Family
    model: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    target: ProbeTarget
    hidden_size: int
    vocabulary_size: int

    @property
    def last_layer(self) -> nn.Module:
        """The last decoder layer."""
        return self.layers[-1]


def find_architecture(model: nn.Module) -> Architecture:
    """Describe a causal LM, bare or under PEFT LoRA.

    Args:
        model: a Hugging Face causal LM of a known family or a `PeftModel` around one; not a DeepSpeed engine.

    Raises:
        ProbeError: if the family is unknown or a part is missing or of a kind that the probe can not handle.
    """
    base: Any = _unwrap(model)
    config = getattr(base, "config", None)
    model_type = str(getattr(config, "model_type", type(base).__name__))
    if model_type not in FAMILIES:
        raise ProbeError(
            f"model of type {model_type!r}: the probe knows the families {', '.join(sorted(FAMILIES))}. "
            "Use one of these, or a selector without a probe (random, keep_random, full)."
        )
    family = FAMILIES[model_type]
    decoder = getattr(base, "model", None)
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, family.norm, None)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or norm is None or head is None:
        raise ProbeError(
            f"{type(base).__name__}: no decoder layers, final norm or head found. "
            "Give a causal language model (AutoModelForCausalLM), not a bare decoder or a classifier."
        )
    assert config is not None
    return Architecture(
        family=family,
        model=base,
        layers=layers,
        norm=norm,
        head=head,
        target=_find_target(model, layers[-1], family, config),
        hidden_size=int(config.hidden_size),
        vocabulary_size=int(head.out_features),
    )


def _unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a `PeftModel`; other models as they are."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _find_target(model: nn.Module, layer: nn.Module, family: Family, config: Any) -> ProbeTarget:
    attention = getattr(layer, "self_attn", None)
    projection = getattr(attention, family.value_projection, None)
    if projection is None:
        raise ProbeError(f"{type(layer).__name__} has no self_attn.{family.value_projection}; the probe reads it.")
    total = int(projection.out_features)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    start = total - config.num_key_value_heads * head_size if family.fused else 0
    module = _lora_b(projection, family.value_projection) if hasattr(projection, "lora_B") else projection
    name = next((name for name, candidate in model.named_modules() if candidate is module), family.value_projection)
    return ProbeTarget(name, module, start, total, int(module.in_features))


def _lora_b(projection: Any, name: str) -> Any:
    active = [adapter for adapter in projection.active_adapters if adapter in projection.lora_B]
    if len(active) != 1 or projection.merged or projection.disable_adapters:
        raise ProbeError(
            f"{name} of the last layer: {len(active)} active LoRA adapters (merged: {projection.merged}, disabled: "
            f"{projection.disable_adapters}). Train with exactly one active, unmerged adapter."
        )
    module = projection.lora_B[active[0]]
    if active[0] in getattr(projection, "lora_variant", {}) or not isinstance(module, nn.Module):
        raise ProbeError(f"{name} of the last layer uses a LoRA variant (DoRA, AdaLoRA or the like). Use plain LoRA.")
    return module
