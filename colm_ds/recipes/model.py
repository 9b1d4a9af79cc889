"""Load a tokenizer and build a model from their sections: weights, LoRA, precision."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colm_ds.data.hub import why_not_there
from colm_ds.errors import CoLMError, ConfigError, Problems
from colm_ds.models.architecture import attention_projections, decoder_layers
from colm_ds.models.families import FAMILIES, read_tokenizer, set_pad_token
from colm_ds.models.model_fit import add_head_problems
from colm_ds.models.quantized import fused_experts, keep_trainable, quantize_experts
from colm_ds.recipes.adapter import ADAPTER_CONFIG, load_adapter
from colm_ds.recipes.packages import WHAT_TO_WRITE, is_hub_name
from colm_ds.recipes.sections import LoraConfig, ModelConfig

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(model: ModelConfig, place: str | None = None) -> Any:
    """Load a tokenizer and give it a token to pad with.

    Args:
        model: the model that it is for.
        place: folder or hub name of the tokenizer; default: the model's own.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    path = place or model.name_or_path
    if path and not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/"))):
        raise ConfigError(f"tokenizer {path!r}: no such folder. Name one with tokenizer.json or tokenizer.model.")
    gguf = {"gguf_file": model.gguf_file} if model.gguf_file and path == model.name_or_path else {}
    _check_hub(path)
    try:
        tokenizer = read_tokenizer(str(path), **gguf)
    except Exception as error:  # whatever a library makes of a broken file
        raise ConfigError(
            f"tokenizer {path!r} cannot be loaded: {_first_sentence(error)} "
            "Name a folder with tokenizer.json or tokenizer.model, or a hub name."
        ) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {path!r} has no eos token. Choose one that has: examples end with it.")
    set_pad_token(tokenizer)
    return tokenizer


def load_model(model: ModelConfig, lora: LoraConfig | None, tokenizer: Any, *, fresh: bool = False) -> nn.Module:
    """Load a model, or build it with random weights that follow the global seed; add LoRA and activation checkpointing.

    Args:
        model: where its weights or its configuration are.
        lora: adapters to put on it; None for none.
        tokenizer: its length is the vocabulary's, where the configuration says none.
        fresh: leave out the weights of the adapter that `lora.adapter` names, as others will take their place.

    Raises:
        ConfigError: if the model cannot be loaded or LoRA cannot be applied.
        CheckpointError: if the adapter to start from does not fit.
    """
    loaded = _base_model(model, tokenizer)
    if lora is not None:
        loaded = add_lora(loaded, lora)
        if lora.adapter is not None and not fresh:
            load_adapter(loaded, lora.adapter)
    if model.activation_checkpointing:
        enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return loaded


