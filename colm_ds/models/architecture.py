"""Find the last decoder layer, the matrices probed in it, the final norm and the head of a Hugging Face causal LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from colm_ds.errors import ProbeError
from colm_ds.models.families import FAMILIES, Family

LAYERS = ("v_proj", "qkv", "fc")
"""Parts of the last layer that can be probed: V, all of Q, K and V, or the MLP's output projection."""


@dataclass(frozen=True)
class ProbeTarget:
    """A linear map whose gradient is part of the signal: rows `start` to `stop` of a module's output.

    Attributes:
        name: the module's name in the model.
        module: a linear module; under LoRA the projection's `lora_B`.
        start: first output row.
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
        """Entries of the probed matrix."""
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
        targets: where the signal is read; its gradient is theirs, flattened and concatenated.
        hidden_size: width of the hidden states.
        vocabulary_size: rows of the head.
    """

    family: Family
    model: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    targets: tuple[ProbeTarget, ...]
    hidden_size: int
    vocabulary_size: int

    @property
    def last_layer(self) -> nn.Module:
        """The last decoder layer."""
        return self.layers[-1]

    @property
    def num_coordinates(self) -> int:
        """d, the length of the signal's gradient."""
        return sum(target.num_coordinates for target in self.targets)


def find_architecture(model: nn.Module, layer: str = "v_proj") -> Architecture:
    """Describe a causal LM, bare or under PEFT LoRA.

    Args:
        model: a Hugging Face causal LM of a known family or a `PeftModel` around one; not a DeepSpeed engine.
        layer: one of `LAYERS`.

    Raises:
        ProbeError: if the family is unknown or a part is missing or of a kind that the probe cannot handle.
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
        targets=tuple(_find_targets(model, layers[-1], family, config, layer)),
        hidden_size=int(config.hidden_size),
        vocabulary_size=int(head.out_features),
    )


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a `PeftModel`; other models as they are."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _find_targets(model: nn.Module, last: nn.Module, family: Family, config: Any, layer: str) -> list[ProbeTarget]:
    if layer == "fc":
        parts = [("mlp", family.output_projection)]
    elif layer == "qkv" and not family.fused:
        parts = [("self_attn", name) for name in ("q_proj", "k_proj", family.value_projection)]
    else:
        parts = [("self_attn", family.value_projection)]
    has_lora = any(hasattr(module, "lora_B") for module in model.modules())
    return [_find_target(model, last, place, name, family, config, layer, has_lora) for place, name in parts]


def _find_target(
    model: nn.Module, last: nn.Module, place: str, name: str, family: Family, config: Any, layer: str, has_lora: bool
) -> ProbeTarget:
    projection = getattr(getattr(last, place, None), name, None)
    if projection is None:
        raise ProbeError(f"{type(last).__name__} has no {place}.{name}; the probe of {layer!r} reads it.")
    is_adapted = hasattr(projection, "lora_B")
    if has_lora and not is_adapted and layer != "v_proj":
        raise ProbeError(
            f"probe.layer = {layer!r}: {name} of the last layer has no LoRA adapter, so its gradient is of weights "
            f"that are not trained. Add {name} to lora.targets, or probe 'v_proj'."
        )
    total = int(projection.out_features)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    start = total - config.num_key_value_heads * head_size if family.fused and layer == "v_proj" else 0
    module = _lora_b(projection, name) if is_adapted else projection
    full_name = next((known for known, candidate in model.named_modules() if candidate is module), name)
    return ProbeTarget(full_name, module, start, total, int(module.in_features))


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
