"""The keys of CoLM for trainers: a dataclass, a `colm:` block of an arguments file, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from colm_ds.config.colm import CoLMSection, changed
from colm_ds.config.resolve import selection_config
from colm_ds.config.section import validate_section
from colm_ds.errors import ConfigError, Problems
from colm_ds.untrusted.json_text import parse_json
from colm_ds.untrusted.yaml_text import read_yaml

OWN_TO_THE_ENGINE = {
    "micro_batch_tokens": "The Trainer's micro-batches have per_device_train_batch_size examples",
    "num_workers": "The Trainer reads ahead with dataloader_num_workers",
    "max_skipped_steps": "The Trainer keeps its own account of losses that are not finite",
    "phase_timeout_s": "The Trainer has ddp_timeout",
    "memory": "colm_ds.memory has hooks for any loop",
    "variance_every": "Call the coreset selector's gradient_variance in a callback",
    "target": "Selectors that compare with a target need the step of colm_ds.initialize",
}
"""Keys of the `"colm"` section that only `colm_ds.initialize` uses, and what replaces them here."""


def _help(text: str) -> dict[str, str]:
    """Return a field's metadata, as `HfArgumentParser` reads it."""
    return {"help": text}


@dataclass
class CoLMConfig:
    """Selection of a trainer: the keys of the `"colm"` section, with its defaults. The seed is the TrainingArguments'.

    Works with `HfArgumentParser((TrainingArguments, CoLMConfig))`; there `mask`, `probe`, `schedule` and `options` are
    JSON.
    """

    large_batch_size: int = field(default=0, metadata=_help("r: examples inspected in an optimizer step"))
    coreset_size: int | None = field(default=None, metadata=_help("b; default: by the Trainer's batch size"))
    preset: str | None = field(default=None, metadata=_help("paper: keys left at their defaults are the paper's"))
    selector: str = field(
        default="auto",
        metadata=_help("colm, importance, random, keep_random, full or another; auto: colm, with tokens importance"),
    )
    options: dict | str | None = field(default=None, metadata=_help("options of the selector, as JSON"))
    outer_rules: Literal["auto", "on", "off"] = field(
        default="auto", metadata=_help("small sources kept and quotas by source around the selector's rule")
    )
    small_sources: str = field(default="auto", metadata=_help("kept whole: auto (under |V|/c), none, or a,b"))
    small_share: str = field(default="auto", metadata=_help("part of b that they may fill, 0 to 1; auto: as r = 2 b"))
    per_source: str = field(default="auto", metadata=_help("true: medoids per big source, false: of all together"))
    quotas: Literal["carry", "independent"] = field(
        default="carry", metadata=_help("carry the rounding of quotas over to the next step, or not (the paper's)")
    )
    geometry: Literal["auto", "adam", "plain"] = field(default="auto", metadata=_help("gradients as Adam scales them"))
    metric: Literal["auto", "l1", "euclidean", "cosine"] = field(
        default="auto", metadata=_help("distance between examples")
    )
    weights: Literal["auto", "uniform", "cluster", "matched"] = field(
        default="auto", metadata=_help("loss weights of medoids")
    )
    loss_normalization: Literal["auto", "example", "token"] = field(
        default="auto",
        metadata=_help("mean over examples or tokens; auto: tokens for random and full, as the Trainer, else examples"),
    )
    packing: str = field(
        default="off", metadata=_help("examples one after another in rows: on, off, or tokens of a row")
    )
    mask: dict | str | None = field(default=None, metadata=_help("size, criterion of compared coordinates"))
    probe: dict | str | None = field(default=None, metadata=_help("estimator, layer, epsilon, ..."))
    schedule: dict | str | None = field(default=None, metadata=_help("start_step, every, end_step and plain_every"))
    source_column: str = field(default="source", metadata=_help("column that names each example's source"))
    log: Literal["brief", "all"] = field(
        default="brief", metadata=_help("numbers of the selection in the log: a few, or all, by source too")
    )

    def section(self) -> dict[str, Any]:
        """Return keys and values of the `"colm"` section, without those left at None."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if self.preset is not None:  # which fills in keys that are not given
            defaults = {each.name: each.default for each in dataclasses.fields(self)}
            values = {key: value for key, value in values.items() if value != defaults[key]}
            values.setdefault("small_sources", "auto")
            values |= {"source_column": self.source_column, "log": self.log}
        names = values.get("small_sources", "auto")
        if isinstance(names, str) and names not in ("auto", "below_mean", "none"):
            values["small_sources"] = [name.strip() for name in names.split(",")]
        return values


@dataclass
class CoLMArguments:
    """A `colm:` block beside the other arguments: `HfArgumentParser((TrainingArguments, CoLMArguments))`.

    In a YAML or JSON file `colm:` holds keys and values; on a command line it is JSON or the path of such a file.
    """

    colm: dict | str | None = field(default=None, metadata=_help("keys of CoLM as JSON, or a file with a colm block"))


Given = CoLMConfig | CoLMArguments | CoLMSection | Mapping[str, Any] | str | Path


def read_section(given: Given) -> dict[str, Any]:
    """Read keys and values from any value of a trainer's `colm` argument.

    Args:
        given: a `CoLMConfig`, keys and values, JSON text, or a YAML or JSON file that holds them or a `colm` block.

    Raises:
        ConfigError: if it cannot be read.
    """
    if isinstance(given, CoLMArguments):
        if given.colm is None:
            raise ConfigError('colm: no such block in the arguments. Add "colm:" with large_batch_size in it.')
        given = given.colm
    if isinstance(given, CoLMSection):
        return given.model_dump(exclude_unset=True)
    section = given.section() if isinstance(given, CoLMConfig) else _parse(given)
    for key in ("mask", "probe", "schedule", "options"):
        if isinstance(section.get(key), str):
            section[key] = _parse(section[key])
    return section


def pop_log(section: dict[str, Any]) -> str:
    """Take the key `log`, which is the trainer's own, out of a section.

    Raises:
        ConfigError: if it is neither "brief" nor "all".
    """
    log = section.pop("log", "brief")
    if log not in ("brief", "all"):
        raise ConfigError(f'colm.log = {log!r}: unknown. Write "brief" or "all".')
    return str(log)


def resolve_section(
    section: dict[str, Any], *, coreset_size: int, seed: int, num_processes: int, problems: Problems
) -> CoLMSection | None:
    """Check the keys and fill in values that follow from the TrainingArguments.

    Args:
        section: from `read_section`, without `source_column` and `log`.
        coreset_size: b according to the TrainingArguments.
        seed: seed of the TrainingArguments.
        num_processes: W.
        problems: collects problems.

    Returns:
        The section, or None if its keys could not be read.
    """
    if not section.get("large_batch_size"):
        problems.add("large_batch_size", section.get("large_batch_size"), "missing", "Write r, for example twice b.")
        return None
    section = with_normalization(section)
    config = validate_section(CoLMSection, {"seed": seed, **section}, "", problems)
    if not isinstance(config, CoLMSection):
        return None
    for key in changed(config, OWN_TO_THE_ENGINE):
        problems.add(key, getattr(config, key), "is for colm_ds.initialize", f"{OWN_TO_THE_ENGINE[key]}. Remove it.")
    if config.replay in ("on", "offload"):
        problems.add("replay", config.replay, "needs colm_ds.initialize: here examples change ranks", "Remove it.")
    if config.coreset_size is not None and config.coreset_size != coreset_size:
        problems.add(
            "coreset_size",
            config.coreset_size,
            f"per_device_train_batch_size x gradient_accumulation_steps x {num_processes} ranks is {coreset_size}",
            "Remove it, or change those.",
        )
    try:
        filled = {**config.model_dump(exclude_unset=True), "coreset_size": coreset_size}
        checked = selection_config(filled | {"replay": "off", "packing": "off"}, num_processes)
        return checked.model_copy(update={"packing": config.packing})  # the Trainer's micro-batches are ours
    except ConfigError as error:
        problems.messages.extend(str(error).split("\n  ")[1:])
        return None


def is_auto(section: Mapping[str, Any]) -> bool:
    """Return whether a section leaves it open what the loss is a mean over."""
    preset = section.get("preset") is not None and "loss_normalization" not in section
    return section.get("loss_normalization", "auto") == "auto" and not preset


def with_normalization(section: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the loss is a mean over, where a section leaves it open.

    The Trainer's loss is the mean over tokens. So that `random` and `full` train as it does, theirs is too; an arm that
    selects chooses and weighs examples, and its loss is the mean over them.
    """
    if not is_auto(section):
        return section
    as_trainer = section.get("selector", "auto") in ("random", "full")
    return {**section, "loss_normalization": "token" if as_trainer else "example"}


def _parse(given: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    text = str(given)
    try:
        if not text.lstrip().startswith("{"):
            loaded = read_yaml(Path(text))  # JSON is YAML
        else:
            loaded = parse_json(text)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"colm = {text!r}: not readable: {reason}. Give JSON, or a YAML or JSON file.") from None
    loaded = loaded.get("colm", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise ConfigError(f"colm = {text!r}: a {type(loaded).__name__}. Write keys and values.")
    return loaded
