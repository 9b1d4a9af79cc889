"""One row of the table of runs and numbers: what a run's files say of it, by path, and its curves.

A number is called by its path in `summary.json`, or in an entry of `metrics.jsonl` if the summary does not have it:
`heldout.overall`, `phase_s.probe`. Runs that have not finished, and older ones, are summed up from their steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colm_ds.report.tables import Column, compact, fixed, percent, whole
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.metrics import METRICS, Metric, data_loading_share, is_measured, step_seconds
from colm_ds.run_folder.read import Run, lookup, names, number, numbers

PHASES = ("data", "probe", "exchange", "select", "forward", "backward", "train", "step")
MEMORY_PHASES = ("probe", "exchange", "select", "train", "forward", "backward", "step", "save")
LOSS, PERPLEXITY, GIB = fixed(4), fixed(2), fixed(3)

NUMBERS = {
    each.key: each
    for each in (
        Column("held-out loss", LOSS, "min", "heldout.overall"),
        Column("mean of sources", LOSS, "min", "heldout.macro"),
        Column("small sources", LOSS, "min", "heldout.small"),
        Column("big sources", LOSS, "min", "heldout.big"),
        Column("perplexity", PERPLEXITY, "min", "heldout.perplexity.overall"),
        Column("accuracy", percent, "max", "heldout.accuracy"),
        Column("accuracy before training", percent, None, "heldout_before.accuracy"),
        Column("exact match", percent, "max", "exact_match.overall"),
        Column("s per step", compact, "min", "step_s.median"),
        Column("fastest 10%, s", compact, None, "step_s.p10"),
        Column("slowest 10%, s", compact, None, "step_s.p90"),
        Column("waiting for data", percent, None, "data_loading_share"),
        Column("peak, GiB", GIB, "min", "peak_memory_gib.peak"),
        Column("trained", whole, None, "examples_trained"),
        Column("probed", whole, None, "examples_probed"),
        Column("tokens", whole, None, "tokens_trained"),
        Column("wall clock, s", compact, None, "wall_s"),
        Column("padding", percent, None, "padding_fraction"),
        Column("micro-batches made", fixed(1), None, "micro_batches.count"),
        Column("tokens of the largest", whole, None, "micro_batches.largest_tokens"),
    )
}
"""Columns of single numbers."""

GROUPS = {
    each.key: each
    for each in (
        Column("{}", LOSS, "min", "heldout.per_source"),
        Column("{}", PERPLEXITY, "min", "heldout.perplexity.per_source"),
        Column("{}", percent, "max", "exact_match.per_source"),
        Column("{}", percent, "max", "evaluation"),
        Column("{}", percent, None, "data_share"),
        Column("{}", percent, None, "coreset_share"),
        Column("{}", LOSS, None, "late_loss"),
        Column("{}, s", compact, None, "phase_s"),
        Column("{}, GiB", GIB, None, "peak_memory_gib"),
        Column("{}, GiB", GIB, None, "peak_memory_parts_gib"),
        Column("{}, bytes per step", whole, None, "exchange_bytes"),
        Column("labelled tokens, {}", fixed(1), None, "label_tokens"),
        Column("gradient variance, {}", fixed(3), None, "gradient_variance"),
    )
}
"""Columns of the members of mappings, by source, phase, part or kind; `{}` is the member."""


@dataclass(frozen=True)
class Curve:
    """A quantity along a run, or the mean of several; every list has one entry per point, or none at all.

    Attributes:
        steps: optimizer steps.
        seconds: of training until then, evaluation not counted; empty if the run logged no times.
        tokens: trained on until then; empty if the run did not count them.
        values: the quantity.
        errors: standard errors over seeds; empty for a single one.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def at(self, axis: str, place: float) -> float | None:
        """Return the value at a place of an axis ("steps", "seconds", "tokens"), on a line between points."""
        x = getattr(self, axis)
        return float(np.interp(place, x, self.values)) if x and x[0] <= place <= x[-1] else None


