"""Make the numbers of a configuration fit together, and build the configuration that DeepSpeed itself is given."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from colm_ds.config.colm import (
    FITS_GRADIENTS,
    FITS_TOKENS,
    OWN_WEIGHTS,
    CoLMSection,
    MaskConfig,
    ProbeConfig,
    changed,
)
from colm_ds.config.deepspeed import as_numbers, check_auto, check_keys, check_monitors, check_sections, check_zero
from colm_ds.config.optimizer import check_numbers
from colm_ds.config.section import validate_section
from colm_ds.errors import CoLMError, ConfigError, Problems
from colm_ds.selection import SELECTORS, takes_outer_rules, which_selector, wrong_options
from colm_ds.untrusted.json_text import DoubledKeyError, read_json


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration whose numbers fit together.

    Attributes:
        colm: the `"colm"` section, `coreset_size` filled in.
        deepspeed: what `deepspeed.initialize` is given: one micro-batch per accumulation, managed by colm_ds.
        micro_batch_size: examples per rank and backward pass.
        coreset_size: b.
        world_size: W, number of ranks that the numbers fit.
    """

    colm: CoLMSection
    deepspeed: dict[str, Any]
    micro_batch_size: int
    coreset_size: int
    world_size: int


Config = str | Path | dict[str, Any] | ResolvedConfig


STORED = ("colm", *OWN_WEIGHTS)
"""Selectors that choose by stored sketches, and draw examples that have none yet."""


