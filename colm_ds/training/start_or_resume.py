"""Decide whether to start a new run or resume one, and from which checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from colm_ds.checkpoints import atomic
from colm_ds.config.colm import CoLMSection
from colm_ds.config.deepspeed import MONITOR_SECTIONS
from colm_ds.config.section import Section
from colm_ds.errors import ConfigError
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.recipes.sections import DataConfig, LoraConfig, ModelConfig
from colm_ds.run_folder.contents import CHECKPOINTS, CONFIG, METRICS, NOT_EVALUATED, own_entries
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.read import check_not_finished, status_of
from colm_ds.run_folder.write import no_run_of
from colm_ds.untrusted.json_text import parse_json

_MAY_CHANGE = {
    *("name", "made_by", "output_dir", "overwrite", "save_every", "keep_last", "resume", "monitor", "verbose"),
    *("evaluation", "tokenizer", "deepspeed", "data.train", "data.heldout", "data.cache_dir", "model.name_or_path"),
    *("data.store", "prepare", "keep_best", "data.schema", "data.chat_template", "data.num_processes"),
    *("model.attention", "model.activation_checkpointing", "colm.num_workers", "colm.micro_batch_tokens"),
    *("colm.max_skipped_steps", "colm.phase_timeout_s", "colm.replay", "colm.variance_every"),
    *("colm.probe.max_tokens", "colm.memory", "colm.packing", "micro_batch_size", "optimizer.torch_adam"),
    *("colm.target.data", "colm.options.table", "data.subset"),  # their contents are compared
    "colm.preset",  # the keys that it fills in are compared one by one
}
"""Keys that say how a run computes or where things are, and not what it computes (paths may have moved)."""


_CURE = "choose another output_dir, or overwrite=true to start over."


def where_to_start(recipe: BaseRecipe) -> atomic.Checkpoint | None:
    """Return the checkpoint to resume from; None: start a new run. Reads files only, on one rank.

    Args:
        recipe: what is to be run.

    Raises:
        ConfigError: if a run exists that can neither be resumed nor replaced, or that another recipe made.
        CheckpointError: if there are checkpoints but none that can be loaded.
    """
    if recipe.overwrite:
        return None
    folder = Path(recipe.output_dir)
    named = None if recipe.resume in ("auto", "never") else Path(recipe.resume)
    if named is not None and not _began_from(named, folder):
        _check_may_take(recipe, named)
        return _take(recipe, named)
    if not _holds_run(folder):
        return None
    check_not_finished(recipe.output_dir)
    if recipe.resume == "never":
        return None  # `RunFolder` refuses to replace what is there
    _check_same(recipe, folder / CONFIG)
    checkpoint = atomic.find(folder / CHECKPOINTS, repair=True)
    if checkpoint is None and status_of(folder) == NOT_EVALUATED:
        raise ConfigError(
            f"output_dir = {recipe.output_dir}: holds trained weights whose evaluation failed. Measure them with "
            "finetune/evaluate.py, choose another output_dir, or overwrite=true to start over."
        )
    return _take(recipe, named) if checkpoint is None and named is not None else checkpoint


def _take(recipe: BaseRecipe, path: Path) -> atomic.Checkpoint | None:
    """Return the checkpoint at a path, once its run is found to be of the same recipe."""
    checkpoint = atomic.find(path.parent, path.name)
    _check_same(recipe, path.parent.parent / CONFIG)
    return checkpoint


def _began_from(path: Path, folder: Path) -> bool:
    """Return whether the run in a folder began from a checkpoint of elsewhere, so that the same command resumes it."""
    if path.parent.resolve() == (folder / CHECKPOINTS).resolve() or not _holds_run(folder):
        return False
    if not (folder / CONFIG).exists() and not (folder / CHECKPOINTS).exists():
        return True  # killed before it wrote more than a log of no step of its own
    before = read_object(folder / CONFIG).get("recipe")
    begun = before.get("resume") if isinstance(before, Mapping) else None
    return isinstance(begun, str) and begun not in ("auto", "never") and Path(begun).resolve() == path.resolve()


def _holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run.

    Raises:
        ConfigError: if it holds parts of a run only, or cannot be read.
    """
    try:
        exists = (folder / METRICS).exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ConfigError(
            f"output_dir = {folder}: {error.strerror or error}. Name a folder that can be read."
        ) from None
    if not exists and (own := own_entries(folder)):
        raise no_run_of(own)
    return exists


