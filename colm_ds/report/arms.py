"""Arms: runs that differ in their seed only; what each of them is, its numbers over seeds, and whom it is held against.

The table of a report has a row for each arm and a column for each number of `report.facts`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from colm_ds.report.facts import Curve, Facts, group, has_counted, run_facts, small_sources
from colm_ds.report.statistics import Difference, Measure, difference, measure, standard_error
from colm_ds.run_folder.read import Run, lookup, number

# Keys that tell runs of one arm apart: seeds, names and places.
_NOT_THE_METHOD = {
    *("seed", "name", "run_name", "date", "output", "output_dir", "output_folder", "run_folder", "overwrite"),
    *("cache_dir", "save_every", "keep_last", "resume", "verbose", "monitor"),
}
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_LARGEST = ("peak_memory_gib", "micro_batches.largest_tokens")  # over seeds the largest counts

BY_SIGNALS = {"colm": "medoids", "importance": "draws by importance", "balanced": "balanced draws"}
"""Selectors that choose by gradients or what stands for them, and what they pick."""

AXES = {
    "steps": "step",
    "tokens": "tokens trained on",
    "seconds": "seconds of training",
}
"""Axes that curves are drawn against, and their labels."""


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs of the same method with different seeds.

    Attributes:
        name: shown name, different from every other arm's.
        facts: numbers and curves of each run.
        used: those that count: of finished runs, or of all if none is finished.
        values: numbers over the seeds that count, by their paths.
        config: of the first run.
        selector: its name.
        large_batch_size: r.
        coreset_size: b.
        micro_batch_size: examples per rank and backward pass.
        num_ranks: 1 where it is not known.
    """

    name: str
    facts: list[Facts]
    used: list[Facts]
    values: dict[str, Measure]
    config: dict[str, Any]
    selector: str | None
    large_batch_size: int | None
    coreset_size: int | None
    micro_batch_size: int | None
    num_ranks: float

    @property
    def runs(self) -> list[Run]:
        """Return its runs."""
        return [facts.run for facts in self.facts]

    @property
    def is_finished(self) -> bool:
        """Return whether a run of it is finished."""
        return any(run.is_finished for run in self.runs)

    @property
    def accumulation_steps(self) -> int | None:
        """Return the micro-batches per step and rank, if all are full; None where the configuration does not say."""
        micro, size = self.micro_batch_size, self.coreset_size
        return math.ceil(size / (self.num_ranks * micro)) if micro and size else None

    @property
    def is_plain(self) -> bool:
        """Return whether it is plain training: on the whole large batch, or on a random part of it."""
        if self.selector is None:
            return False
        trains_all = self.large_batch_size is not None and self.large_batch_size == self.coreset_size
        return self.selector in ("full", "random") or trains_all

    @property
    def num_steps(self) -> int | None:
        """Return the steps of its longest run that counts."""
        return max((facts.num_steps for facts in self.used if facts.num_steps is not None), default=None)

    def mean(self, key: str) -> float | None:
        """Return the mean of a number."""
        return self.values[key].mean if key in self.values else None

    def group(self, name: str) -> dict[str, Measure]:
        """Return the numbers called `name.MEMBER`, by member."""
        return group(self.values, name)

    def curves(self, read: Callable[[Facts], dict[str, Curve]]) -> dict[str, Curve]:
        """Return the mean curves over the runs that count; `read` gives those of one, as `Facts.heldout` does."""
        runs = [read(facts) for facts in self.used]
        members = dict.fromkeys(name for curves in runs for name in curves)
        return {name: mean_curve([curves[name] for curves in runs if name in curves]) for name in members}

    def step_curves(self, path: str) -> dict[str, Curve]:
        """Return the mean curves of an entry of `metrics.jsonl`, see `Facts.curves`."""
        return self.curves(lambda facts: facts.curves(path))

    def step_curve(self, path: str) -> Curve:
        """Return the mean curve of a single number of `metrics.jsonl`; an empty one if no run has it."""
        return self.step_curves(path).get("", Curve())


