"""The numbers of one run: from its summary where it has one, else from the steps that it logged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colm_ds.run_folder.read import Run, lookup, names, number, numbers

PHASES = ("data", "probe", "exchange", "select", "forward", "backward", "train", "step")
_NOT_ADDED = ("total", "save")
BYTE_KINDS = ("signals", "selection", "tokens")
MEMORY_PHASES = ("probe", "exchange", "select", "train", "forward", "backward", "step", "save")


@dataclass(frozen=True)
class Curve:
    """A quantity along a run; all lists have one entry for each point.

    Attributes:
        steps: optimizer steps.
        seconds: training time until then, evaluation not counted; empty if the run logged no times.
        values: the quantity.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """Numbers of one run; what it does not tell is absent.

    Attributes:
        num_steps: the last step logged, or the summary's number of steps.
        scalars: one number each, see `run_facts`.
        groups: numbers by source, phase or kind, see `run_facts`.
        train_loss: training loss by step.
        heldout: held-out losses by step: `overall`, `macro` and `small` (mean of the small sources).
        coherence: |mean g| / mean |g| by step of every source (or pool).
        source_losses: mean loss of the selected examples by step of every source.
        signals: `label_tokens.coreset`, `label_tokens.large_batch`, `gradient_variance.coreset` and `.random`, and
            `padding` (share of padding in training) by step.
        perplexity: on held-out chunks by step, `overall` and of every source.
        tokens: tokens trained on until then, by step.
        memory_kind: what peaks are: "allocated", "counted" (allocations, on a CPU) or "resident"; empty if not known.
    """

    num_steps: int | None
    scalars: dict[str, float]
    groups: dict[str, dict[str, float]]
    train_loss: Curve
    heldout: dict[str, Curve]
    coherence: dict[str, Curve]
    source_losses: dict[str, Curve]
    signals: dict[str, Curve]
    perplexity: dict[str, Curve]
    tokens: Curve
    memory_kind: str = ""


def small_sources(runs: Sequence[Run]) -> list[str]:
    """Names of the small sources: those that any run lists; by the |V|/c rule where no run has a list."""
    listed = [run.config["small_sources"] for run in runs if isinstance(run.config.get("small_sources"), list)]
    if listed:
        return list(dict.fromkeys(name for found in listed for name in names(found)))
    counts: dict[str, float] = {}
    for run in runs:
        counts = counts or numbers(run.config.get("sources"))
    if not counts:
        return []
    from colm_ds.selection import split_sources  # imports torch: only where it is needed

    return list(split_sources({name: int(count) for name, count in counts.items() if count >= 0})[0])


def has_counted(run: Run) -> bool:
    """Whether allocations were counted in some step of a run on a CPU."""
    return any(numbers(step.get("counted_gib")) for step in run.steps)


