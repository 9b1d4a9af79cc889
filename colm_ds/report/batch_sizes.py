"""Memory and time against batch size under two protocols: equal accumulation steps, and an equal micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from colm_ds.report.arms import Arm, describe, references
from colm_ds.report.charts import Line, Picture, Style, line_picture
from colm_ds.report.facts import GIB
from colm_ds.report.section import Item, View, main_arm
from colm_ds.report.statistics import ratio
from colm_ds.report.tables import Column, Table, compact, quoted, times, whole


def _full_steps(arm: Arm) -> int | None:
    """Return the accumulation steps of an arm whose micro-batches are as small as that number of them allows."""
    steps, micro, size = arm.accumulation_steps, arm.micro_batch_size, arm.coreset_size
    return steps if steps and micro and size and micro == math.ceil(size / (arm.num_ranks * steps)) else None


_PROTOCOLS: dict[str, tuple[Callable[[Arm], int | None], str]] = {
    "equal steps": (
        _full_steps,
        "Equal accumulation steps: a larger batch has larger micro-batches. This is what one pays who raises the batch "
        "size and leaves accumulation alone (the paper's comparison), and where CoLM saves activation memory.",
    ),
    "equal micro-batch": (
        lambda arm: arm.micro_batch_size,
        "Equal micro-batch: a larger batch takes more accumulation steps. Activation memory hardly depends on the "
        "batch size, and what CoLM saves or costs is time.",
    ),
}
"""By name of the protocol: the number that is equal, and what that means."""


def batch_size_items(view: View) -> list[Item]:
    """Show peak and time by batch size under each protocol that there are runs for; nothing if there are none."""
    base = main_arm([arm for arm in view.arms if references(arm, view.arms)])
    if base is None or base.micro_batch_size is None:
        return []
    shown: dict[str, list[Arm]] = {}
    for name, (equal, _) in _PROTOCOLS.items():
        alike = [arm for arm in [*view.arms, *view.sized] if equal(arm) == equal(base) is not None]
        members = [arm for arm in alike if arm.is_plain or describe(arm) == describe(base)]
        if len({_seen(arm) for arm in members if "peak_memory_gib.peak" in arm.values}) > 1 and any(
            arm.is_plain for arm in members
        ):
            shown[name] = members
    if not shown:
        return []
    peaks = [
        peak for members in shown.values() for arm in members if (peak := arm.mean("peak_memory_gib.peak")) is not None
    ]
    spread = max(peaks) - min(peaks)
    margin = 0.08 * spread or 0.05 * max(peaks)
    limits = (0.0 if spread >= 0.3 * max(peaks) else min(peaks) - margin, max(peaks) + margin)
    return [Item([_picture(base, name, members, limits) for name, members in shown.items()], [_table(shown)])]


def _seen(arm: Arm) -> int:
    """Return the examples that a step of an arm looks at."""
    return (arm.coreset_size if arm.is_plain else arm.large_batch_size) or 0


def _picture(base: Arm, name: str, members: Sequence[Arm], limits: tuple[float, float]) -> Picture | None:
    lines = []
    for style, label in enumerate(("plain training on all of them", describe(base) or base.name)):
        group = [arm for arm in members if arm.is_plain != bool(style) and "peak_memory_gib.peak" in arm.values]
        points = sorted({(_seen(arm), arm.values["peak_memory_gib.peak"].mean) for arm in group})
        lines.append(Line(label, Style(style, style == 1), [x for x, _ in points], [y for _, y in points], marked=True))
    parts = []
    for size, what in ((base.large_batch_size, "r"), (base.coreset_size, "b")):
        other = next((arm for arm in members if arm.is_plain and arm.coreset_size == size), None)
        peak, time = (
            ratio(base.values.get(k), other.values.get(k)) if other else None
            for k in ("peak_memory_gib.peak", "step_s.median")
        )
        if peak and time:
            parts.append(
                f"{times(peak)} the peak memory and {times(time)} the time of plain training on {what} = {size}"
            )
    caption = _PROTOCOLS[name][1] + (f" {quoted(base.name)} takes {', and '.join(parts)}." if parts else "")
    return line_picture(
        f"batch-{list(_PROTOCOLS).index(name)}",
        f"Peak memory against batch size, {name.replace('steps', 'accumulation steps')}",
        lines,
        x_label="examples that a step looks at",
        y_label="peak, GiB",
        limits=limits,
        caption=caption + ("" if limits[0] == 0 else " Heights do not start at 0."),
    )


def _table(shown: dict[str, list[Arm]]) -> Table:
    """Make a table with a row for each pair of sizes, the protocols beside each other."""
    columns = [Column("training"), Column("looked at", whole), Column("trained on", whole)]
    heads = ("micro-batch", "peak, GiB", "× plain peak", "s per step", "× plain time")
    for name in shown:
        forms = (whole, GIB, times, compact, times)
        columns += [Column(f"{name}: {head}", form) for head, form in zip(heads, forms, strict=True)]
    found = [{(arm.is_plain, _seen(arm), arm.coreset_size or 0): arm for arm in members} for members in shown.values()]
    kinds = sorted({kind for arms in found for kind in arms}, key=lambda kind: (kind[1], not kind[0], kind[2]))
    rows: list[list[Any]] = []
    for is_plain, seen, trained in kinds:
        row: list[Any] = [f"plain {trained}" if is_plain else f"{trained} of {seen}", seen, trained]
        for arms in found:
            arm, plain = arms.get((is_plain, seen, trained)), arms.get((True, seen, seen))
            row.append(arm.micro_batch_size if arm else None)
            for key in ("peak_memory_gib.peak", "step_s.median"):
                mine = arm.values.get(key) if arm else None
                row += [mine, None if is_plain or plain is None else ratio(mine, plain.values.get(key))]
        rows.append(row)
    note = (
        "× plain: against plain training on as many examples as the arm looks at, under the same protocol. Seconds of "
        "arms that ran a few steps for their memory are rough."
    )
    return Table("protocols", "Memory against batch size, both protocols", columns, rows, note)