def precision_sections(dtype: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return DeepSpeed's sections for training in this precision; of its own all that a configuration says is kept.

    Args:
        dtype: of the recipe.
        given: the DeepSpeed configuration.
        where: its name in messages.

    Raises:
        ConfigError: if it asks for another precision.
    """
    sections = {}
    for key, wanted in (("bf16", "bfloat16"), ("fp16", "float16")):
        own = given.get(key, {})
        if not isinstance(own, Mapping):
            continue  # which is refused with all else that is wrong there
        if own.get("enabled") is True and dtype != wanted:
            raise ConfigError(
                f"{where}: {key}.enabled is true, but the recipe trains in {dtype}. Write model.dtype: {wanted} in the "
                "recipe, or false here."
            )
        kept = {name: value for name, value in own.items() if value != "auto"} if dtype == wanted else {}
        sections[key] = {**kept, "enabled": dtype == wanted}
    return sections


def _base_model(config: ModelConfig, tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    try:
        if config.config is not None:
            values = dict(config.config)
            multiple = config.vocabulary_multiple
            values.setdefault("vocab_size", -(-len(tokenizer) // multiple) * multiple)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            values = {**ids, "pad_token_id": tokenizer.pad_token_id, **values}
            _check_config(config.config)
            made = AutoConfig.for_model(values.pop("model_type"), **values)
            _check_kind(made, "model.config.model_type")
            _check_heads(made)
            options["attn_implementation"] = attention_for(made, config.attention)
            return AutoModelForCausalLM.from_config(made, **options)
        gguf = {"gguf_file": config.gguf_file} if config.gguf_file else {}
        path = str(config.name_or_path)
        _check_hub(path)
        if gguf and not (Path(path) / str(config.gguf_file)).is_file():
            raise ConfigError(f"model.gguf_file = {config.gguf_file!r}: no such file in {path}.")
        if (Path(path) / ADAPTER_CONFIG).is_file():
            raise _is_adapter(path)
        described = AutoConfig.from_pretrained(path, **gguf)
        _check_kind(described, f"model.name_or_path = {path}: model_type")
        options["attn_implementation"] = attention_for(described, config.attention)
        if config.quantization is not None:
            options["quantization_config"] = _quantization(config, described)
            if any(getattr(described.get_text_config(), name, None) for name in _EXPERTS):
                options["device_map"] = {"": "cpu"}  # on a device the experts would take four times their room at first
        with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():  # a bar per rank
            model, report = AutoModelForCausalLM.from_pretrained(
                path, **gguf, **options, output_loading_info=True, ignore_mismatched_sizes=True
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise _is_adapter(path)
        check_loaded(path, model, report)
        keep_trainable(model)
        if config.quantization is not None:
            _quantize_experts(config, model)
        if gguf and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights are plain now; a saved copy must load as such
        return model
    except CoLMError:
        raise
    except Exception as error:  # whatever a library makes of a broken file, a pickle that it refuses included
        if config.config is not None:
            kind = config.config.get("model_type")
            raise ConfigError(
                f"model.config of type {kind!r} cannot be built: {_first_sentence(error)} Correct its keys, which are "
                "those of the type's configuration in transformers."
            ) from None
        raise ConfigError(
            f"model {config.name_or_path} cannot be built: {_first_sentence(error)} "
            "Name a whole model folder or a hub name; a file that was cut off must be fetched again."
        ) from None


def _check_hub(place: str | None) -> None:
    """Raise a ConfigError for a name of a hub that cannot be reached, instead of retrying for a minute."""
    if place and is_hub_name(place) and (why := why_not_there(place)):
        raise ConfigError(f"{place}: no folder here, {why}. {WHAT_TO_WRITE}")


def _check_config(values: Mapping[str, Any]) -> None:
    """Raise on keys of `model.config` that are nearly those of the configuration's class, which would ignore them."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(values["model_type"])
    problems = Problems("model.config")
    names = [*known.to_dict(), *known.attribute_map]
    for key in values:  # some keys of old files become others, and are no attributes: rope_theta, for example
        if key != "model_type" and not hasattr(known, key) and difflib.get_close_matches(key, names, 1, cutoff=0.85):
            problems.add_unknown(key, names)
    problems.raise_if_any()


def _check_kind(config: Any, key: str) -> None:
    """Raise unless transformers has a causal LM for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{key} = {config.model_type!r}: no causal LM, but an encoder or the like. Use a causal LM.")


def _check_heads(config: Any) -> None:
    """Raise if a model's heads divide neither its hidden size nor each other."""
    problems = Problems("model.config")
    add_head_problems(config, problems)
    problems.raise_if_any()


def _quantization(config: ModelConfig, described: Any) -> Any:
    """Return the settings of bitsandbytes for a model, by the classes of transformers."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization = {config.quantization!r}: bitsandbytes is not installed. "
            "Run pip install --no-deps bitsandbytes, or remove the key."
        )
    if getattr(described, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.quantization = {config.quantization!r}: the weights in {config.name_or_path} are quantized "
            "already. Remove the key."
        )
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
    )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of configurations that say how many experts a layer has."""


def _quantize_experts(config: ModelConfig, model: nn.Module) -> None:
    if config.quantization == "4bit":
        quantize_experts(model, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
    elif experts := fused_experts(model):
        owner, name = type(experts[0][0]).__name__, experts[0][1]
        raise ConfigError(
            f"model.quantization = '8bit': {name} of {owner} holds all experts in one tensor, which bitsandbytes "
            "keeps in 4 bits only. Write 4bit."
        )


def attention_for(config: Any, attention: str) -> str:
    """Return the attention implementation to load a model with: `eager` where `sdpa` cannot be had.

    That is where the model's class has no `sdpa`, and where scores are soft-capped, which `sdpa` does not do.

    Args:
        config: the model's configuration.
        attention: what the recipe asks for.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if attention != "sdpa":
        return attention
    text = config.get_text_config()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_capped = getattr(text, "attn_logit_softcapping", None) is not None
    if not is_capped and getattr(kind, "_supports_sdpa", True):
        return attention
    why = "soft-caps its attention" if is_capped else "has no sdpa attention"
    logger.info("attention: eager, as a model of type %r %s", config.model_type, why)
    return "eager"


def check_loaded(path: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise unless a model's weights are all from its files, all of these are in it, and they are finite numbers.

    Args:
        path: where they were loaded from.
        model: as it was loaded.
        report: what transformers says of the tensors that did not fit.

    Raises:
        ConfigError: listing the first of each kind.
    """
    problems = Problems(f"model {path}")
    kinds = {
        "missing_keys": "are missing in its files and would be random",
        "unexpected_keys": "in its files have no place in the model",
        "mismatched_keys": "have another shape in its files",
        "error_msgs": "could not be loaded",
    }
    for kind, what in kinds.items():
        keys = [key if isinstance(key, str) else str(key[0]) for key in report.get(kind) or ()]
        if keys:
            advice = "Name a folder whose tensors have this architecture's names"
            problems.messages.append(f"{len(keys)} tensors {what}: {_named(keys)}. {advice}.")
    broken = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if broken:
        advice = "Download the model again, or take an earlier checkpoint of it"
        problems.messages.append(f"{len(broken)} tensors hold numbers that are not finite: {_named(broken)}. {advice}.")
    problems.raise_if_any()


_SHOWN = 5
"""Tensors of each kind that a message names."""


def _named(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(sorted(keys)[:_SHOWN]) + rest


def _is_adapter(path: str) -> ConfigError:
    return ConfigError(
        f"model.name_or_path = {path}: a LoRA adapter, not a model. To train it further name its base here and this "
        "folder in lora.adapter. To add a new one instead merge it first (`colm-ds export RUN --merge`, or PEFT's "
        "merge_and_unload) and name the merged folder here."
    )


def add_lora(model: Any, config: LoraConfig) -> nn.Module:
    """Put LoRA adapters on a model's targets.

    Raises:
        ConfigError: listing names and layers of the section that are not in the model.
    """
    import peft

    model_type = model.config.model_type
    targets = lora_targets(model, config)
    if not targets and not config.target_parameters:
        raise ConfigError(
            f"lora.targets = 'auto': no attention with linear projections found in a model of type {model_type!r}. "
            "List the modules to adapt."
        )
    _check_names(model, config, targets)
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "layers_to_transform": config.layers_to_transform,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_parameters": config.target_parameters or None,
        "modules_to_save": config.modules_to_save or None,
    }
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**settings))
    except ValueError as error:
        raise ConfigError(f"lora.targets = {targets}: {_first_sentence(error)}") from None


