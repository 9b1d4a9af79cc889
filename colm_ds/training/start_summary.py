"""Sum up in at most ten lines what a run is about to do; rank 0 prints them before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from colm_ds.checkpoints.atomic import Checkpoint
from colm_ds.errors import ConfigError
from colm_ds.memory.meter import GIB
from colm_ds.planner.job import Job, job_of_data
from colm_ds.planner.plan import Planner
from colm_ds.planner.step_cost import step_cost
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.selection import sees_sources, signal_of
from colm_ds.types import SourcedDataset

_PLANNING_S = 1.0
"""Work for the plan of the whole memory; where it takes more, only that of the states is said."""

_LONGEST_LINE = 108
"""Characters of what is said of the data."""


@dataclass(frozen=True)
class Start:
    """A run that is about to begin.

    Attributes:
        recipe: with its number of steps.
        described: what its `config.json` says.
        data: the training examples.
        model_config: the model's Hugging Face configuration.
        device_type: where it trains, `cpu` or `cuda`.
        resumed: the checkpoint that it resumes from, if it does.
    """

    recipe: BaseRecipe
    described: Mapping[str, Any]
    data: SourcedDataset
    model_config: Any
    device_type: str
    resumed: Checkpoint | None


def start_summary(start: Start) -> list[str]:
    """Return at most ten lines about a run; what cannot be found out is left out, whatever the reason."""
    planner, job = Planner(limit_s=_PLANNING_S), None
    with suppress(Exception):
        job = _job(start)
    lines = {
        "model": lambda: _model(start),
        "trained": lambda: _trained(start),
        "data": lambda: _data(start.described["sources"], _kept_whole(start)),
        "batch": lambda: _batch(start),
        "selector": lambda: _selector(start, lambda: _price(job, planner)),
        "memory": lambda: _memory(job, planner),
        "ranks": lambda: _ranks(start),
        "steps": lambda: _steps(start),
        "output": lambda: f"{start.recipe.output_dir}",
    }
    shown = [_title(start)]
    for label, find in lines.items():
        with suppress(Exception):
            shown.append(f"  {label:<8}  {find()}")
    return shown


def _title(start: Start) -> str:
    if start.resumed is None:
        return f"{start.recipe.name}: starts"
    return f"{start.recipe.name}: resumed after step {start.resumed.step}, from {start.resumed.path}"


def _model(start: Start) -> str:
    place = start.recipe.model.name_or_path
    size = _count(start.described["num_parameters"])
    return f"{start.model_config.model_type}, {size} parameters, {'random weights' if place is None else place}"


def _trained(start: Start) -> str:
    total, trained = start.described["num_parameters"], start.described["num_trainable"]
    lora = start.recipe.lora
    share = "all" if trained == total else f"{trained / total:.2%}"
    return f"{_count(trained)} parameters ({share})" + ("" if lora is None else f", LoRA of rank {lora.rank}")


def _kept_whole(start: Start) -> Sequence[str]:
    """Return the small sources, or none if the selector does not see sources."""
    section = start.described["colm"]
    kept = sees_sources(section["selector"], section["outer_rules"])
    return start.described["small_sources"] if kept else []


def _data(sources: Mapping[str, int], small: Sequence[str]) -> str:
    """Return the number of examples and as many of the largest sources as fit, the others counted."""
    ordered = sorted(sources, key=lambda name: -sources[name])
    text = f"{sum(sources.values()):,} examples: "
    for num_shown in range(len(ordered), -1, -1):
        parts = [f"{name} {sources[name]:,}{'*' if name in small else ''}" for name in ordered[:num_shown]]
        if rest := ordered[num_shown:]:
            kept = len(set(small) & set(rest))
            others = f"{len(rest)} {'more' if num_shown else 'sources'} with {sum(sources[name] for name in rest):,}"
            parts.append(others + f", {kept} of them small" * bool(kept))
        note = "; * small, kept whole" if set(small) & set(ordered[:num_shown]) else "; small ones are kept whole"
        line = text + ", ".join(parts) + note * bool(small)
        if len(line) <= _LONGEST_LINE:
            break
    return line


def _batch(start: Start) -> str:
    section, micro = start.described["colm"], start.recipe.micro_batch_size
    looked_at, trained = section["large_batch_size"], section["coreset_size"]
    packed = " packed rows" if section["packing"] != "off" else ""
    return f"r = {looked_at} looked at, b = {trained} trained on, micro-batches of {micro}{packed} on a rank"


def _selector(start: Start, find_price: Callable[[], float]) -> str:
    section = start.described["colm"]
    name = section["selector"]
    if name == "full":
        return "full: plain training on all r"
    text = f"{name} with {section['probe']['estimator']}" if signal_of(name, section["options"]) == "gradient" else name
    with suppress(Exception):
        text += f": a step at {find_price():.2f} times the price of plain training on b"
    return text


def _job(start: Start) -> Job:
    job = job_of_data(
        start.recipe,
        start.data,
        start.described["world_size"],
        on_gpu=start.device_type == "cuda",
        configuration=start.model_config,
    )
    return job.with_colm(replay="off") if start.described["why_not_replay"] else job


def _price(job: Job | None, planner: Planner) -> float:
    """Return what a step costs over one of plain training on b, in matrix products, on average over the schedule."""
    assert job is not None
    parameters = planner.tracer(job.spec).parameters
    plain = step_cost(job.with_colm(selector="random"), parameters, None).forwards
    return step_cost(job, parameters, None).forwards / plain


def _memory(job: Job | None, planner: Planner) -> str:
    assert job is not None
    try:
        plan = planner.memory(job)
    except (TimeoutError, ConfigError):  # too long, or the memory depends on the data
        states = planner.states(job)
        size = (states.weights + states.gradients + states.optimizer) / GIB
        return f"{size:.2f} GiB planned on a rank for weights, gradients and optimizer (all of it: colm-ds plan)"
    host = f", {plan.host / GIB:.2f} GiB in host memory" if plan.host else ""
    where = f"largest in {plan.peak_phase}, for examples of {job.length} tokens"
    return f"{plan.peak / GIB:.2f} GiB planned on a rank{host} ({where})"


def _ranks(start: Start) -> str:
    stage = (start.described["deepspeed"].get("zero_optimization") or {}).get("stage", 0)
    return f"{start.described['world_size']} on {start.device_type}, ZeRO-{stage}, {start.recipe.model.dtype}"


def _steps(start: Start) -> str:
    looked_at = start.recipe.steps * start.described["colm"]["large_batch_size"] / len(start.data)
    return f"{start.recipe.steps:,}" + ("" if is_weighted(start.recipe) else f", {looked_at:.2f} epochs looked at")


def is_weighted(recipe: Any) -> bool:
    """Return whether sources or files have weights, so that passes over the data differ by source."""
    entries = getattr(recipe.data, "train", None)
    by_entry = isinstance(entries, (list, tuple)) and any(getattr(entry, "weight", None) for entry in entries)
    return bool(getattr(recipe.data, "weights", None)) or by_entry


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