def run_facts(run: Run, small: Collection[str], *, counted: bool = False) -> Facts:
    """Collect the numbers of a run.

    Scalars: heldout_overall, heldout_macro, heldout_small, perplexity, exact_match, num_questions, accuracy and
    accuracy_before (of classification; before training), step_s, step_s_p10, step_s_p90, data_loading_share (of the
    seconds of all steps), probe_gib, train_gib, peak_gib, examples_trained, examples_probed, tokens_trained, wall_s,
    padding_fraction, num_micro_batches (of a step and rank, mean), largest_tokens (padded, of
    the largest micro-batch in the steps whose peaks are taken).
    Groups: heldout, exact_match, data_share and coreset_share by source, phase_s by phase, exchange_bytes by kind (mean
    of a step), coherence by source (mean over steps), phase_gib (peaks) by phase, parts_gib (of the largest peak).

    Args:
        run: the run.
        small: names of the small sources.
        counted: take peaks from the steps whose allocations were counted.
    """
    seconds = _seconds(run)
    last = max(run.heldout, default=0)
    heldout = lookup(run.summary, "heldout")
    if not isinstance(heldout, Mapping):
        heldout = run.heldout.get(last, {}) if last > 0 else {}
    losses = heldout_losses(heldout, small)
    coherence = _by_name(run, "coherence", seconds)
    pairs = {key: _by_name(run, key, seconds) for key in ("label_tokens", "gradient_variance")}
    groups = {
        "heldout": numbers(lookup(heldout, "per_source")),
        "exact_match": numbers(lookup(run.summary, "exact_match", "per_source")),
        "data_share": _shares(numbers(run.config.get("sources"))),
        "coreset_share": _shares(_sums(run.steps, "coreset", "per_source")),
        "phase_s": _phase_seconds(run),
        "exchange_bytes": {
            kind: total / len(run.steps) for kind, total in _sums(run.steps, "exchange_bytes").items() if run.steps
        },
        "coherence": {name: float(np.mean(curve.values)) for name, curve in coherence.items()},
        "phase_gib": _phase_peaks(run, counted),
    }
    groups["parts_gib"] = _peak_parts(run, groups["phase_gib"] if counted else {})
    scalars = {f"heldout_{key}": value for key, value in losses.items()} | _costs(run, counted)
    scalars |= _largest(groups["phase_gib"])
    for key in ("overall", "num_questions"):
        value = number(lookup(run.summary, "exact_match", key))
        if value is not None:
            scalars["exact_match" if key == "overall" else key] = value
    first = lookup(run.summary, "heldout_before") or run.heldout.get(0, {})
    ends = {"perplexity": lookup(heldout, "perplexity", "overall"), "accuracy": lookup(heldout, "accuracy")}
    for key, found in (ends | {"accuracy_before": lookup(first, "accuracy")}).items():
        value = number(found)
        if value is not None:
            scalars[key] = value
    return Facts(
        num_steps=_num_steps(run),
        scalars=scalars,
        groups={key: values for key, values in groups.items() if values},
        train_loss=_curve(((step, found.get("loss")) for step, found in _by_step(run)), seconds),
        heldout=_heldout_curves(run, small, seconds),
        coherence=coherence,
        source_losses=_by_name(run, "loss", seconds),
        signals={
            **{f"{key}.{name}": curve for key, curves in pairs.items() for name, curve in curves.items()},
            "padding": _curve(((step, found.get("padding_fraction")) for step, found in _by_step(run)), seconds),
        },
        perplexity=_perplexity_curves(run, seconds),
        tokens=_curve(_tokens(run), seconds),
        memory_kind="counted" if counted else _memory_kind(run),
    )


def heldout_losses(heldout: Mapping[str, Any], small: Collection[str]) -> dict[str, float]:
    """`overall`, `macro` and `small` of a `heldout` object, those that it has or that follow from its sources."""
    per_source = numbers(heldout.get("per_source"))
    kept = [per_source[name] for name in small if name in per_source]
    found = {
        "overall": number(heldout.get("overall")),
        "macro": number(heldout.get("macro")),
        "small": float(np.mean(kept)) if kept and len(kept) == len(small) else None,
    }
    if found["macro"] is None and per_source:
        found["macro"] = float(np.mean(list(per_source.values())))
    return {key: value for key, value in found.items() if value is not None}


def _by_step(run: Run) -> list[tuple[int, dict[str, Any]]]:
    return [(int(found["step"]), found) for found in run.steps]


def _num_steps(run: Run) -> int | None:
    steps = number(run.summary.get("steps"))
    if steps is not None:
        return int(steps)
    return int(run.steps[-1]["step"]) if run.steps else None


def _seconds(run: Run) -> dict[int, float]:
    """Training seconds at the end of every step, 0 at step 0; a step without its time counts as the median."""
    times = [_step_seconds(found) for found in run.steps]
    known = [value for value in times if value is not None]
    if not known:
        return {}
    median = float(np.median(known))
    ends = np.cumsum([median if value is None else value for value in times])
    return {0: 0.0} | {step: float(end) for (step, _), end in zip(_by_step(run), ends, strict=True)}


def _step_seconds(step: Mapping[str, Any]) -> float | None:
    """Seconds of a step; None where its allocations were counted, which takes much longer."""
    return None if numbers(step.get("counted_gib")) else number(lookup(step, "time_s", "total"))


