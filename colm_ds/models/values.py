"""Find the V projection of a decoder layer by its structure: separate, fused in any layout, or latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from colm_ds.errors import ProbeError

_SEPARATE = ("v_proj", "value", "value_proj", "v_lin", "wv", "w_v", "to_v", "v")
"""Names of a projection that computes values alone."""

_LATENT = ("kv_b_proj",)
"""Names of the projection that expands a latent vector to keys without position and values, head by head."""

_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "att_proj", "qkv", "kv_proj")
"""Names of a projection that computes values together with keys, or with queries and keys."""

_QUERIES_KEYS = {
    "v_proj": ("q_proj", "k_proj"),
    "value": ("query", "key"),
    "value_proj": ("query_proj", "key_proj"),
    "v_lin": ("q_lin", "k_lin"),
    "wv": ("wq", "wk"),
    "w_v": ("w_q", "w_k"),
    "to_v": ("to_q", "to_k"),
    "v": ("q", "k"),
}
"""Names of the queries' and keys' projections beside those of the values."""

_OUTPUT = ("o_proj", "c_proj", "out_proj", "dense", "wo", "to_out")
"""Names of the attention's output projection."""

_MLP_OUTPUT = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "wo", "output_linear")
"""Names of the MLP's output projection."""


class ValueRows(NamedTuple):
    """ValueRows `start` to `stop` of every one of `groups` parts of equal size."""

    start: int
    stop: int
    groups: int


@dataclass(frozen=True)
class Values:
    """The V projection of a layer.

    Attributes:
        attention: the module that owns it.
        name: its name there.
        projection: a linear module, perhaps under LoRA.
        rows: which of its output rows are values.
        layout: in a few words.
    """

    attention: nn.Module
    name: str
    projection: nn.Module
    rows: ValueRows
    layout: str

    def queries_keys_values(self) -> list[tuple[str, nn.Module]]:
        """Return the projections of queries, keys and values with their names; a fused one once.

        Raises:
            ProbeError: if there are no such matrices, as in latent attention.
        """
        if self.name in _FUSED and self.name != "kv_proj":
            return [(self.name, self.projection)]
        names = [*_QUERIES_KEYS.get(self.name, ()), self.name]
        parts = [(name, getattr(self.attention, name, None)) for name in names]
        if self.name not in _QUERIES_KEYS or not all(isinstance(module, nn.Module) for _, module in parts):
            raise ProbeError(
                f"{type(self.attention).__name__} has no projections of queries and keys beside {self.name}; the probe "
                "of 'qkv' reads them. Probe 'v_proj'."
            )
        return [(name, module) for name, module in parts if module is not None]


def find_values(layer: nn.Module, config: Any) -> Values | None:
    """Return the V projection of a decoder layer; None if it has no attention over its own tokens.

    Args:
        layer: the layer.
        config: configuration of the text model.
    """
    for names in (_SEPARATE, _LATENT, _FUSED):
        for attention, name, projection in _children(layer, names):
            if names is _SEPARATE:
                return Values(attention, name, projection, ValueRows(0, out_features(projection), 1), "separate")
            return Values(attention, name, projection, *_rows(attention, name, projection, config))
    return None


def output_projection(last: nn.Module, values: Values) -> tuple[str, nn.Module]:
    """Return the output projection of a layer's MLP with its name.

    Args:
        last: the layer.
        values: its V projection, whose attention is left out.

    Raises:
        ProbeError: if there is none, or several as among experts.
    """
    within = {id(module) for module in values.attention.modules()}
    parts = [
        (name, module) for owner, name, module in _children(last, _MLP_OUTPUT) if id(module) not in within and owner
    ]
    mlp = active_module(getattr(last, "mlp", None))
    if isinstance(mlp, nn.Module):
        parts = [(name, module) for owner, name, module in _children(last, _MLP_OUTPUT) if owner is mlp]
    if len(parts) != 1:
        wanted = next((name for name in _MLP_OUTPUT if parts and name == parts[0][0]), "down_proj")
        what = f"{len(parts)} modules like mlp.{wanted}" if parts else f"no mlp.{wanted}"
        raise ProbeError(f"{type(last).__name__} has {what}; the probe of 'fc' reads it. Probe 'v_proj'.")
    return parts[0]


def in_features(module: Any) -> int:
    """Return the width of a linear module's input."""
    return int(module.weight.shape[0] if is_conv1d(module) else module.in_features)


def out_features(module: Any) -> int:
    """Return the width of a linear module's output."""
    return int(module.nf if is_conv1d(module) else module.out_features)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`, whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map: `nn.Linear`, transformers' `Conv1D`, or one of these under LoRA."""
    inside = module.base_layer if hasattr(module, "lora_B") else module
    assert isinstance(inside, nn.Module)
    return isinstance(inside, nn.Linear) or is_conv1d(inside)


_NOT_WITHIN = ("cross", "encoder_attn", "lora_", "expert", "indexer", "compressor")
"""Parts of the paths of modules that are not a layer's own attention."""


def active_module(module: Any) -> Any:
    """Return the copy that is trained of a module in PEFT's `modules_to_save`; others as they are."""
    copies = getattr(module, "modules_to_save", None)
    return copies[module.active_adapters[0]] if isinstance(copies, nn.ModuleDict) and len(copies) else module


def _children(layer: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield linear modules of these names with their owners, outermost first; not those of cross-attention."""
    for path, owner in layer.named_modules():
        if any(word in path.lower() for word in _NOT_WITHIN):
            continue
        for name in names:
            module = active_module(getattr(owner, name, None))
            if isinstance(module, nn.Module) and is_linear(module):
                yield owner, name, module


def _rows(attention: Any, name: str, projection: nn.Module, config: Any) -> tuple[ValueRows, str]:
    """Return which rows of a fused projection are values, and the layout's name."""
    total, heads = out_features(projection), int(config.num_attention_heads)
    if name in _LATENT:
        size = int(getattr(attention, "v_head_dim", 0) or config.v_head_dim)
        per_head = total // heads
        return ValueRows(per_head - size, per_head, heads), "latent, keys and values by head"
    if name == "kv_proj" and total == getattr(attention, "head_dim", None):
        return ValueRows(0, total, 1), "one vector, key and value"
    if name == "kv_proj":
        return ValueRows(total // 2, total, 1), "keys | values"
    if type(attention).__name__.startswith("CodeGen"):
        blocks = 4  # of the TPU cores that it was trained on: queries | values | keys in each
        size = total // blocks // 3
        return ValueRows(size, 2 * size, blocks), "fused, by block"
    if getattr(attention, "new_decoder_architecture", False):  # Falcon 40B: groups of queries with a key and a value
        groups = int(attention.num_kv_heads)
        per_group = total // groups
        return ValueRows(per_group - int(attention.head_dim), per_group, groups), "fused, by key-value head"
    multi_query = getattr(attention, "multi_query", None)
    by_head = name == "query_key_value" if multi_query is None else not multi_query
    if by_head:
        return ValueRows(2 * (total // heads) // 3, total // heads, heads), "fused, by head"
    output = next((getattr(attention, each) for each in _OUTPUT if hasattr(attention, each)), None)
    width = int(config.hidden_size) if output is None else in_features(getattr(output, "base_layer", output))
    return ValueRows(total - (total - width) // 2, total, 1), "fused, queries | keys | values"
