"""The `"colm"` section of a DeepSpeed configuration: its keys, their checks, and what DeepSpeed itself is given."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from colm_ds.config.deepspeed import check_auto, check_keys, check_monitors
from colm_ds.errors import ConfigError, Problems
from colm_ds.selection import SELECTORS

Config = str | Path | dict[str, Any]


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, values are not changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MaskConfig(Section):
    """The coordinates in which gradients are compared."""

    size: Literal["auto"] | int = Field("auto", description="h; auto: the model's hidden size")
    criterion: Literal["grad", "weight", "weight_grad", "random"] = Field("grad", description="how they are chosen")


class ProbeConfig(Section):
    """How the signal of every example is estimated."""

    estimator: Literal["spsa", "exact", "sketch", "projection"] = Field(
        "spsa",
        description="spsa (the paper's), exact, sketch, or projection of the exact gradient on random directions",
    )
    layer: Literal["v_proj", "qkv", "fc"] = Field(
        "v_proj", description="of the last layer: its V projection, all of Q, K and V, or the MLP's output projection"
    )
    epsilon: float = Field(1e-3, gt=0, description="spsa: size of the step to both sides")
    num_probes: Literal["auto"] | int = Field(
        "auto", description="K: directions or sketches; auto: 1, sketch and projection 256"
    )
    direction_rank: Literal["full"] | Annotated[int, Field(ge=1)] = Field(
        "full", description="spsa: rank of the random step as a matrix (low-rank MeZO); full: every entry on its own"
    )
    refresh: Literal["step", "run"] = Field("step", description="new directions every step, or one set for the run")
    sample: float = Field(1.0, gt=0, le=1, description="share of the examples outside small sources that is probed")
    token_sample: float = Field(
        1.0, gt=0, le=1, description="share of every example's labelled tokens whose loss a gradient is estimated from"
    )
    dtype: Literal["auto", "bfloat16"] = Field("auto", description="trunk's compute; auto: as the model trains")
    precision: Literal["auto", "float32", "float64"] = Field(
        "auto", description="spsa's last layer and head; float64 (auto on a CPU) chooses alike on any number of ranks"
    )
    max_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="padded tokens of one micro-batch of the probe; auto: 2048 on a CPU (its caches), else 8192"
    )

    @property
    def resolved_num_probes(self) -> int:
        """K."""
        if self.num_probes == "auto":
            return 256 if self.estimator in ("sketch", "projection") else 1
        return self.num_probes

    def resolved_max_tokens(self, device_type: str) -> int:
        """Padded tokens of a micro-batch of the probe; larger ones leave a CPU's caches (benchmarks/README.md)."""
        if self.max_tokens == "auto":
            return 2048 if device_type == "cpu" else 8192
        return self.max_tokens


class ScheduleConfig(Section):
    """In which steps the selector runs; the others train on a random b of r."""

    start_step: int = Field(0, ge=0, description="plain steps before the first selection")
    every: int = Field(1, ge=1, description="select in every n-th step from then on")

    def selects(self, step: int) -> bool:
        """Whether the selector runs in a 1-based step."""
        return step > self.start_step and (step - self.start_step - 1) % self.every == 0


class MemoryConfig(Section):
    """What is recorded about memory beside the peaks of every step."""

    count_steps: list[int] = Field(
        default_factory=list,
        description="on a CPU: steps whose allocations are counted one by one (slow)",
    )
    snapshot: bool = Field(
        False, description="on a GPU: write PyTorch's allocator snapshot of snapshot_step, and when memory runs out"
    )
    snapshot_step: int = Field(2, ge=1, description="the step, counted from this start of the run")
    folder: str = Field(".", description="where snapshots are written; a run from a recipe writes into its output_dir")