def lora_targets(model: Any, config: LoraConfig) -> str | list[str]:
    """Return the modules to adapt as PEFT takes them: names, `all-linear`, or a regular expression."""
    if config.targets != "auto":
        return config.targets if isinstance(config.targets, str) else list(config.targets)
    family = FAMILIES.get(model.config.model_type)
    return list(family.lora_targets) if family is not None else attention_projections(model)


def _check_names(model: nn.Module, config: LoraConfig, targets: str | list[str]) -> None:
    """Raise for names of a `lora` section that PEFT would pass over in silence."""
    problems = Problems("the lora section")
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]

    def held(wanted: str, names: list[str]) -> bool:
        return any(name == wanted or name.endswith(f".{wanted}") for name in names)

    leaves = sorted({name.rsplit(".", 1)[-1] for name in modules if name and not name.rsplit(".", 1)[-1].isdigit()})
    has = f"A {type(model).__name__} has {', '.join(leaves)}."
    named = {"targets": targets if isinstance(targets, list) else [], "modules_to_save": config.modules_to_save}
    for key, wanted in named.items():
        for name in wanted:
            if not held(name, modules):
                problems.add(f"lora.{key}", name, "no module of this name is in the model", has)
    for name in config.target_parameters:
        if not held(name, parameters):
            fused = sorted({each.split(".", 3)[-1] for each in parameters if "experts." in each})
            advice = f"There are {', '.join(fused)}." if fused else "The model has no fused experts."
            problems.add("lora.target_parameters", name, "no parameter of this name is in the model", advice)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in [*modules, *parameters]):
                problems.add(f"lora.{key}", pattern, "matches no module", has)
    layers = decoder_layers(model)
    count = 0 if layers is None else len(layers)
    outside = [number for number in config.layers_to_transform or [] if not 0 <= number < count]
    if outside:
        advice = f"The model has {count}, from 0 to {count - 1}."
        problems.add("lora.layers_to_transform", config.layers_to_transform, f"no layers {outside}", advice)
    problems.raise_if_any()


def quiet_libraries() -> None:
    """Switch off progress bars and advice of libraries; warnings and errors stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for module in ("transformers", "torch.distributed", "peft"):  # advice to their own developers
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def _first_sentence(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own text is about its versions
        return "its weights are a pickle that holds something else than tensors, so nothing of it was loaded or run."
    first, *others = [line.strip() for line in str(error).strip().split("\n") if line.strip()] or [type(error).__name__]
    text = first
    for line in others:
        if not text.endswith((":", ",", " or", " and")):
            break
        text = f"{text} {line}"
    text = text.rstrip(",")
    return text if text[-1] in ".:?!" else f"{text}."
