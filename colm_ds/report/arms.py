"""Arms: the runs that differ in their seed only, their means, and what each of them is."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colm_ds.report.facts import Curve, Facts, has_counted, run_facts, small_sources
from colm_ds.run_folder.read import Run, lookup, number

# Keys that tell runs of one arm apart: seeds, names and places.
_NOT_THE_METHOD = {
    *(
        "seed",
        "name",
        "run_name",
        "date",
        "output",
        "output_dir",
        "output_folder",
        "run_folder",
        "overwrite",
        "cache_dir",
    ),
    *("save_every", "keep_last", "resume", "verbose", "monitor"),
}

_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")

_LARGEST = ("probe_gib", "train_gib", "peak_gib", "largest_tokens")  # of several seeds the largest counts, not the mean


@dataclass(frozen=True)
class Measure:
    """A number over the seeds of an arm: mean, its standard error (None for one seed) and the seeds that have it."""

    mean: float
    standard_error: float | None = None
    num_seeds: int = 1


@dataclass(frozen=True)
class Arm:
    """Runs of the same method with different seeds.

    Attributes:
        name: shown name, different from every other arm's.
        runs: its runs.
        facts: numbers of each run, in the same order.
        scalars: means of the facts' scalars.
        groups: means of the facts' groups.
    """

    name: str
    runs: list[Run]
    facts: list[Facts]
    scalars: dict[str, Measure] = field(default_factory=dict)
    groups: dict[str, dict[str, Measure]] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether a run of it is finished."""
        return any(run.is_finished for run in self.runs)

    @property
    def counted(self) -> list[tuple[Run, Facts]]:
        """The runs whose numbers count: the finished ones, or all if none is finished."""
        pairs = list(zip(self.runs, self.facts, strict=True))
        return [pair for pair in pairs if pair[0].is_finished] or pairs

    @property
    def used(self) -> list[Facts]:
        """Facts of the runs that count."""
        return [facts for _, facts in self.counted]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the first run."""
        return self.runs[0].config

    @property
    def colm(self) -> dict[str, Any]:
        """The `"colm"` section, empty if there is none."""
        found = self.config.get("colm")
        return found if isinstance(found, dict) else {}

    @property
    def selector(self) -> str | None:
        """Name of the selector."""
        found = self.colm.get("selector")
        return found if isinstance(found, str) else None

    @property
    def large_batch_size(self) -> int | None:
        """r."""
        return _whole(self.colm.get("large_batch_size"))

    @property
    def coreset_size(self) -> int | None:
        """b."""
        found = _whole(self.colm.get("coreset_size")) or _whole(lookup(self.config, "deepspeed", "train_batch_size"))
        return self.large_batch_size if self.selector == "full" else found

    @property
    def is_plain(self) -> bool:
        """Whether it is plain training: on the whole large batch, or on a random part of it."""
        if self.selector is None:
            return False
        trains_all = self.large_batch_size is not None and self.large_batch_size == self.coreset_size
        return self.selector in ("full", "random") or trains_all

    @property
    def memory_kind(self) -> str:
        """What its peaks are: "allocated", "counted" or "resident"; empty if not known."""
        return self.used[0].memory_kind

    @property
    def num_steps(self) -> int | None:
        """Steps of its longest run that counts."""
        return max((found.num_steps for found in self.used if found.num_steps is not None), default=None)

    def mean(self, key: str) -> float | None:
        """Mean of a scalar."""
        return self.scalars[key].mean if key in self.scalars else None

    def train_loss(self) -> list[Curve]:
        """Training loss of every run that counts."""
        return [found.train_loss for found in self.used if found.train_loss.steps]

    def heldout(self, key: str) -> Curve:
        """Mean held-out loss over the runs that count, at the steps that all of them have."""
        return mean_curve([found.heldout[key] for found in self.used if key in found.heldout])

    def perplexity(self) -> dict[str, Curve]:
        """Mean held-out perplexity over the runs that count: overall and of every source; empty if not measured."""
        return _mean_curves([found.perplexity for found in self.used if found.perplexity])

    def tokens(self) -> Curve:
        """Mean number of tokens trained on over the runs that count."""
        return mean_curve([found.tokens for found in self.used])

    def coherence(self) -> dict[str, Curve]:
        """Mean coherence of every source over the runs that count."""
        return _mean_curves([found.coherence for found in self.used])

    def source_losses(self) -> dict[str, Curve]:
        """Mean loss of the selected examples of every source over the runs that count."""
        return _mean_curves([found.source_losses for found in self.used])

    def signal(self, name: str) -> Curve:
        """Mean of a signal over the runs that have it; empty if none has."""
        return mean_curve([found.signals[name] for found in self.used if name in found.signals])


def make_arms(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """Gather runs into arms. Peaks are those of counted allocations where every run has them.

    Runs are seeds of one arm if their configurations differ in seeds, names and places only; the same seed twice is two
    arms.

    Returns:
        The arms in the order of their first runs, and the names of the small sources.
    """
    small = small_sources(runs)
    gathered: list[tuple[str, list[Run]]] = []
    for run in runs:
        key = _method(run)
        place = next(
            (found for known, found in gathered if known == key and run.seed not in [other.seed for other in found]),
            None,
        )
        if place is None or run.seed is None:
            gathered.append((key, [run]))
        else:
            place.append(run)
    shown = _distinct([_arm_name(found) for _, found in gathered])
    counted = all(has_counted(run) for run in runs)
    return [_make_arm(name, found, small, counted) for name, (_, found) in zip(shown, gathered, strict=True)], small


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean of curves at the steps that all of them have."""
    if len(curves) < 2:
        return curves[0] if curves else Curve()
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    means = [float(np.mean([value[step] for value in values])) for step in steps]
    if not all(curve.seconds for curve in curves):
        return Curve(steps, [], means)
    times = [dict(zip(curve.steps, curve.seconds, strict=True)) for curve in curves]
    return Curve(steps, [float(np.mean([time[step] for time in times])) for step in steps], means)