PAPER: dict[str, Any] = {
    "selector": "colm",
    "small_sources": "auto",
    "per_source": True,
    "geometry": "adam",
    "metric": "l1",
    "weights": "uniform",
    "loss_normalization": "example",
    "mask": {"size": "auto", "criterion": "grad"},
    "probe": {
        "estimator": "spsa",
        "layer": "v_proj",
        "epsilon": 1e-3,
        "num_probes": 1,
        "direction_rank": "full",
        "refresh": "step",
        "sample": 1.0,
        "token_sample": 1.0,
    },
    "schedule": {"start_step": 0, "every": 1},
}
"""Every key of the section that decides what is chosen and how it is weighted, as in the paper."""

PRESETS: dict[str, dict[str, Any]] = {"paper": PAPER}


def with_preset(values: Any) -> Any:
    """Return a `"colm"` section with the keys of its preset filled in; keys that are written keep their value.

    Where another estimator than the preset's is written, `num_probes` stays that estimator's own default.
    """
    if not isinstance(values, Mapping) or values.get("preset") not in PRESETS:
        return values
    filled = dict(values)
    for key, pinned in PRESETS[values["preset"]].items():
        written = filled.get(key, {})
        if not isinstance(pinned, dict):
            filled.setdefault(key, pinned)
        elif isinstance(written, Mapping):
            other = written.get("estimator", pinned.get("estimator")) != pinned.get("estimator")
            filled[key] = {name: value for name, value in pinned.items() if not (other and name == "num_probes")}
            filled[key] |= written
    return filled