def _curve(points: Iterable[tuple[int, Any]], seconds: Mapping[int, float]) -> Curve:
    kept = [(step, number(value)) for step, value in points]
    kept = [(step, value) for step, value in kept if value is not None and (not seconds or step in seconds)]
    return Curve(
        [step for step, _ in kept],
        [seconds[step] for step, _ in kept] if seconds else [],
        [value for _, value in kept if value is not None],
    )


def _heldout_curves(run: Run, small: Collection[str], seconds: Mapping[int, float]) -> dict[str, Curve]:
    losses = {step: heldout_losses(found, small) for step, found in run.heldout.items()}
    curves = {
        key: _curve(((step, found.get(key)) for step, found in losses.items()), seconds)
        for key in ("overall", "macro", "small")
    }
    return {key: curve for key, curve in curves.items() if curve.steps}


def _perplexity_curves(run: Run, seconds: Mapping[int, float]) -> dict[str, Curve]:
    """Of pretraining; nothing for a run without perplexities."""
    points: dict[str, list[tuple[int, Any]]] = {}
    for step, found in run.heldout.items():
        overall = number(lookup(found, "perplexity", "overall"))
        known = {} if overall is None else {"overall": overall}
        for name, value in {**known, **numbers(lookup(found, "perplexity", "per_source"))}.items():
            points.setdefault(name, []).append((step, value))
    curves = {name: _curve(values, seconds) for name, values in points.items()}
    return {name: curve for name, curve in curves.items() if curve.steps}


def _tokens(run: Run) -> list[tuple[int, float]]:
    """Tokens trained on when a step is done, 0 at step 0; nothing if some step does not tell."""
    counts = [(step, number(found.get("tokens"))) for step, found in _by_step(run)]
    known = [(step, count) for step, count in counts if count is not None]
    if len(known) < len(counts):
        return []
    ends = np.cumsum([count for _, count in known])
    return [(0, 0.0), *((step, float(end)) for (step, _), end in zip(known, ends, strict=True))]


def _by_name(run: Run, key: str, seconds: Mapping[int, float]) -> dict[str, Curve]:
    """Curves of the numbers of one mapping of the coreset, such as those by source."""
    points: dict[str, list[tuple[int, float]]] = {}
    for step, found in _by_step(run):
        for name, value in numbers(lookup(found, "coreset", key)).items():
            points.setdefault(name, []).append((step, value))
    return {name: _curve(found, seconds) for name, found in points.items()}


def _sums(steps: Iterable[Mapping[str, Any]], *keys: str) -> dict[str, float]:
    """Sum over the steps of every entry of the mapping below `keys`."""
    sums: dict[str, float] = {}
    for found in steps:
        for name, value in numbers(lookup(found, *keys)).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total > 0 else {}


def _phase_seconds(run: Run) -> dict[str, float]:
    """Median seconds of each phase of a step; one that a step does not have took 0 s in it.

    `train` is what it has beyond its parts `forward` and `backward`, where those were measured.
    """
    found = numbers(run.summary.get("phase_s"))
    if not found:
        steps = [numbers(step.get("time_s")) for step in run.steps if _step_seconds(step) is not None]
        steps = [times for times in steps if times]
        phases = dict.fromkeys(name for times in steps for name in times)
        found = {name: float(np.median([times.get(name, 0.0) for times in steps])) for name in phases}
    for name in _NOT_ADDED:
        found.pop(name, None)
    if "backward" in found and "train" in found:
        found["train"] = max(0.0, found["train"] - found["forward"] - found["backward"])
    return {name: found[name] for name in (*PHASES, *sorted(set(found) - set(PHASES))) if name in found}


def _phase_peaks(run: Run, counted: bool) -> dict[str, float]:
    """Largest peak of each phase in GiB, and `peak`, that of the run; phases that did not run are left out."""
    found = {} if counted else numbers(run.summary.get("peak_memory_gib"))
    if not found:
        for step in run.steps:
            for name, value in numbers(step.get("counted_gib" if counted else "memory_gib")).items():
                found[name] = max(found.get(name, 0.0), value)
    found = {"peak" if name == "total" else name: value for name, value in found.items() if value > 0}
    return {name: found[name] for name in (*MEMORY_PHASES, "peak") if name in found}


