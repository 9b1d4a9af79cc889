"""Check what DeepSpeed itself leaves unchecked in its configuration: unknown top-level keys and "auto" values."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from colm_ds.config.section import must_be
from colm_ds.errors import Problems, nearest_key

MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
"""Sections that switch DeepSpeed's monitors on."""

_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}

KNOWN_KEYS = frozenset(
    {
        "colm",
        # Batches and the optimizer step
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("managed_gradient_accumulation", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor"),
        *("gradient_allreduce_op", "optimizer", "scheduler", "zero_allow_untested_optimizer"),
        *("zero_force_ds_cpu_optimizer", "dataloader_drop_last", "data_efficiency"),
        # Precision
        *("bf16", "bfloat16", "fp16", "torch_autocast", "data_types", "weight_quantization"),
        *("communication_data_type", "seq_parallel_communication_data_type"),
        # Memory and parallelism
        *("zero_optimization", "activation_checkpointing", "aio", "disable_allgather", "pipeline", "tensor_parallel"),
        *("expert_parallel", "use_data_before_expert_parallelism", "data_parallel_size", "sequence_parallel_size"),
        *("hybrid_engine", "compile", "vocabulary_size", "disable_python_gc"),
        # Checkpoints
        *("checkpoint", "datastates_ckpt"),
        # Logs, timers, profilers, tuning
        *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
        *MONITOR_SECTIONS,
        *("comms_logger", "flops_profiler", "autotuning"),
    }
)
"""Top-level keys that DeepSpeed 0.19.8 reads (it silently ignores all others), and ours."""

REMOVED_KEYS = frozenset(
    {
        *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting"),
        *("nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    }
)
"""Top-level keys of earlier versions: DeepSpeed 0.19.8 stops at the first of them."""

ADAM_DEFAULTS: Mapping[str, Any] = {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
"""Values of "auto" in `optimizer.params` of Adam and AdamW: the defaults of a recipe."""

# DeepSpeed takes "auto" literally in these sections (as true, or as a number that it then fails on). In its other
# sections "auto" means DeepSpeed's own default.
_LITERAL_SECTIONS = (
    *("optimizer", "scheduler", "activation_checkpointing", "aio", "checkpoint", "data_types"),
    *("flops_profiler", "torch_autocast"),
)
_DEEPSPEEDS_OWN_AUTO = ("data_types.keep_in_fp32_modules",)

# Keys whose DeepSpeed default may differ silently from what was asked for.
_CHOICES = {
    "zero_optimization.stage": "Write 0, 1, 2 or 3",
    "zero_optimization.offload_optimizer": 'Write {"device": "cpu"}, or remove it',
    "zero_optimization.offload_optimizer.device": 'Write "cpu", "nvme" or "none"',
    "zero_optimization.offload_param": 'Write {"device": "cpu"}, or remove it',
    "zero_optimization.offload_param.device": 'Write "cpu", "nvme" or "none"',
}
_ADVICE = {
    **_CHOICES,
    "data_types.grad_accum_dtype": 'Write "fp32", or null for the type of the model',
    "optimizer.type": 'Write "AdamW"',
    "scheduler.params.total_num_steps": "The length of the run is not known here: write the number of optimizer steps",
    "scheduler.params.warmup_max_lr": "There is no optimizer.params.lr to take it from: write the peak learning rate",
}


_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d{1,2}")


def check_keys(config: Mapping[str, Any], problems: Problems) -> None:
    """Record top-level keys that DeepSpeed would ignore, with the nearest known key, and keys that it has removed.

    Notes are left alone: `comment`, and keys that start with `_`, `//` or `#`.

    Args:
        config: the DeepSpeed configuration.
        problems: where they are recorded.
    """
    for key in map(str, config):
        if key in KNOWN_KEYS or _is_note(key):
            continue
        if key in REMOVED_KEYS:
            instead = "Use bf16 or fp16." if key == "amp" else "Remove it."
            problems.messages.append(f"{key}: removed from DeepSpeed (0.19.8 refuses it). {instead}")
            continue
        advice = nearest_key(key, KNOWN_KEYS)
        if not advice.startswith("Did you mean"):  # all sixty would bury the other problems
            advice = f"DeepSpeed would ignore it. Remove it, or write '_{key}' to keep it as a note."
        problems.messages.append(f"{key}: unknown key. {advice}")


def check_zero(config: Mapping[str, Any], problems: Problems) -> None:
    """Record values of `zero_optimization` that DeepSpeed's own section does not take.

    Args:
        config: the DeepSpeed configuration; "auto" values are left out.
        problems: where they are recorded.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {str(key): value for key, value in (config.get("zero_optimization") or {}).items() if value != "auto"}
    refused: set[str] = set()
    try:
        DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        for problem in error.errors():
            refused.add(str(problem["loc"][0]) if problem["loc"] else "")
            key = ".".join(map(str, ("zero_optimization", *problem["loc"])))
            why = must_be(problem)
            problems.add(key, problem["input"], why, "See DeepSpeed's documentation of the section.")
    for key, value in given.items():
        if key.endswith("bucket_size") and value == 0 and key not in refused:
            problems.add(f"zero_optimization.{key}", value, "a bucket holds nothing", "Choose 2e8, for example.")


def check_sections(config: Mapping[str, Any], problems: Problems, supplied: Collection[str] = ()) -> None:
    """Record values that DeepSpeed's own sections, its schedules and optimizers do not take.

    Nothing is recorded where something was before, which would be said twice.

    Args:
        config: the DeepSpeed configuration; "auto" values are left out.
        problems: where they are recorded.
        supplied: of `optimizer` and `scheduler` those that the caller gives: DeepSpeed does not read their sections.
    """
    if problems.messages:
        return
    given = {key: _without_auto(value) for key, value in config.items() if value != "auto" and not _is_note(str(key))}
    given = {key: value for key, value in given.items() if key not in _SIZES}
    if isinstance(given.get("aio"), dict):
        given["aio"] = {key: value for key, value in given["aio"].items() if key != "use_gds"}  # asks for this GPU
    if why := _refused_by_deepspeed(given):
        _blame(given, why, problems)
    for key, check in (("optimizer", _make_optimizer), ("scheduler", _make_scheduler)):
        section = given.get(key) or {}
        if key not in supplied and section.get("type") is not None:
            made = partial(check, section["type"], section.get("params"))
            if why := _first_line_of_error(made):
                problems.add(key, section, why, "Correct its type or params.")


_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "colm")
_READ_TOGETHER = ("zero_optimization", "bf16", "bfloat16", "fp16")


def _blame(given: Mapping[str, Any], why: str, problems: Problems) -> None:
    """Record the sections that DeepSpeed refuses, or its own words where it is not one of them alone."""
    advice = "See DeepSpeed's documentation of the section."
    together = {key: given[key] for key in _READ_TOGETHER if key in given}
    of_together = _refused_by_deepspeed(together)
    for key, value in together.items():
        if of_together and _refused_by_deepspeed({key: value}) == of_together:
            problems.add(key, value, of_together, advice)
    for key, value in given.items():
        others = {} if of_together else together
        if key not in together and (own := _refused_by_deepspeed({**others, key: value})):
            problems.add(key, value, own, advice)
    if not problems.messages:
        problems.messages.append(f"DeepSpeed: {of_together or why}. {advice}")


def _refused_by_deepspeed(config: Mapping[str, Any]) -> str:
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    def read() -> None:
        made = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **copy.deepcopy(config)})
        if made.grad_accum_dtype is not None:
            DtypeEnum(made.grad_accum_dtype)  # its engine reads this one later

    return _first_line_of_error(read)


def _make_optimizer(kind: Any, params: Any) -> None:
    """Make torch's optimizer of a name; what only DeepSpeed's own of that name take is left out.

    Which of them it takes depends on the device and on offload. The others of DeepSpeed are checked by name alone.
    """
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    params = dict(params or {})
    if "max_grad_norm" in params:
        raise ValueError("max_grad_norm is gradient_clipping in DeepSpeed's configuration")
    kinds = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad"}
    name = kinds.get(str(kind).lower())
    if name is None and str(kind).lower() in DEEPSPEED_OPTIMIZERS:
        return
    if name is not None:
        own = (DeepSpeedCPUAdagrad,) if name == "Adagrad" else (FusedAdam, DeepSpeedCPUAdam)
        accepted = {"torch_adam", "adam_w_mode"}.union(*(inspect.signature(each).parameters for each in own))
        accepted -= set(inspect.signature(getattr(torch.optim, name)).parameters)
        params = {key: value for key, value in params.items() if key not in accepted}
    if isinstance(params.get("betas"), (list, tuple)):
        params["betas"] = tuple(map(float, params["betas"]))
    maker = getattr(torch.optim, name or str(kind), None)
    if not isinstance(maker, type):
        raise ValueError(f"there is no optimizer {kind!r}")
    maker([nn.Parameter(torch.zeros(1))], **params)


def _make_scheduler(kind: Any, params: Any) -> None:
    """Make a schedule of DeepSpeed or torch, for as many parameter groups as its longest list is for."""
    from deepspeed.runtime import lr_schedules

    place = lr_schedules if kind in lr_schedules.VALID_LR_SCHEDULES else torch.optim.lr_scheduler
    maker = getattr(place, str(kind), None)
    if not isinstance(maker, type):
        raise ValueError(f"there is no scheduler {kind!r}")
    if params is None:
        raise ValueError("params: missing, write {} for DeepSpeed's defaults")
    groups = max([1, *(len(value) for value in params.values() if isinstance(value, (list, tuple)))])
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=1e-3)
    maker(optimizer, **params)


def _first_line_of_error(work: Callable[[], object]) -> str:
    """Return what a library's constructor says against its arguments, empty if nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it is constructed again where it is used
    try:
        work()
    except ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    except Exception as error:  # a library fails on a wrong type wherever it first uses it
        return f"{type(error).__name__}: {(str(error).strip() or 'refused').splitlines()[0]}"
    finally:
        logging.disable(before)
    return ""


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def as_numbers(values: Any) -> Any:
    """Return nested values in which texts such as 5e8, which YAML does not read as numbers, are numbers."""
    if isinstance(values, Mapping):
        return {key: as_numbers(value) for key, value in values.items()}
    if isinstance(values, list):
        return [as_numbers(value) for value in values]
    if isinstance(values, str) and _EXPONENT.fullmatch(values):
        number = float(values)
        return int(number) if number.is_integer() else number
    return values


def check_monitors(config: Mapping[str, Any], problems: Problems) -> None:
    """Record monitors that are switched on and cannot work: wrong keys, packages that are not installed.

    Args:
        config: the DeepSpeed configuration.
        problems: where they are recorded.
    """
    sections = {name: config[name] for name in MONITOR_SECTIONS if name in config}
    if not sections:
        return
    from deepspeed.monitor.config import get_monitor_config

    for name, section in sections.items():
        if not isinstance(section, dict):
            what = "not a section of keys and values"
            problems.add(name, section, what, 'Write {"enabled": true} or remove the section.')
            continue
        try:
            get_monitor_config({name: section})
        except (TypeError, ValidationError) as error:
            details = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
            for item in details:
                key = ".".join(str(part) for part in (name, *item["loc"]))
                problems.messages.append(f'{key}: {item["msg"]}. Write {{"enabled": true}} or remove the section.')
            continue
        package = _MONITOR_PACKAGES.get(name)
        if section.get("enabled") and package and importlib.util.find_spec(package) is None:
            problems.add(f"{name}.enabled", True, f"{package} is not installed", f"Run pip install {package}.")


def check_auto(config: Mapping[str, Any], problems: Problems) -> None:
    """Record every "auto" that `resolve_auto` cannot replace, whatever the model.

    Args:
        config: the DeepSpeed configuration without `"auto"` batch sizes.
        problems: where they are recorded.
    """
    _values(config, 1, torch.float32, problems)


def resolve_auto(
    config: Mapping[str, Any],
    *,
    hidden_size: int | None,
    dtype: torch.dtype,
    where: str = "the DeepSpeed configuration",
) -> dict[str, Any]:
    """Replace "auto" by what Hugging Face's Trainer would write there; the learning rate is a recipe's default.

    - `gradient_clipping`: 1.0; `bf16.enabled`, `fp16.enabled`: by the model's dtype.
    - `optimizer.params` of Adam and AdamW: `ADAM_DEFAULTS`.
    - `scheduler.params`: `warmup_min_lr` 0, `warmup_max_lr` the optimizer's rate, `warmup_num_steps` 1 (no warm-up).
    - `zero_optimization`, with hidden size H: `reduce_bucket_size` H^2, `stage3_prefetch_bucket_size` 0.9 H^2,
      `stage3_param_persistence_threshold` 10 H.

    Batch sizes are `resolve_config`'s. Sections in which "auto" means DeepSpeed's own default keep it.

    Args:
        config: the DeepSpeed configuration; it is not changed.
        hidden_size: H, or None if the model's configuration has none.
        dtype: of the model's weights.
        where: name of the configuration in messages.

    Returns:
        A copy of the configuration.

    Raises:
        ConfigError: listing every "auto" that cannot be replaced and what to write there.
    """
    problems = Problems(where)
    values = _values(config, hidden_size, dtype, problems)
    problems.raise_if_any()
    resolved = copy.deepcopy(dict(config))
    for key, value in values.items():
        section: Any = resolved
        *names, last = key.split(".")
        for name in names:
            section = section[name]
        section[last] = copy.copy(value)
    return resolved


def model_facts(model: nn.Module) -> tuple[int | None, torch.dtype]:
    """Return a model's hidden size (None if its configuration has none) and its dtype, also of a `PeftModel`."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    hidden_size = getattr(config, "hidden_size", None) or max(getattr(config, "hidden_sizes", None) or [0])
    dtype = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return int(hidden_size) or None, dtype


def _is_note(key: str) -> bool:
    return key == "comment" or key.startswith(("_", "//", "#"))


def _values(
    config: Mapping[str, Any], hidden_size: int | None, dtype: torch.dtype, problems: Problems
) -> dict[str, Any]:
    """Map the dotted key of every "auto" to its replacement; record those that have none."""
    known = _replacements(config, hidden_size, dtype)
    values = {}
    for key in _auto_keys(config):
        section = key.split(".")[0]
        if known.get(key) is not None:
            values[key] = known[key]
        elif key in known and section == "zero_optimization":
            problems.add(
                key, "auto", "the model's configuration has no hidden_size", "Write a number of elements, such as 2e7."
            )
        elif key not in _DEEPSPEEDS_OWN_AUTO and (key == section or section in _LITERAL_SECTIONS or key in _CHOICES):
            advice = _ADVICE.get(key, "Write the value, or remove the key for DeepSpeed's default")
            problems.add(key, "auto", "cannot be resolved", f"{advice}.")
    return values


def _replacements(config: Mapping[str, Any], hidden_size: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Map dotted keys to the value that "auto" stands for, None where the model lacks what it needs."""
    optimizer = config.get("optimizer") or {}
    is_adam = str(optimizer.get("type")).lower() in ("adam", "adamw")
    adam = ADAM_DEFAULTS if is_adam else {}
    params = optimizer.get("params") or {}
    rate = params.get("lr") if isinstance(params, Mapping) else None
    square = hidden_size * hidden_size if hidden_size else None
    return {
        "gradient_clipping": 1.0,
        "bf16.enabled": dtype == torch.bfloat16,
        "bfloat16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": dtype == torch.float16,
        **{f"optimizer.params.{name}": value for name, value in adam.items()},
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": adam.get("lr") if rate == "auto" else rate,
        "scheduler.params.warmup_num_steps": 1,
        "zero_optimization.reduce_bucket_size": square,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * square) if square else None,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size if hidden_size else None,
    }


def _auto_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield dotted keys with the value "auto", at any depth."""
    for key, value in config.items():
        if _is_note(str(key)):
            continue
        if value == "auto":
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            yield from _auto_keys(value, f"{prefix}{key}.")
