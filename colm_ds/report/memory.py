"""Peak memory by phase, and what the largest peak consists of."""

from __future__ import annotations

from collections.abc import Sequence

from colm_ds.report.arms import Arm, accumulation_steps, micro_batch_size
from colm_ds.report.charts import Picture, grouped_picture, stacked_picture
from colm_ds.report.facts import MEMORY_PHASES
from colm_ds.report.section import ReportSection
from colm_ds.report.svg import COLORS
from colm_ds.report.tables import Column, Table, fixed, whole

KINDS = {
    "allocated": "Measured on a GPU: memory allocated by PyTorch on one device, weights and optimizer included.",
    "counted": "Measured on a CPU: tensor allocations counted one by one in a step, weights and optimizer included, as "
    "an allocator's statistics are on a GPU.",
    "resident": "Measured on a CPU: the resident memory of one process, which includes Python, the libraries' code and "
    "the weights. Differences say more than ratios.",
}
"""What peaks are, for a reader."""

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "communication",
    "activations",
    "replay",
    "probe",
    "selection",
    "rest",
)

MICRO_BATCH_NOTE = (
    "Micro-batch: examples per rank and pass at most; accumulation steps: passes of a step if all are full. More "
    "are made where cutting by length saves padding; the peak follows the tokens of the largest. Where allocations "
    "were counted, those of the counted steps: an arm that has fewer there met no longer examples in them."
)

_SHOWN = ("probe", "forward", "backward", "step")  # of the phases, in the picture
_GIB = fixed(3)


def memory_section(arms: Sequence[Arm]) -> ReportSection:
    """Peaks of every phase, the micro-batches that they follow from, and the parts of the largest."""
    tables = [table for table in (_phase_table(arms), _parts_table(arms)) if table is not None]
    pictures = [picture for picture in (_phase_picture(arms), _parts_picture(arms)) if picture is not None]
    text = [
        "The largest value of all steps, ranks and seeds (of rank 0 while a run is not finished). The peak of training "
        "follows the micro-batch, not b: compare arms of the same micro-batch.",
        *kind_sentences(arms),
    ]
    return ReportSection("memory", "Memory", text if tables else [], pictures, tables)


def kind_sentences(arms: Sequence[Arm]) -> list[str]:
    """What the arms' peaks are."""
    return [KINDS[kind] for kind in dict.fromkeys(arm.memory_kind for arm in arms) if kind in KINDS]


def _peaks(arm: Arm) -> dict[str, float]:
    return {name: measure.mean for name, measure in arm.groups.get("phase_gib", {}).items()}


def _phase_picture(arms: Sequence[Arm]) -> Picture | None:
    """Peaks before and during training; forward and backward apart where they were measured."""
    bars = {}
    for arm in arms:
        peaks = {name: value for name, value in _peaks(arm).items() if name in _SHOWN}
        for name, key in (("probe", "probe_gib"), ("train", "train_gib")):
            value = arm.mean(key)
            if value is not None and (name == "probe" or "backward" not in peaks):
                peaks[name] = value
        bars[arm.name] = peaks
    parts = [part for part in (*_SHOWN, "train") if any(part in bar for bar in bars.values())]
    return grouped_picture(
        "memory",
        "Peak memory by phase, GiB",
        bars,
        parts,
        x_label="GiB (2^30 bytes)",
        caption="probe: with the exchange and the choice.",
    )


def _phase_table(arms: Sequence[Arm]) -> Table | None:
    peaks = {arm.name: _peaks(arm) for arm in arms}
    phases = [phase for phase in MEMORY_PHASES if any(phase in found for found in peaks.values())]
    if not any(peaks.values()):
        return None
    columns = [
        Column("arm"),
        *(Column(f"{phase}, GiB", _GIB) for phase in phases),
        Column("peak, GiB", _GIB),
        *micro_batch_columns(),
    ]
    rows = [
        [
            arm.name,
            *(peaks[arm.name].get(phase) for phase in phases),
            arm.mean("peak_gib"),
            *micro_batch_cells(arm),
        ]
        for arm in arms
    ]
    note = f"forward and backward are in train. {MICRO_BATCH_NOTE}"
    return Table("memory", "Peak memory by phase", columns, rows, note)


def micro_batch_columns() -> list[Column]:
    """Columns that say how an arm cuts up its batch."""
    return [
        Column("micro-batch", whole),
        Column("accumulation steps", whole),
        Column("micro-batches made", fixed(1)),
        Column("tokens of the largest", whole),
    ]


def micro_batch_cells(arm: Arm) -> list[float | None]:
    """An arm's cells of `micro_batch_columns`."""
    made = arm.mean("num_micro_batches"), arm.mean("largest_tokens")
    return [micro_batch_size(arm), accumulation_steps(arm), *made]


def _parts(arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    return {arm.name: {name: measure.mean for name, measure in arm.groups.get("parts_gib", {}).items()} for arm in arms}


def _parts_picture(arms: Sequence[Arm]) -> Picture | None:
    bars = _parts(arms)
    named = _named_parts(arms)
    caption = "activations: all that the phase of the peak added to what is held."
    if any(arm.memory_kind == "resident" for arm in arms):  # it would leave no room for the others
        named = [name for name in named if name != "rest"]
        caption += " Without the rest: Python and the libraries."
    for pair in (("probe", "selection"), ("communication", "rest")):
        if len(named) > len(COLORS):  # one colour each
            both = ", ".join(pair)
            for bar in bars.values():
                bar[both] = sum(bar.pop(name, 0.0) for name in pair)
            named = [name for name in named if name not in pair] + [both]
    return stacked_picture(
        "parts",
        "What the largest peak consists of, GiB",
        bars,
        named,
        x_label="GiB (2^30 bytes)",
        caption=caption,
    )


def _parts_table(arms: Sequence[Arm]) -> Table | None:
    bars, named = _parts(arms), _named_parts(arms)
    if not named:
        return None
    columns = [Column("arm"), *(Column(f"{name}, GiB", _GIB) for name in named)]
    rows = [[arm.name, *(bars[arm.name].get(name) for name in named)] for arm in arms]
    note = (
        "optimizer: its states and float32 copies; communication: DeepSpeed's buckets; selection: what selector and "
        "estimator keep between steps."
    )
    if any(arm.memory_kind == "resident" for arm in arms):
        note += " Of the resident memory of one process: rest is Python and the libraries for the most part."
    if any(arm.memory_kind == "counted" for arm in arms):
        note += " activations: what the counted peak has beyond the parts that are held, DeepSpeed's buffers included."
    return Table("memory_parts", "What the largest peak consists of", columns, rows, note)


def _named_parts(arms: Sequence[Arm]) -> list[str]:
    """Parts that some arm has, in the order of a bar."""
    found = [bar for bar in _parts(arms).values() if bar]
    extra = [name for bar in found for name in bar if name not in PARTS]
    return [name for name in dict.fromkeys((*PARTS, *extra)) if any(bar.get(name, 0.0) > 0 for bar in found)]