class ColmConfig(Section):
    """The `"colm"` section."""

    preset: Literal["paper"] | None = Field(
        None, description="paper: every key that decides about the choice is the paper's, unless it is written here"
    )
    large_batch_size: int = Field(ge=1, description="r: examples looked at in every step")
    coreset_size: int | None = Field(None, ge=1, description="b: examples trained on; default: train_batch_size")
    selector: str = Field(
        "colm",
        description="colm; random, keep_random, full (plain training on b, small sources kept, all r); or a baseline: "
        "big_loss, gradient_norm, middle_perplexity, completion_length, least_confidence, hidden_medoids",
    )
    small_sources: Literal["auto", "none"] | list[str | int] = Field(
        "auto", description="kept whole: auto (fewer than |V|/c examples), none, or a list of names or ids"
    )
    per_source: bool = Field(True, description="medoids per big source, or of all big sources together")
    geometry: Literal["adam", "plain"] = Field(
        "adam",
        description="compare gradients as Adam would scale them, by the history of selected ones, or as they are",
    )
    metric: Literal["l1", "euclidean", "cosine"] = Field("l1", description="distance between examples")
    weights: Literal["uniform", "cluster", "matched"] = Field("uniform", description="loss weights of medoids")
    loss_normalization: Literal["example", "token"] = Field("example", description="mean over examples or tokens")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="padded tokens of one training micro-batch at most, beside its number of examples"
    )
    mask: MaskConfig = MaskConfig()
    probe: ProbeConfig = ProbeConfig()
    replay: Literal["auto", "on", "off", "offload"] = Field(
        "auto",
        description="train from the probe's hidden states (with activation checkpointing); offload: from host memory",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    variance_every: int = Field(
        0, ge=0, description="measure the variance of the coreset's gradient every n steps, by a pass over r; 0: never"
    )
    memory: MemoryConfig = MemoryConfig()
    num_workers: int = Field(0, ge=0, description="processes that read the next large batches ahead")
    max_skipped_steps: int = Field(
        20, ge=0, description="end the run after this many steps in a row whose gradient was not finite; 0: never"
    )
    phase_timeout_s: float = Field(
        1800.0, ge=0, description="end a rank whose phase (probe, train, save, ...) lasts longer, in seconds; 0: never"
    )
    seed: int = Field(0, ge=0, description="seeds the data order and every random choice of the selection")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        return with_preset(values)

    @field_validator("replay", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        """YAML reads a bare on or off as a truth value."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration whose numbers fit together.

    Attributes:
        colm: the `"colm"` section, `coreset_size` filled in.
        deepspeed: what `deepspeed.initialize` is given: one micro-batch per accumulation, managed by colm_ds.
        micro_batch_size: examples per rank and backward pass.
        coreset_size: b.
    """

    colm: ColmConfig
    deepspeed: dict[str, Any]
    micro_batch_size: int
    coreset_size: int


def load_config(config: Config) -> tuple[dict[str, Any], str]:
    """Read a DeepSpeed configuration from a path or dict.

    Returns:
        A copy of the configuration and what to call it in messages.

    Raises:
        ConfigError: if the file is missing or not a JSON object.
    """
    if isinstance(config, dict):
        return copy.deepcopy(config), "the DeepSpeed configuration"
    path = Path(config)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such file." + (f" In that folder: {near}." if near else "")) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}. Write one JSON object.") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: a {type(loaded).__name__}. Write one JSON object.")
    return loaded, str(path)


def resolve_config(config: Config, world_size: int) -> ResolvedConfig:
    """Check a DeepSpeed configuration with its `"colm"` section and make the numbers fit together.

    Args:
        config: path or dict, as `deepspeed.initialize` takes.
        world_size: W, number of ranks.

    Raises:
        ConfigError: listing every problem found.
    """
    loaded, where = load_config(config)
    problems = Problems(where)
    section = loaded.pop("colm", None)
    if not isinstance(section, dict):
        why = "missing" if section is None else "not a section of keys and values"
        problems.add("colm", section, why, 'Add "colm": {"large_batch_size": ..., "coreset_size": ...}.')
        problems.raise_if_any()
    colm = validate_section(ColmConfig, section, "colm", problems)
    problems.raise_if_any()
    assert isinstance(colm, ColmConfig)
    return _resolve_batch(colm, loaded, world_size, problems)


def validate_section(kind: type[Section], values: Any, prefix: str, problems: Problems) -> Section | None:
    """Build one section, recording unknown keys (with the nearest known one) and wrong values.

    Returns:
        The section, or None if there were problems.
    """
    try:
        return kind.model_validate(values, strict=False)
    except ValidationError as error:
        wrong: dict[str, list[Any]] = {}  # key -> value, names and every alternative's message
        for item in error.errors():
            names = [str(part) for part in item["loc"] if not _is_union_branch(part, kind)]
            key = ".".join([prefix, *names] if prefix else names)
            if item["type"] == "extra_forbidden":
                problems.add_unknown(key, _known_keys(kind, names[:-1]))
            elif item["type"] == "missing":
                problems.messages.append(f"{key}: missing. {_describe(kind, names)}")
            else:
                message = item["msg"][0].lower() + item["msg"][1:]
                if key in wrong:
                    message = message.removeprefix("input should be ")
                wrong.setdefault(key, [item["input"], names]).append(message)
        for key, (value, names, *messages) in wrong.items():
            problems.add(key, value, " or ".join(messages), _describe(kind, names))
        return None


def _is_union_branch(part: Any, kind: type[Section]) -> bool:
    """Whether a part of an error's location names an alternative of a union and not a key."""
    return isinstance(part, str) and (part in ("int", "constrained-int", "float", "str", "bool") or "[" in part)


def _section_at(kind: type[Section], names: list[str]) -> type[Section] | None:
    for name in names:
        field = kind.model_fields.get(name)
        inner = field.annotation if field else None
        candidates = [inner, *getattr(inner, "__args__", ())]
        found = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if found is None:
            return None
        kind = found
    return kind


def _known_keys(kind: type[Section], names: list[str]) -> list[str]:
    section = _section_at(kind, names)
    return list(section.model_fields) if section else []


def _describe(kind: type[Section], names: list[str]) -> str:
    section = _section_at(kind, names[:-1]) if names else None
    field = section.model_fields.get(names[-1]) if section else None
    return f"It is: {field.description}." if field and field.description else ""


def _resolve_batch(colm: ColmConfig, deepspeed: dict[str, Any], world_size: int, problems: Problems) -> ResolvedConfig:
    batch = _batch_number(deepspeed, "train_batch_size", problems)
    micro = _batch_number(deepspeed, "train_micro_batch_size_per_gpu", problems)
    accumulation = _batch_number(deepspeed, "gradient_accumulation_steps", problems)
    size, large = colm.coreset_size, colm.large_batch_size
    if size is None:
        size = batch if batch is not None else micro * accumulation * world_size if micro and accumulation else None
        size = large if colm.selector == "full" else size
    if colm.selector not in SELECTORS:
        problems.add("colm.selector", colm.selector, "unknown", f"Choose one of {', '.join(SELECTORS)}.")
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
    _check_deepspeed(deepspeed, problems)
    problems.raise_if_any()
    per_rank = math.ceil(size / world_size)
    micro = micro or (math.ceil(per_rank / accumulation) if accumulation else min(8, per_rank))
    deepspeed |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro * world_size,
        "managed_gradient_accumulation": False,
    }
    return ResolvedConfig(colm.model_copy(update={"coreset_size": size}), deepspeed, micro, size)


