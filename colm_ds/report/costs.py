"""What arms cost: seconds by phase, peaks by phase and part, padding and exchange."""

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
from colm_ds.report.tables import SEEDS_NOTE, Column, compact, fixed, percent, quoted, whole

KINDS = {
    "allocated": "Peaks are memory allocated by PyTorch on one GPU, weights and optimizer included.",
    "counted": "Peaks are tensor allocations counted one by one in some steps on a CPU, weights and optimizer "
    "included, as an allocator's statistics are on a GPU.",
    "resident": "Peaks are the resident memory of one process on a CPU, which includes Python and the libraries' code. "
    "Differences say more than ratios.",
}
"""What peaks are, for a reader."""

_PARTS = ("weights", "gradients", "optimizer", "communication", "activations", "replay", "probe", "selection", "rest")
_GIB = "GiB (2^30 bytes)"


def costs_section(view: View) -> ReportSection:
    """Compare time and memory."""
    arms, steps = view.arms, {arm.name: arm.mean("step_s.median") for arm in view.drawn}
    peaks = {arm.name: arm.mean("peak_memory_gib.peak") for arm in view.drawn}
    kinds = dict.fromkeys(arm.used[0].memory_kind for arm in [*arms, *view.sized])
    micro: dict[Column, Callable[[Arm], Any]] = {
        Column("micro-batch", whole): lambda arm: arm.micro_batch_size,
        Column("accumulation steps", whole): lambda arm: arm.accumulation_steps,
    }
    ranks: dict[Column, Callable[[Arm], Any]] = {Column("ranks", whole): lambda arm: arm.num_ranks}
    costs = columns_of("step_s.median", "peak_memory_gib.peak", "tokens_trained", "wall_s", "data_loading_share")
    made = columns_of("micro_batches.count", "micro_batches.largest_tokens")
    resident = any(arm.used[0].memory_kind == "resident" for arm in arms)
    notes = (
        "data: waiting for the large batch; probe: the pass over it; exchange: signals between ranks; forward, "
        "backward: over the coreset (train: both together, in older runs); step: the optimizer; other: what the "
        f"total has beyond the phases. {SEEDS_NOTE}",
        "Micro-batch: examples per rank and pass at most; accumulation steps: "
        "passes if all are full, more are made where cutting by length saves padding; the peak follows the tokens of "
        "the largest, where allocations were counted that of the counted steps.",
        "activations: what the phase of the peak added; of a counted peak what it has beyond the parts held. "
        "optimizer: states and float32 copies; communication: DeepSpeed's buckets; selection: what selector and "
        f"estimator keep; rest: of resident memory Python and the libraries for the most part. {SEEDS_NOTE}",
        "Padding: share of the tokens computed in training. Exchanged: payload of the collectives, mean of a step; "
        "tokens are those of examples trained on another rank than the one that holds them. A single rank exchanges "
        "nothing.",
    )
    phases = (*PHASES, "other")
    titles = ("Seconds of a step by phase", "Peak memory by phase, GiB", "What the largest peak consists of, GiB")
    range_of_steps = {"step_s.median": "a step", "step_s.p10": "fastest 10%", "step_s.p90": "slowest 10%"}
    bars = (
        member_table(view, "phases", titles[0], "phase_s", phases, range_of_steps, notes[0]),
        member_table(
            view, "memory", titles[1], "peak_memory_gib", (*MEMORY_PHASES, "peak"), {}, "train: with its parts."
        ),
        member_table(view, "memory_parts", titles[2], "peak_memory_parts_gib", _PARTS, {}, notes[2]),
    )
    captions = (
        f"A step in all: {extremes(steps, compact)} {_division(view)}",
        f"The largest: {extremes(peaks, GIB)}",
        "Selection can save activations only." + " Without the rest: Python and the libraries." * resident,
    )
    rest = ["rest"] if resident else []  # it would leave no room for the others
    halves = any("peak_memory_gib.backward" in arm.values for arm in view.drawn)
    unseen = ["exchange", "select", "save", "peak", *(["train"] if halves else [])]
    padding = curve_picture(
        view, "padding", "Padding among the tokens computed in training", _padding, "share of the tokens", percent
    )
    traffic = [*columns_of("padding_fraction"), *group_columns(arms, "exchange_bytes")]
    micro_batches = arm_table("micro_batches", "Micro-batches that peaks follow from", arms, made, micro, notes[1])
    items = [
        Item([_tradeoff(view)], [arm_table("costs", "Time and memory", arms, costs, note=SEEDS_NOTE)]),
        by_part(view, bars[0], "phase_s", "seconds (median of the steps)", captions[0]),
        by_part(view, bars[1], "peak_memory_gib", _GIB, captions[1], *unseen),
        by_part(view, bars[2], "peak_memory_parts_gib", _GIB, captions[2], *rest),
        *batch_size_items(view),
        Item(tables=[micro_batches]),
        Item([padding], [arm_table("traffic", "Padding and exchanged data", arms, traffic, ranks, notes[3])]),
    ]
    text = [
        "Times are medians over steps on rank 0. Peaks are the largest of all steps, ranks and seeds; the peak of "
        "training follows the micro-batch, not b: compare arms of the same micro-batch.",
        *(KINDS[kind] for kind in kinds if kind in KINDS),
    ]
    return ReportSection("costs", "Time and memory", text, items)


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