def _check_may_take(recipe: BaseRecipe, path: Path) -> None:
    """Raise unless a run that is resumed from a path writes where it was, unfinished, or where no run is."""
    check_not_finished(recipe.output_dir)
    folder = Path(recipe.output_dir)
    if path.parent.resolve() != (folder / CHECKPOINTS).resolve() and _holds_run(folder):
        raise ConfigError(
            f"output_dir = {recipe.output_dir}: holds another run than the one that resume = {recipe.resume} is of. "
            "Choose another output_dir, resume: auto to resume the run that is there, or remove that run."
        )


def may_restart(recipe: BaseRecipe) -> bool:
    """Return whether an unfinished run without a checkpoint may be replaced: this recipe's own, killed before one."""
    return recipe.resume == "auto" and not recipe.overwrite


def _check_same(recipe: BaseRecipe, config: Path) -> None:
    """Compare what is to be run with what was."""
    before = read_object(config).get("recipe")
    if not before:
        return  # killed before it was written, or moved away
    constant = recipe.lr_schedule.kind == "constant" and recipe.lr_schedule.warmup_fraction == 0
    differences = recipe_differences(before, recipe, _MAY_CHANGE | ({"steps"} if constant else set()))
    if differences:
        raise ConfigError(
            f"{config.parent}: holds an unfinished run of another recipe.\n  "
            + "\n  ".join(differences)
            + "\n  Put that back to resume, choose another output_dir, or overwrite=true to start over."
        )


def check_finished(recipe: BaseRecipe, *, only: Collection[str] = _MAY_CHANGE, cure: str = _CURE) -> None:
    """Compare a recipe with the finished run in its folder.

    Args:
        recipe: what would be run there.
        only: keys that may differ.
        cure: end of the error's message, after "Put that back, ".

    Raises:
        ConfigError: if the run was made by another one.
    """
    folder = Path(recipe.output_dir)
    differences = recipe_differences(read_object(folder / CONFIG).get("recipe") or {}, recipe, only)
    if differences:
        raise ConfigError(
            f"{folder}: holds a finished run of another recipe.\n  "
            + "\n  ".join(differences)
            + f"\n  Put that back, {cure}"
        )


def _said(checkpoint: str, text: Any) -> Any:
    """Parse the JSON of settings in a checkpoint's client state."""
    try:
        return parse_json(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{checkpoint}: what it says of its settings is no JSON ({error}). Take another checkpoint, or "
            "overwrite=true to start over."
        ) from None


def check_same_settings(
    checkpoint: str, before: Mapping[str, Any], recipe: BaseRecipe, deepspeed: Mapping[str, Any]
) -> None:
    """Compare what is to be run with what a checkpoint itself says it was made by.

    Args:
        checkpoint: its path.
        before: its client state: `recipe` and `deepspeed` as JSON; what an older one lacks is not compared.
        recipe: what is to be run.
        deepspeed: the resolved DeepSpeed configuration.

    Raises:
        ConfigError: listing every key that changes the result and differs.
    """
    differences = []
    config = Path(checkpoint).parents[1] / CONFIG
    if "recipe" not in before and not read_object(config).get("recipe"):
        raise ConfigError(
            f"{config}: missing or broken, so the recipe of {checkpoint} is unknown. Put it back, "
            "choose another output_dir, or overwrite=true to start over."
        )
    if "recipe" in before:
        constant = recipe.lr_schedule.kind == "constant" and recipe.lr_schedule.warmup_fraction == 0
        free = _MAY_CHANGE | ({"steps"} if constant else set())
        differences += recipe_differences(_said(checkpoint, before["recipe"]), recipe, free)
    if "deepspeed" in before:
        now = json.loads(json.dumps(deepspeed, default=str))
        differences += [
            f"deepspeed {key}: {one!r} there, {other!r} here"
            for key, one, other in _compare(_said(checkpoint, before["deepspeed"]), now)
            if not any(key == name or key.startswith(f"{name}.") for name in _DEEPSPEED_MAY_CHANGE)
            and not (one is None and key.startswith(("fp16.", "bf16.")))  # which earlier versions left out
        ]
    if differences:
        raise ConfigError(
            f"{checkpoint}: was made with other settings.\n  "
            + "\n  ".join(differences)
            + "\n  Put that back to resume, choose another output_dir, or overwrite=true to start over."
        )