def _batch_number(deepspeed: dict[str, Any], key: str, problems: Problems) -> int | None:
    value = deepspeed.get(key)
    if value is None or value == "auto":
        deepspeed.pop(key, None)
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problems.add(key, value, "not a positive whole number", "Write one, or remove it.")
        return None
    return value


def _check_mask_and_probe(colm: ColmConfig, problems: Problems) -> None:
    for key, value in (("colm.mask.size", colm.mask.size), ("colm.probe.num_probes", colm.probe.num_probes)):
        if isinstance(value, int) and value < 1:
            problems.add(key, value, "less than 1", 'Write at least 1, or "auto".')
    if colm.probe.estimator == "exact" and colm.probe.num_probes not in ("auto", 1):
        problems.add("colm.probe.num_probes", colm.probe.num_probes, "the exact gradient has no probes", "Remove it.")
    if colm.probe.estimator in ("sketch", "projection") and colm.mask != MaskConfig():
        what = f"a {colm.probe.estimator} is compared whole, without a mask"
        problems.add("colm.mask", colm.mask.model_dump(), what, "Remove it.")
    if colm.probe.estimator != "spsa" and colm.probe.direction_rank != "full":
        what = f"{colm.probe.estimator} takes no random step"
        problems.add("colm.probe.direction_rank", colm.probe.direction_rank, what, "Remove it.")


def _check_deepspeed(deepspeed: dict[str, Any], problems: Problems) -> None:
    if deepspeed.get("managed_gradient_accumulation") is True:
        problems.add("managed_gradient_accumulation", True, "colm_ds accumulates gradients itself", "Remove it.")
    check_keys(deepspeed, problems)
    check_monitors(deepspeed, problems)
    for key in ("bf16", "fp16", "torch_autocast", "optimizer", "scheduler", "zero_optimization"):
        if not isinstance(deepspeed.get(key) or {}, dict):
            problems.add(key, deepspeed[key], "not a section of keys and values", "Write an object: {...}.")
            deepspeed[key] = {}
    check_auto(deepspeed, problems)
    zero = deepspeed.get("zero_optimization") or {}
    if zero.get("overlap_comm") is True and zero.get("stage", 0) in (0, 1):
        problems.add(
            "zero_optimization.overlap_comm",
            True,
            "works with accumulation by colm_ds at stages 2 and 3 only",
            "Remove it, or use stage 2.",
        )
    if (deepspeed.get("torch_autocast") or {}).get("enabled") not in (None, False, "auto"):
        problems.add("torch_autocast.enabled", True, "the probe does not run under autocast", "Use bf16 or fp16.")
