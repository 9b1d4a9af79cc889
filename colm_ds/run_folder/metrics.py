"""Declare every number of a step once: where it is, its unit, how a run sums it up, and where it is shown.

An *entry* is one object of metrics.jsonl: `StepStats` as a dictionary, with `heldout` in the steps that evaluate.
metrics.jsonl, the monitors, summary.json, report, watch and the Trainer's log loop over `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from colm_ds.run_folder.read import lookup, number, numbers

Total = Literal["mean", "sum", "maximum", "last", "median", "recent mean"]
"""How the values of a run's steps become one: `median` over the steps whose time counts (see `timed`), `recent mean`
over the last `RECENT`, `last` the last value."""

RECENT = 10


@dataclass(frozen=True)
class Metric:
    """One number of a step, or one for each source, phase or kind.

    Attributes:
        name: its place in an entry, keys with dots between them.
        title: in tables and pictures.
        unit: "s", "GiB", "nats/token", ...; empty for counts and shares.
        by: what its names are ("source", "phase", "kind"), if it is a mapping; empty for one number.
        total: how a run sums it up; None: not at all.
        summary: its key in summary.json; empty: it is not there.
        tag: its name in DeepSpeed's monitors, `{}` standing for a name of the mapping; empty: it is not there.
        log: its name in the Trainer's log, after `colm/`; empty: it is not there.
        brief: whether it is among the few numbers that the Trainer logs by default.
        watched: whether `colm-ds watch` has a line for it.
        is_share: whether monitors show the mapping's values as shares of their sum.
        compute: gives its value from the entry's other numbers; None: the step measures it.
    """

    name: str
    title: str
    unit: str = ""
    by: str = ""
    total: Total | None = None
    summary: str = ""
    tag: str = ""
    log: str = ""
    brief: bool = False
    watched: bool = False
    is_share: bool = False
    compute: Callable[[Mapping[str, Any]], float | Mapping[str, float] | None] | None = None

    def values(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Return its finite values in an entry by name, of a single number by ""; empty where the entry has none."""
        content = lookup(entry, *self.name.split("."))
        if content is None and self.compute is not None:
            content = self.compute(entry)
        if self.by:
            return numbers(content)
        value = float(content) if isinstance(content, bool) else number(content)
        return {} if value is None else {"": value}

    def over(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return what a run's steps come to, by name; empty if `total` is None or no step has a value.

        Args:
            entries: of all steps, ascending.
        """
        if self.total is None:
            return {}
        if self.total == "median":
            rows = [self.values(entry) for entry in timed(entries)]
            rows = [row for row in rows if row]
            names = sorted({name for row in rows for name in row})  # a phase that a step did not have took no time
            return {name: float(np.median([row.get(name, 0.0) for row in rows])) for name in names}
        by_name: dict[str, list[float]] = {}
        for entry in entries[-RECENT:] if self.total == "recent mean" else entries:
            for name, value in self.values(entry).items():
                by_name.setdefault(name, []).append(value)
        return {name: _TOTALS[self.total](values) for name, values in by_name.items()}


_TOTALS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "recent mean": lambda values: float(np.mean(values)),
    "sum": lambda values: float(sum(values)),
    "maximum": max,
    "last": lambda values: values[-1],
}

METRICS: list[Metric] = [
    Metric("step", "step", tag="Train/Samples/step"),
    Metric("loss", "training loss", "nats/token", total="recent mean", summary="loss", tag="Train/Samples/train_loss"),
    Metric("lr", "learning rate", tag="Train/Samples/lr"),
    Metric("grad_norm", "gradient norm", total="mean", tag="Train/Samples/grad_norm"),
    Metric("tokens", "tokens trained", "tokens", total="sum", summary="tokens_trained", tag="Train/tokens"),
    Metric(
        "examples_probed",
        "examples probed",
        "examples",
        total="sum",
        summary="examples_probed",
        tag="Train/examples_probed",
        log="examples_probed",
        brief=True,
    ),
    Metric(
        "examples_trained",
        "examples trained",
        "examples",
        total="sum",
        summary="examples_trained",
        tag="Train/examples_trained",
    ),
    Metric(
        "padding_fraction",
        "share of padding",
        total="mean",
        summary="padding_fraction",
        tag="Train/padding_fraction",
    ),
    Metric("micro_batches.count", "micro-batches of a rank", total="mean", tag="Train/micro_batches"),
    Metric("micro_batches.largest_tokens", "tokens of the largest micro-batch", "tokens", total="maximum"),
    Metric("skipped", "skipped steps", total="sum", summary="skipped_steps", tag="Train/skipped"),
    Metric("data_use", "passes over the data", by="kind", total="last", summary="data_use", tag="Data/{}"),
    Metric(
        "time_s",
        "time of a step",
        "s",
        by="phase",
        total="median",
        summary="phase_s",
        tag="Time/{}_s",
        log="{}_s",
        brief=True,
    ),
    Metric("memory_gib", "peak memory", "GiB", by="phase", total="maximum", tag="Memory/{}_gib"),
    Metric("memory_parts_gib", "parts of the peak", "GiB", by="part", tag="MemoryParts/{}_gib"),
    Metric("exchange_bytes", "bytes exchanged in a step", "B", by="kind", total="mean", tag="Exchange/{}_bytes"),
    Metric(
        "coreset.kept_small",
        "examples of small sources",
        total="mean",
        tag="Coreset/kept_small",
        log="kept_small",
        brief=True,
    ),
    Metric(
        "coreset.dropped_small", "small-source examples that did not fit", total="sum", log="dropped_small", brief=True
    ),
    Metric(
        "coreset.nonfinite",
        "examples left out, not finite",
        total="sum",
        summary="nonfinite_examples",
        log="nonfinite",
        brief=True,
    ),
    Metric(
        "coreset.per_source",
        "examples trained by source",
        by="source",
        total="sum",
        tag="Share/{}",
        log="chosen/{}",
        is_share=True,
    ),
    Metric("coreset.coherence", "coherence", by="source", total="mean", tag="Coherence/{}", log="coherence/{}"),
    Metric("coreset.loss", "training loss by source", "nats/token", by="source", total="mean", tag="Loss/{}"),
    Metric(
        "coreset.label_tokens",
        "labelled tokens of an example",
        "tokens",
        by="kind",
        total="mean",
        summary="label_tokens",
        tag="Coreset/label_tokens_{}",
        log="label_tokens_{}",
    ),
    Metric(
        "coreset.gradient_variance",
        "squared error of the gradient",
        by="kind",
        total="mean",
        summary="gradient_variance",
        tag="Coreset/gradient_variance_{}",
        watched=True,
    ),
    Metric(
        "coreset.stored_signal",
        "stored signals: share of the pools, age in steps, cosine",
        by="kind",
        total="mean",
        summary="stored_signal",
        tag="Coreset/stored_signal_{}",
        watched=True,
    ),
    Metric("heldout.overall", "held-out loss", "nats/token", total="last", tag="Heldout/overall"),
    Metric("heldout.macro", "held-out loss, mean of sources", "nats/token", total="last", tag="Heldout/macro"),
    Metric("heldout.accuracy", "held-out accuracy", total="last", tag="Heldout/accuracy"),
    Metric("heldout.per_source", "held-out loss by source", "nats/token", by="source", total="last", tag="Heldout/{}"),
]
"""Every metric of a step, in the order of tables."""


def with_computed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with the metrics that are computed from its other numbers; entries without a loss stay as is."""
    complete = dict(entry)
    if "loss" not in complete:
        return complete
    for metric in METRICS:
        value = None if metric.compute is None else metric.compute(complete)
        if value is not None:
            *outer, last = metric.name.split(".")
            holder: dict[str, Any] = complete
            for key in outer:
                holder[key] = dict(holder.get(key) or {})
                holder = holder[key]
            holder[last] = value
    return complete


def is_measured(entry: Mapping[str, Any]) -> bool:
    """Return whether a step made extra measurements: allocations counted, or the gradient's variance."""
    return bool(entry.get("counted_gib") or lookup(entry, "coreset", "gradient_variance"))


def timed(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the steps whose time counts: not the first, which warms up, and none with extra measurements.

    If no other steps exist, all of them count.

    Args:
        entries: of all steps, ascending.
    """
    usual = [entry for entry in entries[1:] if not is_measured(entry) and number(lookup(entry, "time_s", "total"))]
    return usual or [entry for entry in entries if number(lookup(entry, "time_s", "total"))]


def step_seconds(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return `median`, `p10` and `p90` of a step's seconds over the steps whose time counts; empty without times."""
    totals = [entry["time_s"]["total"] for entry in timed(entries)]
    quantiles = {"median": 50, "p10": 10, "p90": 90}
    return {name: float(np.percentile(totals, place)) for name, place in quantiles.items()} if totals else {}


def data_loading_share(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of the steps' seconds spent waiting for data; None without times."""
    times = [numbers(entry["time_s"]) for entry in timed(entries)]
    total = sum(time["total"] for time in times)
    return sum(time.get("data", 0.0) for time in times) / total if total else None


Event = tuple[str, float, int]
"""Tag, value, and examples trained on until then: what DeepSpeed's monitors take."""


def events(entry: Mapping[str, Any], samples: int) -> list[Event]:
    """Return what monitors are told of an entry.

    `Train/Samples/lr` and `Train/Samples/train_loss` are DeepSpeed's own tags.

    Args:
        entry: of a step, or of an evaluation alone.
        samples: examples trained on until then.
    """
    told = []
    for metric in METRICS:
        if not metric.tag:
            continue
        values = metric.values(entry)
        divisor = (sum(values.values()) or 1.0) if metric.is_share else 1.0
        told += [(metric.tag.format(_flat(name)), value / divisor, samples) for name, value in values.items()]
    return told


def log_values(entry: Mapping[str, Any], *, brief: bool) -> dict[str, float]:
    """Return a step's values for a trainer's log, `colm/` before each name.

    Args:
        entry: of the step.
        brief: only the few metrics that are `brief`.
    """
    logged = [metric for metric in METRICS if metric.log and (metric.brief or not brief)]
    return {
        f"colm/{metric.log.format(name)}": float(value)
        for metric in logged
        for name, value in metric.values(entry).items()
    }


def _flat(name: str) -> str:
    """Return a source's name as one part of a tag: the CSV monitor makes a file name of it."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name)[:100]