def _largest(phases: Mapping[str, float]) -> dict[str, float]:
    """`probe_gib`, `train_gib` and `peak_gib`: before, during and over all phases."""
    found = {}
    for key, members in (("probe", MEMORY_PHASES[:3]), ("train", MEMORY_PHASES[3:7]), ("peak", (*phases, "peak"))):
        known = [phases[name] for name in members if name in phases]
        if known:
            found[f"{key}_gib"] = max(known)
    return found


def _peak_parts(run: Run, counted: Mapping[str, float]) -> dict[str, float]:
    """What the largest peak consists of, in GiB.

    Args:
        run: the run.
        counted: counted peaks by phase, empty if peaks are measured ones: what they have beyond the parts that are held
            is then activations, or the probe's where the peak is.
    """
    found = numbers(run.summary.get("peak_memory_parts_gib"))
    if not found and run.steps:
        largest = max(run.steps, key=lambda step: number(lookup(step, "memory_gib", "peak")) or 0.0)
        found = numbers(largest.get("memory_parts_gib"))
    if not found or not counted:
        return found
    kept = ("weights", "gradients", "optimizer", "communication", "replay", "selection")
    held = {name: found.get(name, 0.0) for name in kept}
    peaks = {key: counted.get(key, 0.0) for key in (*MEMORY_PHASES, "peak")}
    is_choice = max(peaks[name] for name in MEMORY_PHASES[:3]) >= max(peaks[name] for name in MEMORY_PHASES[3:])
    return held | {"probe" if is_choice else "activations": max(0.0, max(peaks.values()) - sum(held.values()))}


def _memory_kind(run: Run) -> str:
    known = (found.get("memory_kind") for found in (run.summary, *run.steps[-1:]))
    kind = next((str(found) for found in known if found), "")
    device = str(lookup(run.config, "machine", "device") or "").lower()
    return kind or ("" if not device else "resident" if device.startswith("cpu") else "allocated")


def _costs(run: Run, counted: bool) -> dict[str, float]:
    summary = run.summary
    measured = [step for step in run.steps if not counted or numbers(step.get("counted_gib"))]
    found: dict[str, float | None] = {
        "wall_s": number(summary.get("wall_s")),
        "padding_fraction": _mean(found.get("padding_fraction") for found in run.steps),
        "num_micro_batches": _mean(lookup(found, "micro_batches", "count") for found in run.steps),
        "largest_tokens": _most(lookup(found, "micro_batches", "largest_tokens") for found in measured),
    }
    times = [value for value in map(_step_seconds, run.steps) if value is not None]
    found["data_loading_share"] = _loading_share(run)
    for key, name, quantile in (("step_s", "median", 0.5), ("step_s_p10", "p10", 0.1), ("step_s_p90", "p90", 0.9)):
        value = number(lookup(summary, "step_s", name))
        found[key] = float(np.quantile(times, quantile)) if value is None and times else value
    for key, name in (
        ("examples_trained", "examples_trained"),
        ("examples_probed", "examples_probed"),
        ("tokens_trained", "tokens"),
    ):
        value = number(summary.get(key))
        counts = [number(step.get(name)) for step in run.steps]
        known = [count for count in counts if count is not None]
        found[key] = sum(known) if value is None and known else value
    return {key: value for key, value in found.items() if value is not None}


def _loading_share(run: Run) -> float | None:
    """Share of the steps' seconds that passed in waiting for data; None for runs that did not measure it."""
    share = number(run.summary.get("data_loading_share"))
    pairs = [(number(lookup(step, "time_s", "data")), _step_seconds(step)) for step in run.steps]
    known = [(waited, total) for waited, total in pairs if waited is not None and total]
    if share is None and known:
        share = sum(waited for waited, _ in known) / sum(total for _, total in known)
    return share


def _most(values: Iterable[Any]) -> float | None:
    return max((value for value in map(number, values) if value is not None), default=None)


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in map(number, values) if value is not None]
    return float(np.mean(known)) if known else None
