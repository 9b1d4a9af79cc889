"""Start from a trained LoRA adapter: its settings as a recipe's `lora` section, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colm_ds.errors import CheckpointError, Problems
from colm_ds.run_folder.files import read_object

if TYPE_CHECKING:
    from torch import nn

ADAPTER_CONFIG = "adapter_config.json"

_KEYS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "layers_to_transform": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
}
"""Keys of PEFT's file, and what they are called in a recipe."""

_HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "layers_pattern"),
}
"""Further keys that training an adapter further does not depend on."""


def with_adapter(lora: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Return a `lora` section with the settings of the adapter that it names.

    Args:
        lora: the section as written; `dropout` may differ from the adapter's, every other key must agree with it.
        problems: collects what cannot be used.
    """
    folder = Path(str(lora["adapter"]))
    held = read_object(folder / ADAPTER_CONFIG)
    if not held:
        advice = "Name a folder that PEFT's save_pretrained or `colm-ds export` wrote."
        problems.add("lora.adapter", str(folder), f"no {ADAPTER_CONFIG} there", advice)
        return dict(lora)
    if held.get("peft_type") != "LORA":
        kind = held.get("peft_type")
        problems.add("lora.adapter", str(folder), f"an adapter of type {kind}", "Start from a LoRA adapter.")
        return dict(lora)
    settings = section_of(held)
    for key in sorted(held):
        if key not in _KEYS and key not in _HARMLESS and held[key] and (key, held[key]) != ("bias", "none"):
            why = f"its {key} is {held[key]!r}, which a lora section has no key for"
            problems.add("lora.adapter", str(folder), why, "Merge it into its base and name that model.")
    for key, value in lora.items():
        if key in settings and key != "dropout" and not _agree(value, settings[key]):
            fix = "Remove this key: the adapter decides it."
            problems.add(f"lora.{key}", value, f"the adapter in {folder} has {settings[key]!r}", fix)
    return {**settings, **lora}


def _agree(written: Any, held: Any) -> bool:
    return sorted(written) == sorted(held) if isinstance(written, list) and isinstance(held, list) else written == held


def section_of(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a `lora` section from PEFT's: those of its file, or of its `LoraConfig` as a mapping."""
    section = {ours: held[theirs] for theirs, ours in _KEYS.items() if held.get(theirs) is not None}
    for key in ("targets", "target_parameters", "modules_to_save"):
        if key in section and not isinstance(section[key], str):
            several = isinstance(section[key], (list, tuple, set, frozenset))
            section[key] = sorted(map(str, section[key])) if several else [str(section[key])]
    if isinstance(section.get("layers_to_transform"), int):
        section["layers_to_transform"] = [section["layers_to_transform"]]
    return section | ({} if "targets" in section else {"targets": []})


def load_adapter(model: Any, folder: str | Path) -> None:
    """Copy a trained adapter's weights into a model that has one of the same settings.

    Args:
        model: a `PeftModel` made from the settings in that folder.
        folder: the adapter's.

    Raises:
        CheckpointError: if they cannot be read, or tensors are missing, left over, of other shapes or not finite.
    """
    import peft
    from safetensors import SafetensorError

    try:
        weights = peft.load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"lora.adapter = {folder}: its weights cannot be read: {reason}") from None
    held = {name: list(value.shape) for name, value in weights.items()}
    frozen = any(".base_layer." in name for name in held)  # PEFT by itself adds embeddings that an adapter changes
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=frozen)
    wanted = {name: list(value.shape) for name, value in state.items()}
    advice = "Name the base model in model.name_or_path that the adapter was trained on."
    wrong = sorted(name for name in {*wanted, *held} if wanted.get(name) != held.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"lora.adapter = {folder}: {len(wrong)} of its tensors do not fit the model: {name} has shape "
            f"{held.get(name)} there and {wanted.get(name)} in the model (None: no such tensor). {advice}"
        )
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"lora.adapter = {folder}: {name} holds numbers that are not finite.")
    peft.set_peft_model_state_dict(model, weights)


def trained_names(model: nn.Module) -> dict[str, str]:
    """Return the names that PEFT's files have for a model's trained parameters, by the model's own names."""
    import peft

    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    saved = peft.get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
    places = {id(value): name for name, value in saved.items()}
    return {name: places[id(value)] for name, value in trained.items()}