def load_config(config: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Read a DeepSpeed configuration from a path or dict.

    Returns:
        A copy of the configuration and what to call it in messages.

    Raises:
        ConfigError: if the file is missing or not a JSON object.
    """
    if isinstance(config, dict):
        return as_numbers(copy.deepcopy(config)), "the DeepSpeed configuration"
    path = Path(config)
    try:
        loaded = read_json(path)
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such file." + (f" In that folder: {near}." if near else "")) from None
    except DoubledKeyError as error:
        raise ConfigError(f"{path}: {error}. Keep one of them.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}. Write one JSON object.") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: a {type(loaded).__name__}. Write one JSON object.")
    return as_numbers(loaded), str(path)


@dataclass
class _PrefixedProblems(Problems):
    """Problems of which those with DeepSpeed's own keys have a prefix."""

    prefix: str = ""

    def raise_if_any(self, error: type[CoLMError] = ConfigError) -> None:
        """Raise `error` with all messages, their keys prefixed; do nothing if there are none."""
        ours = ("colm.", "colm ", "colm:", "DeepSpeed:")
        self.messages = [each if each.startswith(ours) else f"{self.prefix}{each}" for each in self.messages]
        super().raise_if_any(error)


def resolve_config(
    config: Config, world_size: int, *, where: str | None = None, prefix: str = "", supplied: Collection[str] = ()
) -> ResolvedConfig:
    """Check a DeepSpeed configuration with its `"colm"` section and make the numbers fit together.

    Args:
        config: path or dict, as `deepspeed.initialize` takes; in a dict, `"colm"` may be a `CoLMSection`. A
            `ResolvedConfig` passes through.
        world_size: W, number of ranks.
        where: name of the configuration in messages; None: its path, or that it is DeepSpeed's.
        prefix: in messages before DeepSpeed's own keys, where they are written in a section such as `deepspeed.`.
        supplied: of `optimizer` and `scheduler` those that the caller gives: DeepSpeed does not read their sections.

    Raises:
        ConfigError: listing every problem found; for a `ResolvedConfig`, if it was resolved for another number of
            ranks or its numbers were changed since.
    """
    if isinstance(config, ResolvedConfig):
        _check_still_fits(config, world_size)
        return config
    loaded, place = load_config(config)
    problems = _PrefixedProblems(where or place, prefix=prefix)
    colm = loaded.pop("colm", None)
    if not isinstance(colm, (dict, CoLMSection)):
        why = "missing" if colm is None else "not a section of keys and values"
        problems.add("colm", colm, why, 'Add "colm": {"large_batch_size": ..., "coreset_size": ...}.')
        problems.raise_if_any()
    if isinstance(colm, dict):
        colm = validate_section(CoLMSection, colm, "colm", problems)
        problems.raise_if_any()
    assert isinstance(colm, CoLMSection)
    return _resolve_batch(colm, loaded, world_size, problems, supplied)


def selection_config(config: CoLMSection | Mapping[str, Any], num_processes: int = 1) -> CoLMSection:
    """Check the `"colm"` section outside a DeepSpeed configuration.

    Args:
        config: keys and values, or a `CoLMSection`, which is checked in the same way.
        num_processes: W.

    Raises:
        ConfigError: listing every problem.
    """
    values = dict(config)  # of a section: its fields
    if values.get("replay", "off") not in ("off", "auto", False):
        raise ConfigError(f"colm.replay = {values['replay']!r}: needs the step of colm_ds.initialize. Remove it.")
    if values.get("variance_every"):
        what = "is measured in the step of colm_ds.initialize"
        raise ConfigError(f"colm.variance_every = {values['variance_every']}: {what}. Call gradient_variance instead.")
    if values.get("packing", "off") not in ("off", False):
        what = "packs the micro-batches of colm_ds.initialize and CoLMTrainer, and those here are yours"
        raise ConfigError(f"colm.packing = {values['packing']!r}: {what}. Remove it.")
    off = {"replay": "off"}  # nothing would train from the states
    section = config.model_copy(update=off) if isinstance(config, CoLMSection) else values | off
    where = "the colm configuration"
    colm = resolve_config({"colm": section}, num_processes, where=where).colm
    problems = Problems(where)
    _check_needs_no_engine(colm, problems)
    for key in changed(colm, ("micro_batch_tokens", "num_workers", "max_skipped_steps", "phase_timeout_s", "memory")):
        problems.add(f"colm.{key}", getattr(colm, key), "is for the step of colm_ds.initialize", "Remove it.")
    problems.raise_if_any()
    return colm


def _check_needs_no_engine(colm: CoLMSection, problems: Problems) -> None:
    """Record what a selector needs and only the step of `colm_ds.initialize` provides."""
    needs = colm.needs
    provided = {
        "the losses of earlier steps": needs.past,
        "the gradients of training's own passes (colm.probe.source = 'store')": colm.stores_sketches,
        "target examples": needs.target,
        "each example's index in the dataset": needs.reference,
    }
    missing = [what for what, needed in provided.items() if needed]
    if missing:
        why = f"needs {' and '.join(missing)}, which the step of colm_ds.initialize provides"
        problems.add("colm.selector", colm.selector, why, "Train with that, or choose another selector.")


def _resolve_batch(
    colm: CoLMSection, deepspeed: dict[str, Any], world_size: int, problems: Problems, supplied: Collection[str]
) -> ResolvedConfig:
    batch = _batch_number(deepspeed, "train_batch_size", problems)
    micro = _batch_number(deepspeed, "train_micro_batch_size_per_gpu", problems)
    accumulation = _batch_number(deepspeed, "gradient_accumulation_steps", problems)
    size, large = colm.coreset_size, colm.large_batch_size
    if size is None:
        size = batch if batch is not None else micro * accumulation * world_size if micro and accumulation else None
        size = large if colm.selector == "full" else size
    if colm.selector not in SELECTORS:
        name = colm.selector
        problems.add("colm.selector", name, "unknown", _estimator_meant(name) or which_selector(name))
    else:
        _check_selector(colm, problems)
    if size is None:
        problems.add("colm.coreset_size", None, "missing", "Write b here or as train_batch_size.")
        problems.raise_if_any()
    assert size is not None
    if size > large:
        problems.add(
            "colm.coreset_size",
            size,
            f"more than colm.large_batch_size = {large}",
            f"Choose at most {large} (the paper uses half).",
        )
    if colm.selector == "full" and size != large:
        problems.add(
            "colm.coreset_size",
            size,
            f"the selector 'full' trains on all {large} of the large batch",
            f"Write {large}.",
        )
    if batch is not None and batch != size:
        problems.add(
            "train_batch_size",
            batch,
            f"must equal colm.coreset_size = {size} (DeepSpeed counts the examples trained on)",
            f"Remove it or write {size}.",
        )
    if micro and accumulation and micro * accumulation * world_size != size:
        problems.add(
            "gradient_accumulation_steps",
            accumulation,
            f"{micro} per micro-batch x {accumulation} steps x {world_size} ranks is not the coreset of {size}",
            "Remove it: colm_ds accumulates over as many micro-batches as the coreset needs.",
        )
    for key, number in (("colm.coreset_size", size), ("colm.large_batch_size", large)):
        if number < world_size:
            problems.add(key, number, f"fewer than the {world_size} ranks", f"Choose at least {world_size}.")
    _check_mask_and_probe(colm, problems)
    if colm.packing != "off" and colm.replay in ("on", "offload"):
        why = f"examples packed into rows (colm.packing = {colm.packing!r}) are not where the probe passed them"
        problems.add("colm.replay", colm.replay, why, 'Write "auto" or "off", or remove colm.packing.')
    _check_deepspeed(deepspeed, problems, supplied)
    if colm.variance_every and (deepspeed.get("zero_optimization") or {}).get("stage") == 3:
        why = "the gradients of all layers are sketched at ZeRO stage 0, 1 or 2"
        problems.add("colm.variance_every", colm.variance_every, why, "Write 0, or another stage.")
    problems.raise_if_any()
    per_rank = math.ceil(size / world_size)
    micro = micro or (math.ceil(per_rank / accumulation) if accumulation else min(8, per_rank))
    deepspeed |= _deepspeed_batch(micro, world_size)
    return ResolvedConfig(colm.model_copy(update={"coreset_size": size}), deepspeed, micro, size, world_size)


def _deepspeed_batch(micro_batch_size: int, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's keys of one micro-batch per rank; colm_ds accumulates over them itself."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * world_size,
        "managed_gradient_accumulation": False,
    }


def _check_still_fits(config: ResolvedConfig, world_size: int) -> None:
    """Raise unless a resolved configuration is for this number of ranks and its copies of each number agree.

    `dataclasses.replace` and edits of its dict can set them apart, and DeepSpeed would count other examples than are
    trained on.
    """
    problems = Problems("the resolved configuration")
    if config.world_size != world_size:
        why = f"there are {world_size} ranks"
        problems.add("world_size", config.world_size, why, f"Resolve the configuration for {world_size}.")
    batch = _deepspeed_batch(config.micro_batch_size, config.world_size)
    numbers = [(key, config.deepspeed.get(key), value) for key, value in batch.items()]
    for key, now, resolved in [("colm.coreset_size", config.colm.coreset_size, config.coreset_size), *numbers]:
        if now != resolved:
            problems.add(key, now, f"was resolved as {resolved}", "Change the configuration and resolve it again.")
    problems.raise_if_any()


def _batch_number(deepspeed: dict[str, Any], key: str, problems: Problems) -> int | None:
    value = deepspeed.get(key)
    if value is None or value == "auto":
        deepspeed.pop(key, None)
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problems.add(key, value, "not a positive whole number", "Write one, or remove it.")
        return None
    return value


def _estimator_meant(selector: str) -> str:
    """Advise on a selector that is meant as a signal; empty if it is like none."""
    meant = difflib.get_close_matches(selector, get_args(ProbeConfig.model_fields["estimator"].annotation), n=1)
    if not meant or difflib.get_close_matches(selector, [*SELECTORS, *meant], n=1) != meant:
        return ""
    return f"A signal is chosen by another key: write probe: {{estimator: {meant[0]}}}, and no selector."


def _check_mask_and_probe(colm: CoLMSection, problems: Problems) -> None:
    for key, value in (("colm.mask.size", colm.mask.size), ("colm.probe.num_probes", colm.probe.num_probes)):
        if isinstance(value, int) and value < 1:
            problems.add(key, value, "less than 1", 'Write at least 1, or "auto".')
    if colm.probe.estimator == "exact" and colm.probe.num_probes not in ("auto", 1):
        problems.add("colm.probe.num_probes", colm.probe.num_probes, "the exact gradient has no probes", "Remove it.")
    if colm.probe.estimator in ("sketch", "projection") and colm.mask != MaskConfig():
        what = f"a {colm.probe.estimator} is compared whole, without a mask"
        problems.add("colm.mask", colm.mask.model_dump(), what, "Remove it.")
    if colm.probe.estimator == "tokens":
        _check_tokens(colm, problems)
    if colm.probe.is_stored:
        _check_stored(colm, problems)
    elif colm.probe.max_age != ProbeConfig.model_fields["max_age"].default:
        why = "only stored sketches have an age"
        problems.add("colm.probe.max_age", colm.probe.max_age, why, "Remove it, or write source: store.")
    if colm.probe.estimator != "spsa" and colm.probe.direction_rank != "full":
        what = f"{colm.probe.estimator} takes no random step"
        problems.add("colm.probe.direction_rank", colm.probe.direction_rank, what, "Remove it.")
    if colm.probe.estimator != "spsa" and not _is_default(colm.probe, "epsilon"):
        what = f"{colm.probe.estimator} takes no random step"
        problems.add("colm.probe.epsilon", colm.probe.epsilon, what, "Remove it.")
    if colm.probe.estimator == "exact" and colm.probe.refresh != "step":
        what = "the exact gradient draws no directions or signs that it could keep"
        problems.add("colm.probe.refresh", colm.probe.refresh, what, "Remove it.")
    if colm.probe.estimator != "tokens" and not _is_default(colm.probe, "length_power"):
        what = "only the features of the estimator 'tokens' are divided by a power of the length"
        problems.add("colm.probe.length_power", colm.probe.length_power, what, "Remove it.")
    if not colm.schedule.ever_selects:
        set_keys = colm.schedule.model_dump(exclude_defaults=True)
        what = "in no step of it the selector runs"
        problems.add("colm.schedule", set_keys, what, "Write selector: random for that, or change it.")
    _check_without_effect(colm, problems)


def _is_default(probe: ProbeConfig, key: str) -> bool:
    """Return whether a number is the default, also where it was written with few digits."""
    return math.isclose(getattr(probe, key), ProbeConfig.model_fields[key].default, rel_tol=1e-3)


def _check_without_effect(colm: CoLMSection, problems: Problems) -> None:
    """Record values that nothing would go by; the values of `auto` are accepted, as presets and recipes write them."""
    if colm.small_sources in ("none", []) and colm.small_share not in ("auto", 1.0):
        what = f"no small sources are kept (colm.small_sources = {colm.small_sources!r})"
        problems.add("colm.small_share", colm.small_share, what, "Remove it, or write small_sources: below_mean.")
    own = colm.selector in OWN_WEIGHTS or (colm.selector in SELECTORS and colm.needs.vectors)
    if (own or _is_built_in(colm.selector)) and colm.selector != "colm" and colm.weights != "uniform":
        none = "has no medoids to weigh" if colm.signal is None else "does not weigh its picks so"
        what = f"{colm.selector!r} {'has weights of its own' if own else none}"
        problems.add("colm.weights", colm.weights, what, 'Write "uniform", or selector: colm, whose medoids take them.')
    if own and colm.probe.estimator == "spsa" and colm.mask != MaskConfig():
        what = f"{colm.selector!r} goes by the slopes of spsa, and not by coordinates that a mask would choose"
        problems.add("colm.mask", colm.mask.model_dump(), what, "Remove it.")
    if colm.selector in OWN_WEIGHTS and colm.metric not in (FITS_TOKENS["metric"], FITS_GRADIENTS["metric"]):
        what = f"{colm.selector!r} draws at random and compares no distances"
        problems.add("colm.metric", colm.metric, what, "Remove it, or write selector: colm, whose medoids do.")


def _is_built_in(selector: str) -> bool:
    """Return whether a selector is one of the package's, whose use of every key is known."""
    return selector in SELECTORS and SELECTORS[selector].__module__.startswith("colm_ds.")


def _check_selector(colm: CoLMSection, problems: Problems) -> None:
    """Record options that the selector does not have, and keys that do not go together with it."""
    for wrong in wrong_options(colm.selector, colm.options):
        problems.add(f"colm.options.{wrong.name}", wrong.value, wrong.why, wrong.fix)
    if colm.outer_rules != "auto" and not takes_outer_rules(colm.selector):
        fix = "Write small_sources: none and per_source: false to switch them off, or remove it."
        problems.add("colm.outer_rules", colm.outer_rules, f"{colm.selector!r} has rules of its own", fix)
    needs, probe = colm.needs, colm.probe
    if needs.vectors:
        if probe.estimator == "exact":
            what = f"{colm.selector!r} compares short vectors on one rank, not whole gradients"
            problems.add("colm.probe.estimator", "exact", what, "Write sketch.")
        steps_meet = needs.average > 0.0 or (needs.target and colm.target.refresh > 1)
        if steps_meet and probe.estimator != "tokens" and probe.refresh == "step":
            what = f"{colm.selector!r} compares signals of several steps, which need the same directions"
            problems.add("colm.probe.refresh", "step", what, "Write run.")
    if needs.vectors and needs.target and probe.estimator == "tokens":
        what = f"{colm.selector!r} compares gradients, and token embeddings are none"
        problems.add("colm.probe.estimator", probe.estimator, what, "Write sketch.")
    if colm.geometry == "adam":
        _check_adam(colm, problems)
    if colm.selector == "opus" and (colm.geometry, probe.estimator) != ("adam", "sketch"):
        what = "'opus' scales gradients as Adam does, in the sketch"
        problems.add("colm.geometry", colm.geometry, what, "Write adam, and probe.estimator: sketch.")
    if needs.reference and not colm.options.get("table"):
        what = f"{colm.selector!r} needs a table of reference losses"
        problems.add("colm.options.table", colm.options.get("table"), what, "Write the file of colm-ds score.")
    if colm.target.batch > colm.target.size:
        problems.add("colm.target.batch", colm.target.batch, f"more than size = {colm.target.size}", "Write less.")
    if colm.target.data is not None and not needs.target:
        what = f"{colm.selector!r} compares with no target"
        problems.add("colm.target.data", colm.target.data, what, "Remove it.")


def _check_adam(colm: CoLMSection, problems: Problems) -> None:
    """Record selectors that would not see Adam's geometry, or see a target's gradients in it."""
    needs, estimator = colm.needs, colm.probe.estimator
    what = None
    if (colm.selector in OWN_WEIGHTS or needs.vectors) and estimator == "spsa":
        what = f"{colm.selector!r} goes by the slopes of spsa as they are"
    elif colm.selector in OWN_WEIGHTS and estimator == "exact":
        what = f"{colm.selector!r} goes by exact gradients as they are"
    elif needs.vectors and needs.target and estimator == "projection":
        what = f"{colm.selector!r} compares with a target's gradients, which a projection would scale too"
    if what is not None:
        problems.add("colm.geometry", "adam", what, "Write plain, or probe.estimator: sketch.")


def _check_tokens(colm: CoLMSection, problems: Problems) -> None:
    """Record keys about probing a model where no model is probed."""
    why = "the estimator 'tokens' passes nothing through the model"
    for key in ("layer", "num_probes", "refresh", "sample", "token_sample", "dtype", "precision", "max_tokens"):
        value = getattr(colm.probe, key)
        if value != type(colm.probe).model_fields[key].default and (key, value) != ("num_probes", 1):
            problems.add(f"colm.probe.{key}", value, why, "Remove it.")
    if colm.mask != MaskConfig():
        problems.add("colm.mask", colm.mask.model_dump(), why, "Remove it.")
    if colm.replay in ("on", "offload"):
        problems.add("colm.replay", colm.replay, why, 'Remove it, or write "auto".')
    if colm.geometry != "plain":
        problems.add("colm.geometry", colm.geometry, "features have no Adam history", 'Write "plain".')


def _check_stored(colm: CoLMSection, problems: Problems) -> None:
    """Record keys that do not go together with sketches from training's own passes."""
    why = "with probe.source = 'store' no large batch is passed through the model"
    for key in ("sample", "token_sample", "dtype", "precision", "max_tokens"):
        value = getattr(colm.probe, key)
        if value != ProbeConfig.model_fields[key].default:
            problems.add(f"colm.probe.{key}", value, why, "Remove it.")
    if colm.replay in ("on", "offload"):
        problems.add("colm.replay", colm.replay, why, 'Remove it, or write "auto".')
    if colm.signal is not None and colm.selector not in STORED:
        what = f"{colm.selector!r} takes no stored sketches, {', '.join(STORED[:-1])} and {STORED[-1]} do"
        problems.add("colm.probe.source", "store", what, 'Write "pass", or another selector.')
    if colm.probe.estimator != "sketch":
        what = "what training's pass leaves is a sketch"
        problems.add("colm.probe.estimator", colm.probe.estimator, what, "Write sketch.")
    if colm.probe.refresh != "run":
        what = "sketches of several steps are compared, which need the same signs"
        problems.add("colm.probe.refresh", colm.probe.refresh, what, "Write run.")
    if colm.geometry != "plain":
        what = "Adam's scales change from step to step, and sketches of several steps are compared"
        problems.add("colm.geometry", colm.geometry, what, 'Write "plain".')


_FALSE = ("false", "0", "0.0", "off", "no", "f", "n")
"""Values that DeepSpeed reads as false, in lower case."""


def _enabled(deepspeed: dict[str, Any], section: str) -> bool:
    return bool((deepspeed.get(section) or {}).get("enabled"))


def _check_deepspeed(deepspeed: dict[str, Any], problems: Problems, supplied: Collection[str]) -> None:
    if deepspeed.get("managed_gradient_accumulation") is True:
        problems.add("managed_gradient_accumulation", True, "colm_ds accumulates gradients itself", "Remove it.")
    if str(deepspeed.get("gradient_allreduce_op")).lower() == "sum":
        op = deepspeed["gradient_allreduce_op"]
        why = "the gradient of a step is a mean over ranks, whatever their number"
        problems.add("gradient_allreduce_op", op, why, 'Write "mean".')
    check_keys(deepspeed, problems)
    check_monitors(deepspeed, problems)
    for key in (
        *("bf16", "bfloat16", "fp16", "torch_autocast", "optimizer", "scheduler", "zero_optimization"),
        *("hybrid_engine", "data_efficiency", "tensor_parallel", "comms_logger", "flops_profiler", "aio"),
        *("activation_checkpointing", "data_types", "checkpoint", "autotuning", "timers"),
    ):
        if key in deepspeed and deepspeed[key] is None:
            del deepspeed[key]  # DeepSpeed fails on some that are null
        if not isinstance(deepspeed.get(key) or {}, dict):
            problems.add(key, deepspeed[key], "not a section of keys and values", "Write an object: {...}.")
            deepspeed[key] = {}
    check_auto(deepspeed, problems)
    check_zero(deepspeed, problems)
    check_numbers({"gradient_clipping": deepspeed.get("gradient_clipping")}, problems)
    for key in ("optimizer", "scheduler"):
        params = (deepspeed.get(key) or {}).get("params") or {}
        if isinstance(params, dict):
            check_numbers(params, problems, f"{key}.params.")
        else:
            problems.add(f"{key}.params", params, "not keys and values", "Write an object: {...}.")
    zero = deepspeed.get("zero_optimization") or {}
    if isinstance(zero.get("stage"), str) and zero["stage"].isdigit():  # DeepSpeed takes texts too
        zero["stage"] = int(zero["stage"])
    if str(zero.get("overlap_comm")).lower() in ("true", "false"):
        zero["overlap_comm"] = str(zero["overlap_comm"]).lower() == "true"
    if zero.get("overlap_comm") is True and zero.get("stage", 0) in (0, 1):
        problems.add(
            "zero_optimization.overlap_comm",
            True,
            "works with accumulation by colm_ds at stages 2 and 3 only",
            "Remove it, or use stage 2.",
        )
    tensor_parallel = deepspeed.get("tensor_parallel") or {}
    writer = (deepspeed.get("checkpoint") or {}).get("writer") or {}
    late = "checkpoints are read back and renamed once they are written"
    for name, is_on, why in (
        ("zero_optimization.zenflow", zero.get("zenflow"), "it updates weights between the micro-batches of a step"),
        ("hybrid_engine", _enabled(deepspeed, "hybrid_engine"), "its engine generates between steps"),
        ("data_efficiency", _enabled(deepspeed, "data_efficiency"), "large batches are drawn from the whole dataset"),
        ("sequence_parallel_size", deepspeed.get("sequence_parallel_size", 1) != 1, "a rank probes whole sequences"),
        ("tensor_parallel", tensor_parallel.get("autotp_size"), "the probe needs whole layers"),
        ("checkpoint.writer.decoupled", isinstance(writer, dict) and writer.get("decoupled"), late),
        ("datastates_ckpt", deepspeed.get("datastates_ckpt") is not None, late),
    ):
        if is_on:
            problems.messages.append(f"{name}: not with coresets: {why}. Remove it.")
    for key in ("bf16", "bfloat16"):
        checks = (deepspeed.get(key) or {}).get("check_grad_overflow")
        if checks is not None and str(checks).lower() in _FALSE:
            what = "gradients that are not finite would be applied, and every weight be NaN"
            problems.add(f"{key}.check_grad_overflow", checks, what, "Remove it: such steps are then skipped.")
    norm = zero.get("compute_grad_norm")
    if norm is not None and str(norm).lower() in _FALSE:
        what = "in float32 it is by the norm that gradients that are not finite are noticed"
        problems.add("zero_optimization.compute_grad_norm", norm, what, "Remove it: such steps are then skipped.")
    if (deepspeed.get("torch_autocast") or {}).get("enabled") not in (None, False, "auto"):
        problems.add("torch_autocast.enabled", True, "the probe does not run under autocast", "Use bf16 or fp16.")
    check_sections(deepspeed, problems, supplied)
