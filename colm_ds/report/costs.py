"""Costs of the arms: seconds by phase, peaks by phase and part, padding and exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from colm_ds.report.arms import Arm
from colm_ds.report.batch_sizes import batch_size_items
from colm_ds.report.charts import Picture, disc_picture
from colm_ds.report.facts import GIB, MEMORY_PHASES, PHASES, Curve
from colm_ds.report.section import (
    Item,
    ReportSection,
    View,
    arm_table,
    by_part,
    columns_of,
    curve_picture,
    extremes,
    group_columns,
    main_arm,
    member_table,
)
from colm_ds.report.tables import SEEDS_NOTE, Column, Table, compact, fixed, percent, quoted, whole

KINDS = {
    "allocated": "Peaks are memory allocated by PyTorch on one GPU, weights and optimizer included.",
    "counted": "Peaks are tensor allocations counted one by one in some steps on a CPU, weights and optimizer "
    "included, as an allocator's statistics are on a GPU.",
    "resident": "Peaks are the resident memory of one process on a CPU, which includes Python and the libraries' code. "
    "Differences say more than ratios.",
}
"""Explanations of the kinds of peaks, for a reader."""

_PARTS = ("weights", "gradients", "optimizer", "communication", "activations", "replay", "probe", "selection", "rest")
_GIB = "GiB (2^30 bytes)"


def costs_section(view: View) -> ReportSection:
    """Compare time and memory."""
    costs = columns_of("step_s.median", "peak_memory_gib.peak", "tokens_trained", "wall_s", "data_loading_share")
    table = arm_table("costs", "Time and memory", view.arms, costs, note=SEEDS_NOTE)
    items = [Item([_tradeoff(view)], [table]), _phases(view), _peaks(view), _parts(view)]
    items += [*batch_size_items(view), Item(tables=[_micro_batches(view)]), _traffic(view)]
    kinds = dict.fromkeys(arm.used[0].memory_kind for arm in [*view.arms, *view.sized])
    text = [
        "Times are medians over steps on rank 0. Peaks are the largest of all steps, ranks and seeds; the peak of "
        "training follows the micro-batch, not b: compare arms of the same micro-batch.",
        *(KINDS[kind] for kind in kinds if kind in KINDS),
    ]
    return ReportSection("costs", "Time and memory", text, items)


def _phases(view: View) -> Item:
    """Divide the seconds of a step."""
    steps = {"step_s.median": "a step", "step_s.p10": "fastest 10%", "step_s.p90": "slowest 10%"}
    note = (
        "data: waiting for the large batch; probe: the pass over it; exchange: signals between ranks; forward, "
        "backward: over the coreset (train: both together, in older runs); step: the optimizer; other: the rest of the "
        f"total. {SEEDS_NOTE}"
    )
    table = member_table(view, "phases", "Seconds of a step by phase", "phase_s", (*PHASES, "other"), steps, note)
    totals = {arm.name: arm.mean("step_s.median") for arm in view.drawn}
    caption = f"A step in all: {extremes(totals, compact)} {_division(view)}"
    return by_part(view, table, "phase_s", "seconds (median of the steps)", caption)


def _peaks(view: View) -> Item:
    """Show the peaks of the phases."""
    name, phases = "peak_memory_gib", (*MEMORY_PHASES, "peak")
    table = member_table(view, "memory", "Peak memory by phase, GiB", name, phases, {}, "train: with its parts.")
    peaks = {arm.name: arm.mean("peak_memory_gib.peak") for arm in view.drawn}
    halves = any("peak_memory_gib.backward" in arm.values for arm in view.drawn)
    unseen = ["exchange", "select", "save", "peak", *(["train"] if halves else [])]
    return by_part(view, table, name, _GIB, f"The largest: {extremes(peaks, GIB)}", *unseen)


def _parts(view: View) -> Item:
    """Divide the largest peak."""
    name, title = "peak_memory_parts_gib", "What the largest peak consists of, GiB"
    note = (
        "activations: what the phase of the peak added; of a counted peak what it has beyond the parts held. "
        "optimizer: states and float32 copies; communication: DeepSpeed's buckets; selection: what selector and "
        f"estimator keep; rest: of resident memory Python and the libraries for the most part. {SEEDS_NOTE}"
    )
    table = member_table(view, "memory_parts", title, name, _PARTS, {}, note)
    activations = {arm.name: arm.mean(f"{name}.activations") for arm in view.drawn}
    resident = any(arm.used[0].memory_kind == "resident" for arm in view.arms)
    caption = (
        f"Activations: {extremes(activations, GIB)}" + " Without the rest, mostly Python and libraries." * resident
    )
    rest = ["rest"] if resident else []  # it would leave no room for the others
    return by_part(view, table, name, _GIB, caption, *rest)


def _micro_batches(view: View) -> Table | None:
    """Make the table of how arms cut up their batches."""
    lead: dict[Column, Callable[[Arm], Any]] = {
        Column("micro-batch", whole): lambda arm: arm.micro_batch_size,
        Column("accumulation steps", whole): lambda arm: arm.accumulation_steps,
    }
    made = columns_of("micro_batches.count", "micro_batches.largest_tokens")
    note = (
        "Micro-batch: examples per rank and pass at most; accumulation steps: passes if all are full, more are made "
        "where cutting by length saves padding. The peak follows the tokens of the largest; where allocations were "
        "counted, that of the counted steps."
    )
    return arm_table("micro_batches", "Micro-batches that peaks follow from", view.arms, made, lead, note)


def _traffic(view: View) -> Item:
    """Show padding in training and bytes exchanged between ranks."""
    title = "Padding among the tokens computed in training"
    picture = curve_picture(view, "padding", title, _padding, "share of the tokens", percent)
    ranks: dict[Column, Callable[[Arm], Any]] = {Column("ranks", whole): lambda arm: arm.num_ranks}
    columns = [*columns_of("padding_fraction"), *group_columns(view.arms, "exchange_bytes")]
    note = (
        "Padding: share of the tokens computed in training. Exchanged: payload of the collectives, mean of a step; "
        "tokens are those of examples trained on another rank than the one that holds them. A single rank exchanges "
        "nothing."
    )
    return Item([picture], [arm_table("traffic", "Padding and exchanged data", view.arms, columns, ranks, note)])


def _padding(arm: Arm) -> Curve:
    return arm.step_curve("padding_fraction")


def _tradeoff(view: View) -> Picture | None:
    """Draw loss against seconds with the peak as area (as the paper's Fig. 3a)."""
    discs = []
    for arm in view.drawn:
        step_s, loss, peak = (arm.mean(key) for key in ("step_s.median", "heldout.overall", "peak_memory_gib.peak"))
        if step_s is not None and loss is not None and peak is not None and arm.num_steps:
            discs.append((arm.name, view.style(arm), step_s * arm.num_steps, loss, peak))
    areas = f"{min(disc[4] for disc in discs):.2f} to {max(disc[4] for disc in discs):.2f} GiB" if discs else ""
    return disc_picture(
        "tradeoff",
        "Held-out loss against time; area: peak memory",
        discs if len(discs) > 1 else [],
        x_label="seconds of training (median of a step times the steps)",
        y_label="nats per token",
        caption=f"Lower, further left and smaller is better. Areas: {areas}.",
    )


def _division(view: View) -> str:
    """Say what the main arm's step consists of."""
    arm = main_arm(view.drawn)
    bar = {} if arm is None else {name: each.mean for name, each in arm.group("phase_s").items()}
    largest: Sequence[str] = sorted(bar, key=lambda name: -bar[name])[:3]
    shares = ", ".join(f"{name} {fixed(0)(100 * bar[name] / sum(bar.values()))}%" for name in largest)
    return f"Of {quoted(arm.name)}: {shares}." if arm and shares else ""