def make_arms(runs: Sequence[Run] | Mapping[str, Sequence[Run]]) -> list[Arm]:
    """Gather runs into arms. Peaks are those of counted allocations where every run has them.

    Args:
        runs: those whose configurations differ in seeds, names and places only become one arm, the same seed twice
            two; or runs by the name of their arm.

    Returns:
        The arms in the order of their first runs.
    """
    if isinstance(runs, Mapping):
        gathered = [(name, list(members)) for name, members in runs.items() if members]
    else:
        by_method = _by_method(runs)
        gathered = list(zip(_distinct([_arm_name(members) for members in by_method]), by_method, strict=True))
    everyone = [run for _, members in gathered for run in members]
    small, counted = small_sources(everyone), all(has_counted(run) for run in everyone)
    return [_make_arm(name, [run_facts(run, small, counted=counted) for run in members]) for name, members in gathered]


def references(arm: Arm, arms: Sequence[Arm]) -> dict[str, Arm]:
    """Choose the arms to hold an arm against, of those that are there.

    Of several plain arms of one size, those with as many optimizer steps come first, and of them one with the arm's
    micro-batch is meant; `plain_r_steps` is another one with as many accumulation steps as the arm.

    Returns:
        `plain_r`: plain training on as many examples as it looks at; `plain_r_steps`: see above; `plain_b`: on as many
        as it trains on; `keep_random`: small sources kept and the rest at random, of the same sizes. Never the arm
        itself.
    """
    plain = [other for other in arms if other is not arm and other.is_plain and other.coreset_size]
    plain.sort(key=lambda other: other.num_steps != arm.num_steps)
    large, size = arm.large_batch_size, arm.coreset_size
    if arm.is_plain and large == size:  # trains on all it looks at: the sizes are those of the whole comparison
        sizes = [other.coreset_size for other in [*plain, arm] if other.coreset_size]
        large, size = max(sizes, default=None), min(sizes, default=None)
    chosen: dict[str, Arm] = {}
    for role, wanted in (("plain_r", large), ("plain_b", size)):
        if arm.is_plain and wanted == arm.coreset_size:
            continue
        of_size = [other for other in plain if other.coreset_size == wanted]
        alike = [other for other in of_size if other.micro_batch_size == arm.micro_batch_size]
        if of_size:
            chosen[role] = (alike or of_size)[0]
        steps = [other for other in of_size if other.accumulation_steps == arm.accumulation_steps is not None]
        if role == "plain_r" and alike and steps and chosen[role] not in steps:
            chosen["plain_r_steps"] = steps[0]
    sizes_of_arm = (arm.large_batch_size, arm.coreset_size)
    controls = [other for other in arms if other.selector == "keep_random"]
    controls = [other for other in controls if (other.large_batch_size, other.coreset_size) == sizes_of_arm]
    needs_control = not arm.is_plain and arm.selector not in (None, "keep_random")
    return chosen | ({"keep_random": controls[0]} if controls and needs_control else {})


def equal_budget(arm: Arm, other: Arm, axis: str, key: str = "overall") -> Difference | None:
    """Subtract held-out losses where both arms have spent as much: the most that all runs of both have spent.

    What is spent is one of `AXES`, the loss one of those of `Facts.heldout`. Runs that ended with a loss that is not
    finite, which means over seeds leave out as well, would end the comparison where they were last finite.
    """
    curves = [
        [(facts.run.seed, facts.heldout().get(key, Curve())) for facts in _to_the_end(each)] for each in (arm, other)
    ]
    ends = [x[-1] if (x := getattr(curve, axis)) else 0.0 for each in curves for _, curve in each]
    losses = [
        {
            f"run {place}" if seed is None else seed: loss
            for place, (seed, curve) in enumerate(each)
            if (loss := curve.at(axis, min(ends))) is not None
        }
        for each in curves
    ]
    return difference(*(measure(each) for each in losses)) if min(ends) > 0 and all(losses) else None


def _to_the_end(arm: Arm) -> Sequence[Facts]:
    """Return the runs that count and have a held-out loss at their end; all that count if none has."""
    return [facts for facts in arm.used if "heldout.overall" in facts.values] or arm.used