@dataclass(frozen=True)
class Facts:
    """Numbers and curves of one run; those that its files do not have are absent.

    Attributes:
        run: the run.
        values: numbers by their paths.
        memory_kind: what peaks are: "allocated", "counted" (allocations, on a CPU) or "resident"; empty if not known.
        small: names of the small sources.
        clocks: `seconds` of training and `tokens` at the end of every step, 0 at step 0; empty if unknown.
    """

    run: Run
    values: dict[str, float]
    memory_kind: str
    small: Sequence[str]
    clocks: Mapping[str, Mapping[int, float]]

    @property
    def num_steps(self) -> int | None:
        """Return the summary's number of steps, or the last step logged."""
        return int(self.values["steps"]) if "steps" in self.values else None

    def curves(self, name: str) -> dict[str, Curve]:
        """Return one of `METRICS` along the run, by member; the curve of a single number is called ""."""
        metric = next((each for each in METRICS if each.name == name), Metric(name, name))
        return self._curves((int(step["step"]), metric.values(step)) for step in self.run.steps)

    def heldout(self) -> dict[str, Curve]:
        """Return held-out losses along the run: `overall`, `macro`, `small`, `big`, and `source.NAME`."""
        return self._curves(
            (step, heldout_losses(heldout, self.small) | dict(flatten({"source": heldout.get("per_source")})))
            for step, heldout in self.run.heldout.items()
        )

    def perplexity(self) -> dict[str, Curve]:
        """Return held-out perplexities along the run, named as losses are; empty if not measured."""
        by_step = {step: lookup(entry, "perplexity") for step, entry in self.run.heldout.items()}
        return self._curves(
            (step, dict(flatten({"overall": lookup(each, "overall"), "source": lookup(each, "per_source")})))
            for step, each in by_step.items()
        )

    def _curves(self, points: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Curve]:
        curves: dict[str, Curve] = {}
        for step, members in points:
            for name, value in members.items():
                curve = curves.setdefault(name, Curve())
                curve.steps.append(step)
                curve.values.append(value)
                for axis, clock in self.clocks.items():
                    if step in clock:
                        getattr(curve, axis).append(clock[step])
        return curves


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings with dotted keys."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        name, leaf = f"{prefix}{key}", number(value)
        if leaf is not None:
            yield name, leaf
        else:
            yield from flatten(value, f"{name}.")