def _mean_curves(runs: Sequence[Mapping[str, Curve]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for curves in runs for name in curves)
    return {name: mean_curve([curves[name] for curves in runs if name in curves]) for name in names}


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of nested mappings with dotted keys."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value_text(values)


def value_text(value: Any) -> Any:
    """A value as it is compared and shown: text stays text, everything else is JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def method_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes up the method of a run, with dotted keys: no seed, name or place."""
    kept = {key: config.get(key) for key in ("colm", "recipe", "deepspeed", "world_size", "num_parameters")}
    kept["num_trainable"], kept["sources"] = config.get("num_trainable"), config.get("sources")
    settings = {key: value for key, value in flatten(kept) if key.rsplit(".", 1)[-1] not in _NOT_THE_METHOD}
    # A recipe's own "colm" part is what the resolved one was made from: the same settings a second time.
    left_out = ("recipe.colm.", *(f"deepspeed.{name}." for name in _MONITORS))
    return {key: value for key, value in settings.items() if not key.startswith(left_out)}


def micro_batch_size(arm: Arm) -> int | None:
    """Examples per rank and backward pass, where the configuration says it."""
    found = lookup(arm.config, "deepspeed", "train_micro_batch_size_per_gpu")
    return _whole(found) or _whole(lookup(arm.config, "recipe", "micro_batch_size"))


def accumulation_steps(arm: Arm) -> int | None:
    """Micro-batches per step and rank, if all are full; None where the configuration does not say."""
    micro, world = micro_batch_size(arm), number(arm.config.get("world_size")) or 1.0
    return math.ceil(arm.coreset_size / (world * micro)) if micro and arm.coreset_size else None


def _method(run: Run) -> str:
    if not isinstance(run.config.get("colm"), dict):
        return f"{run.folder}"  # nothing to compare: an arm of its own
    return json.dumps(method_settings(run.config), sort_keys=True, default=str)


def _make_arm(name: str, runs: list[Run], small: Collection[str], counted: bool) -> Arm:
    arm = Arm(name, runs, [run_facts(run, small, counted=counted) for run in runs])
    used = arm.used
    for key in dict.fromkeys(key for found in used for key in found.scalars):
        values = [found.scalars[key] for found in used if key in found.scalars]
        arm.scalars[key] = Measure(max(values), None, len(values)) if key in _LARGEST else _measure(values)
    for group in dict.fromkeys(group for found in used for group in found.groups):
        members = [found.groups[group] for found in used if group in found.groups]
        values_of = {
            key: [member[key] for member in members if key in member]
            for key in dict.fromkeys(key for member in members for key in member)
        }
        arm.groups[group] = {
            key: Measure(max(values), None, len(values)) if group == "phase_gib" else _measure(values)
            for key, values in values_of.items()
        }
    return arm


def _measure(values: Sequence[float]) -> Measure:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measure(float(np.mean(values)), error, len(values))


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _arm_name(runs: Sequence[Run]) -> str:
    first = runs[0].name
    if len(runs) == 1:
        return first
    if all(run.name == first for run in runs):
        return first
    shared = first
    for run in runs[1:]:
        while not run.name.startswith(shared):
            shared = shared[:-1]
    shared = shared.rstrip(" -_./(:=0123456789")
    for word in ("seed", "Seed", "s"):
        cut = shared.removesuffix(word)
        if cut != shared and (not cut or cut[-1] in " -_./("):
            shared = cut.rstrip(" -_./(")
    return shared or first


def _distinct(shown: Sequence[str]) -> list[str]:
    """Number repeated names, so that no two arms are called the same."""
    seen: dict[str, int] = {}
    taken = set(shown)
    result = []
    for name in shown:
        seen[name] = seen.get(name, 0) + 1
        label, count = name, seen[name]
        while count > 1 and label in taken:
            label = f"{name} ({count})"
            count += 1
        taken.add(label)
        result.append(label)
    return result