def describe(arm: Arm) -> str | None:
    """Say in a few words what an arm trains on; None if its configuration does not say."""
    known = {
        "full": "plain, every example",
        "random": "plain, random",
        "keep_random": "small sources kept, rest random",
    }
    picks = BY_SIGNALS.get(arm.selector or "")
    if picks is None:
        return known.get(arm.selector or "", arm.selector)
    colm = arm.config["colm"]
    estimator = str(lookup(colm, "probe", "estimator") or "signal")
    count = lookup(colm, "probe", "num_probes")
    if estimator not in ("exact", "tokens") and isinstance(count, int):
        estimator += f" K = {count}"
    pool = " in one pool" if colm.get("per_source") is False else ""
    weights = f", {colm.get('weights', 'uniform')} weights" if arm.selector == "colm" else ""
    return f"{picks}{pool} by {estimator}{weights}"


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average curves at the steps that all of them have."""
    if len(curves) < 2:
        return curves[0] if curves else Curve()
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))

    def rows(name: str) -> list[list[float]]:
        lists = [getattr(curve, name) for curve in curves]
        if not all(lists):
            return []
        known = [dict(zip(curve.steps, values, strict=True)) for curve, values in zip(curves, lists, strict=True)]
        return [[by_step[step] for by_step in known] for step in steps]

    seconds, tokens, values = ([float(np.mean(row)) for row in rows(name)] for name in ("seconds", "tokens", "values"))
    return Curve(steps, seconds, tokens, values, [standard_error(row) or 0.0 for row in rows("values")])


def value_text(value: Any) -> str:
    """Write a setting as it is compared and shown: text stays text, everything else is JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the entries of nested mappings with dotted keys."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value_text(values)


def method_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what makes up the method of a run, with dotted keys: no seed, name or place."""
    named = ("colm", "recipe", "deepspeed", "world_size", "num_parameters", "num_trainable", "sources")
    values = {key: config.get(key) for key in named}
    if config.get("recipe") and isinstance(values["sources"], Mapping):
        values["sources"] = sorted(values["sources"])  # how many of each are held out may depend on the seed
    kept = flatten(values)
    # A recipe's own "colm" part is what the resolved one was made from: the same settings a second time.
    left_out = ("recipe.colm.", *(f"deepspeed.{name}." for name in _MONITORS))
    return {
        key: value
        for key, value in kept
        if key.rsplit(".", 1)[-1] not in _NOT_THE_METHOD and not key.startswith(left_out)
    }


def _make_arm(name: str, facts: list[Facts]) -> Arm:
    used = [each for each in facts if each.run.is_finished] or facts
    values = {}
    for key in dict.fromkeys(key for row in used for key in row.values):
        by_seed = {
            f"run {place}" if row.run.seed is None else row.run.seed: row.values[key]
            for place, row in enumerate(used)
            if key in row.values
        }
        values[key] = measure(by_seed, largest=key.startswith(_LARGEST))
    config = facts[0].run.config
    selector, large = lookup(config, "colm", "selector"), _whole(lookup(config, "colm", "large_batch_size"))
    size = _whole(lookup(config, "colm", "coreset_size")) or _whole(lookup(config, "deepspeed", "train_batch_size"))
    micro = _whole(lookup(config, "deepspeed", "train_micro_batch_size_per_gpu"))
    return Arm(
        name,
        facts,
        used,
        values,
        config,
        selector if isinstance(selector, str) else None,
        large,
        large if selector == "full" else size,
        micro or _whole(lookup(config, "recipe", "micro_batch_size")),
        number(config.get("world_size")) or 1.0,
    )


def _by_method(runs: Sequence[Run]) -> list[list[Run]]:
    gathered: dict[str, list[Run]] = {}
    for place, run in enumerate(runs):
        is_known = isinstance(run.config.get("colm"), dict) and run.seed is not None  # else an arm of its own
        key = json.dumps(method_settings(run.config), sort_keys=True) if is_known else f"{place}"
        while run.seed in [other.seed for other in gathered.get(key, [])]:
            key += " again"
        gathered.setdefault(key, []).append(run)
    return list(gathered.values())


def _arm_name(runs: Sequence[Run]) -> str:
    """Return what the runs' names share, without a seed."""
    if len({run.name for run in runs}) == 1:
        return runs[0].name
    shared = runs[0].name
    while not all(run.name.startswith(shared) for run in runs):
        shared = shared[:-1]
    return re.sub(r"(?:^|[ \-_./(]+)(?:[Ss]eed|s)$", "", shared.rstrip(" -_./(:=0123456789")) or runs[0].name


def _distinct(shown: Sequence[str]) -> list[str]:
    """Number repeated names, so that no two arms are called the same."""
    labels: list[str] = []
    for name in shown:
        label, count = name, 2
        while label in labels or (label != name and label in shown):
            label, count = f"{name} ({count})", count + 1
        labels.append(label)
    return labels


def _whole(value: Any) -> int | None:
    count = number(value)
    return None if count is None else int(count)
