"""Time, memory and quality in one picture (as the paper's Fig. 3a)."""

from __future__ import annotations

from collections.abc import Sequence

from colm_ds.report.arms import Arm
from colm_ds.report.charts import bubble_picture
from colm_ds.report.section import ReportSection
from colm_ds.report.tables import Column, Table, fixed, percent, seconds


def tradeoff_section(arms: Sequence[Arm]) -> ReportSection:
    """Held-out loss against seconds of training, with the peak as area; empty for a single arm."""
    rows, bubbles = [], []
    for style, arm in enumerate(arms):
        spent, loss, peak = training_seconds(arm), arm.mean("heldout_overall"), arm.mean("peak_gib")
        if spent is None or loss is None or peak is None:
            continue
        rows.append([arm.name, spent, peak, loss, arm.mean("heldout_small"), arm.mean("exact_match")])
        bubbles.append((arm.name, style, spent, loss, peak))
    if len(rows) < 2:
        return ReportSection("tradeoff", "Time, memory and quality")
    peaks = [bubble[4] for bubble in bubbles]
    picture = bubble_picture(
        "tradeoff",
        "Held-out loss against time, area: peak memory",
        bubbles,
        x_label="seconds of training",
        y_label="nats per token",
        caption=f"Lower, further left and smaller is better. Areas: {min(peaks):.2f} to {max(peaks):.2f} GiB.",
    )
    columns = [
        Column("arm"),
        Column("seconds of training", seconds, "min"),
        Column("peak, GiB", fixed(3), "min"),
        Column("held-out loss", fixed(4), "min"),
        Column("small sources", fixed(4), "min"),
        Column("exact match", percent, "max"),
    ]
    note = "Seconds: the median of a step times the steps, evaluations not counted."
    table = Table("tradeoff", "Time, memory and quality", columns, rows, note)
    return ReportSection("tradeoff", "Time, memory and quality", [], [picture] if picture else [], [table])


def training_seconds(arm: Arm) -> float | None:
    """Seconds of all steps of an arm, from the median of one."""
    step_s = arm.mean("step_s")
    return step_s * arm.num_steps if step_s is not None and arm.num_steps else None