_DEEPSPEED_MAY_CHANGE = {
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "managed_gradient_accumulation",
    ),
    *("optimizer", "scheduler", "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown"),
    *(*MONITOR_SECTIONS, "flops_profiler", "comms_logger", "monitor_config"),
    *(
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
        "zero_allow_untested_optimizer",
        "checkpoint",
        "activation_checkpointing",
    ),
}
"""DeepSpeed keys that say how it computes or what it prints; the recipe has the optimizer, a checkpoint its stage."""


def check_same_data(
    checkpoint: str, before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> None:
    """Compare the data of a resumed run, see `TrainingTask.identity`, with what its checkpoint says.

    Args:
        checkpoint: its path.
        before: what was trained on; keys that it lacks, as in older checkpoints, are not compared.
        now: what the recipe names.

    Raises:
        ConfigError: if the content is another.
    """
    for key, data in now.items():
        known = before.get(key)
        if known is not None and known["digest"] != data["digest"]:
            raise ConfigError(
                f"{key} = {data['place']}: not what the run was trained on.\n"
                f"  {checkpoint}: {known['place']} with digest {known['digest']}\n"
                f"  now: {data['place']} with digest {data['digest']}\n"
                "  Name the data that it was trained on (prepared again from the same files and settings it is the "
                "same), choose another output_dir, or overwrite=true to start over."
            )


def recipe_differences(before: Mapping[str, Any], recipe: BaseRecipe, free: Collection[str]) -> list[str]:
    """In what a recipe differs from the one that a run's `config.json` holds, one line each.

    Args:
        before: `recipe` of `config.json`.
        recipe: what is to be run.
        free: dotted keys that may differ, with all below them.
    """
    now = json.loads(json.dumps(recipe.model_dump(), default=str))
    if recipe.epochs is not None:  # steps follow from it and the data
        free = {*free, "steps"}
    return [
        f"{key}: {before_value!r} there, {now_value!r} here"
        for key, before_value, now_value in _compare(_as_now(before), _as_now(now))
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def _as_now(recipe: Any) -> Any:
    """Return a dumped recipe whose `"colm"`, `model`, `lora` and `data` sections have the keys of this version.

    Keys that an earlier version did not know have their default, which is what that version did; `num_probes` is the
    number that "auto" stands for, `small_share` 1 where all are kept, as that version always did, and
    `quotas` independent, as they were then.
    """
    given = recipe.get("colm") or {} if isinstance(recipe, Mapping) else None
    if not isinstance(given, Mapping):
        return recipe  # a damaged file: the differences say what it had
    known = _known(CoLMSection, given)
    known.setdefault("quotas", "independent")
    try:
        section = CoLMSection.model_validate(known)
    except ValidationError:
        return _filled(dict(recipe))  # the differences say what it had
    colm = json.loads(section.model_dump_json())
    colm["probe"]["num_probes"] = section.probe.resolved_num_probes
    if section.probe.estimator != "tokens":
        colm["probe"]["length_power"] = None  # without a meaning, and its default has changed
    if section.selector != "colm":
        colm["weights"] = None  # there are no medoids, and the default has changed
    size = section.coreset_size
    if "small_share" not in known or (size and section.small_share == "auto" and section.large_batch_size <= 2 * size):
        colm["small_share"] = 1.0
    return _filled({**recipe, "colm": colm})


def _filled(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a dumped recipe in which keys that its version did not know have their defaults."""
    filled = dict(recipe)
    sections: list[tuple[str, type[Section]]] = [("model", ModelConfig), ("lora", LoraConfig)]
    if recipe.get("task", "instructions") == "instructions":
        sections.append(("data", DataConfig))
    for key, kind in sections:
        if isinstance(recipe.get(key), Mapping):
            filled[key] = {**_defaults(kind), **recipe[key]}
    return filled


def _defaults(kind: type[Section]) -> dict[str, Any]:
    """Return a section's defaults; keys that have none are left out."""
    fields = kind.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}


def _known(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a section has, and of its sections those that they have."""
    known = {}
    for key, value in values.items():
        if key in kind.model_fields:
            inner = kind.model_fields[key].annotation
            is_section = isinstance(inner, type) and issubclass(inner, Section) and isinstance(value, Mapping)
            known[key] = _known(inner, value) if is_section else value  # type: ignore[arg-type]
    return known


def _compare(one: Any, other: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Keys of nested mappings whose values differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one, *(key for key in other if key not in one)]
        parts = [_compare(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key)) for key in keys]
        return [difference for part in parts for difference in part]
    return [] if one == other else [(prefix, one, other)]