def group(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the entries called `name.MEMBER`, by member."""
    return {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}.")}


def small_sources(runs: Sequence[Run]) -> list[str]:
    """Return the small sources' names: those that any run lists; by the |V|/c rule where no run lists one."""
    listed = dict.fromkeys(name for run in runs for name in names(run.config.get("small_sources")))
    counts = next((counts for run in runs if (counts := numbers(run.config.get("sources")))), {})
    if listed or not counts:
        return list(listed)
    from colm_ds.selection import split_sources  # imports torch: only where it is needed

    return list(split_sources({name: int(count) for name, count in counts.items() if count > 0})[0])


def has_counted(run: Run) -> bool:
    """Return whether allocations were counted in some step of a run on a CPU."""
    return any(numbers(step.get("counted_gib")) for step in run.steps)


def run_facts(run: Run, small: Sequence[str], *, counted: bool = False) -> Facts:
    """Read the numbers of a run.

    Args:
        run: the run.
        small: names of the small sources.
        counted: take peaks, and the tokens they follow from, from the steps whose allocations were counted.
    """
    counting = [step for step in run.steps if numbers(step.get("counted_gib"))]
    end = run.heldout[max(run.heldout)] if max(run.heldout, default=0) > 0 else {}
    by_steps: dict[str, Any] = {"heldout": end, "heldout_before": run.heldout.get(0), "step_s": step_seconds(run.steps)}
    by_steps |= {"data_loading_share": _data_loading_share(run), "peak_memory_gib": _largest(run.steps, "memory_gib")}
    at_peak = max(run.steps, key=lambda step: number(lookup(step, "memory_gib", "peak")) or 0.0, default={})
    by_steps["peak_memory_parts_gib"] = numbers(at_peak.get("memory_parts_gib"))
    by_steps["steps"] = run.steps[-1]["step"] if run.steps else None
    by_steps |= {key_of(each): _total(each, run.steps) for each in METRICS if not each.name.startswith("heldout.")}
    at_end = {**by_steps, **{key: value for key, value in run.summary.items() if value is not None}}
    values = dict(flatten(at_end))
    if isinstance(at_end["heldout"], Mapping):
        values |= dict(flatten({"heldout": heldout_losses(at_end["heldout"], small)}))
    late = run.steps[-max(1, len(run.steps) // 10) :]
    derived: dict[str, Any] = {
        "evaluation": read_object(run.folder / "evaluation" / "results.json").get("averages"),
        "data_share": _shares(numbers(run.config.get("sources"))),
        "coreset_share": _shares(group(values, "coreset.per_source")),
        "late_loss": _total(next(metric for metric in METRICS if metric.name == "coreset.loss"), late),
    }
    for name, base, label in (
        ("label_tokens", "large_batch", "× the large batch's"),
        ("gradient_variance", "random", "× random"),
    ):
        if f"{name}.coreset" in values and values.get(f"{name}.{base}"):
            derived[name] = {label: values[f"{name}.coreset"] / values[f"{name}.{base}"]}
    values |= dict(flatten(derived))
    if counted:
        values = {key: value for key, value in values.items() if not key.startswith("peak_memory_gib.")}
        values |= dict(flatten({"peak_memory_gib": _largest(counting, "counted_gib")}))
        tokens = {"largest_tokens": _largest(counting, "micro_batches").get("largest_tokens")}
        values |= dict(flatten({"micro_batches": tokens}))
        _count_parts(values)
    if "peak_memory_gib.total" in values:
        values["peak_memory_gib.peak"] = values.pop("peak_memory_gib.total")
    _divide_step(values)
    timed = [None if is_measured(step) else number(lookup(step, "time_s", "total")) for step in run.steps]
    trained = [number(step.get("tokens")) for step in run.steps]
    clocks = {"seconds": _clock(run, timed), "tokens": {} if None in trained else _clock(run, trained)}
    unused = [key for key, value in values.items() if key.startswith("peak_memory_gib.") and value <= 0]
    for key in unused:  # the phase did not run
        del values[key]
    return Facts(run, values, "counted" if counted else _memory_kind(run), small, clocks)


def key_of(metric: Metric) -> str:
    """Return how a metric, summed up over a run, is called."""
    return metric.summary or metric.name


def heldout_losses(heldout: Mapping[str, Any], small: Collection[str]) -> dict[str, float]:
    """Return `overall`, `macro`, `small` and `big` of a `heldout` object, those that it has or that follow from it.

    Where a source's loss is not finite, neither is a mean over sources, and it is left out.
    """
    asked = heldout.get("per_source")
    by_source = numbers(asked)
    if isinstance(asked, Mapping) and len(by_source) < len(asked):
        return numbers({"overall": heldout.get("overall")})
    kept = [by_source[name] for name in small if name in by_source]
    others = [value for name, value in by_source.items() if name not in small]
    is_split = bool(kept) and len(kept) == len(small)
    macro = number(heldout.get("macro"))
    losses = {
        "overall": heldout.get("overall"),
        "macro": float(np.mean(list(by_source.values()))) if macro is None and by_source else macro,
        "small": float(np.mean(kept)) if is_split else None,
        "big": float(np.mean(others)) if is_split and others else None,
    }
    return numbers(losses)


def _total(metric: Metric, steps: Sequence[Mapping[str, Any]]) -> Any:
    values = metric.over(steps)
    return values if metric.by else values.get("")


def _data_loading_share(run: Run) -> float | None:
    return data_loading_share(run.steps) if any("data" in numbers(step.get("time_s")) for step in run.steps) else None


def _largest(steps: Iterable[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Return the largest value of every member of a mapping."""
    largest: dict[str, float] = {}
    for step in steps:
        for key, value in numbers(step.get(name)).items():
            largest[key] = max(largest.get(key, value), value)
    return largest


def _clock(run: Run, values: Sequence[float | None]) -> dict[int, float]:
    """Add up a number of the steps; where one is missing the median counts."""
    known = [value for value in values if value is not None]
    if not known:
        return {}
    median = float(np.median(known))
    ends = np.cumsum([median if value is None else value for value in values])
    return {0: 0.0} | {int(step["step"]): float(end) for step, end in zip(run.steps, ends, strict=True)}


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total > 0 else {}


def _divide_step(values: dict[str, float]) -> None:
    """Let phases add up: `other` is what a step has beyond them; `train` stays only where its parts are missing."""
    known = group(values, "phase_s")
    for name in ("total", "save", *(["train"] if "backward" in known else [])):
        known.pop(name, None)
        values.pop(f"phase_s.{name}", None)
    rest = values.get("step_s.median", 0.0) - sum(known.values())
    values |= {"phase_s.other": rest} if known and rest > 0 else {}


def _count_parts(values: dict[str, float]) -> None:
    """Divide a counted peak: what it has beyond the parts that are held is activations, or the probe's."""
    name, peaks = "peak_memory_parts_gib", group(values, "peak_memory_gib")
    parts = group(values, name)
    kept = ("weights", "gradients", "optimizer", "communication", "replay", "selection")
    choice, train = (max(peaks.get(each, 0.0) for each in named) for named in (MEMORY_PHASES[:3], MEMORY_PHASES[3:7]))
    for part in parts:
        if part not in kept:
            del values[f"{name}.{part}"]
    if parts and peaks:
        held = sum(parts.get(part, 0.0) for part in kept)
        values[f"{name}.{'probe' if choice >= train else 'activations'}"] = max(0.0, max(peaks.values()) - held)


def _memory_kind(run: Run) -> str:
    known = (entry.get("memory_kind") for entry in (run.summary, *run.steps[-1:]))
    kind = next((str(kind) for kind in known if kind), "")
    device = str(lookup(run.config, "machine", "device") or "").lower()
    return kind or ("" if not device else "resident" if device.startswith("cpu") else "allocated")
