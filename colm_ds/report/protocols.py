"""Memory under both protocols: equal accumulation steps and equal micro-batch, side by side and by batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from colm_ds.report.arms import Arm, accumulation_steps, micro_batch_size
from colm_ds.report.charts import Line, Picture, line_picture
from colm_ds.report.differences import references
from colm_ds.report.memory import MICRO_BATCH_NOTE, kind_sentences, micro_batch_cells, micro_batch_columns
from colm_ds.report.quality import describe
from colm_ds.report.section import ReportSection
from colm_ds.report.tables import Column, Table, fixed, quoted, seconds, times, whole
from colm_ds.run_folder.read import number


def _full_steps(arm: Arm) -> int | None:
    """Accumulation steps of an arm whose micro-batches are as small as that number of them allows."""
    steps, micro = accumulation_steps(arm), micro_batch_size(arm)
    if not steps or not micro or not arm.coreset_size:
        return None
    world = number(arm.config.get("world_size")) or 1.0
    return steps if micro == math.ceil(arm.coreset_size / (world * steps)) else None


Protocol = tuple[str, Callable[[Arm], int | None], str]

PROTOCOLS: tuple[Protocol, ...] = (
    (
        "equal accumulation steps",
        _full_steps,
        "Equal accumulation steps: every batch is passed through in the same number of micro-batches, so a larger "
        "batch has larger micro-batches; this is what one pays who raises the batch size and leaves accumulation "
        "alone (the paper's comparison), and where CoLM saves activation memory against plain training on r.",
    ),
    (
        "equal micro-batch",
        micro_batch_size,
        "Equal micro-batch: every pass takes the same number of examples, so a larger batch takes more accumulation "
        "steps; activation memory then hardly depends on the batch size, CoLM saves next to none, and what it saves "
        "or costs is time.",
    ),
)
"""Name, what is equal, and what the protocol means."""

_GIB = fixed(3)
_FLAT = 0.3  # peaks whose range is below this share of the largest would look alike on an axis from 0


def protocols_section(arms: Sequence[Arm], sized: Sequence[Arm] = ()) -> ReportSection:
    """Memory and time of an arm that selects and of plain training, under each protocol that there are runs for.

    Args:
        arms: the comparison's arms.
        sized: further arms, of other batch sizes, for the pictures.
    """
    base = _base(arms)
    if base is None or micro_batch_size(base) is None:
        return ReportSection("protocols", "Memory against batch size")
    everyone = [*arms, *sized]
    shown = [(name, words, _members(base, everyone, key)) for name, key, words in PROTOCOLS]
    shown = [(name, words, members) for name, words, members in shown if _spread(members)]
    if not shown:
        return ReportSection("protocols", "Memory against batch size")
    peaks = [peak for _, _, members in shown for arm in members if (peak := arm.mean("peak_gib")) is not None]
    limits = _limits(peaks) if peaks else None
    pictures = [_picture(place, name, members, limits) for place, (name, _, members) in enumerate(shown)]
    text = [words for _, words, _ in shown]
    text += [sentence for name, _, members in shown if (sentence := _outcome(base, name, members))]
    text += kind_sentences(everyone)
    named = [(name, members) for name, _, members in shown]
    return ReportSection(
        "protocols",
        "Memory against batch size",
        text,
        [picture for picture in pictures if picture],
        [_side_by_side(named), _made(named)],
    )


def _base(arms: Sequence[Arm]) -> Arm | None:
    """The first arm of CoLM that can be compared with plain training, else of another selector, else the control."""
    able = [arm for arm in arms if arm.selector and not arm.is_plain and references(arm, arms)]
    return min(able, key=lambda arm: {"colm": 0, "keep_random": 2}.get(arm.selector or "", 1), default=None)


def _members(base: Arm, arms: Sequence[Arm], key: Callable[[Arm], int | None]) -> list[Arm]:
    """Arms that are alike in what a protocol keeps equal: plain ones and those that select as the base does."""
    method = describe(base)
    if key(base) is None:
        return []
    return [arm for arm in arms if key(arm) == key(base) and (arm.is_plain or describe(arm) == method)]


def _spread(members: Sequence[Arm]) -> bool:
    """Whether there is something to compare: a plain arm, and more than one size of batch."""
    sizes = {_seen(arm) for arm in members if arm.mean("peak_gib") is not None}
    return len(sizes) > 1 and any(arm.is_plain for arm in members)


def _seen(arm: Arm) -> int:
    """Examples that a step of an arm looks at."""
    return (arm.coreset_size if arm.is_plain else arm.large_batch_size) or 0


def _limits(peaks: Sequence[float]) -> tuple[float, float]:
    low, high = min(peaks), max(peaks)
    margin = 0.08 * (high - low) or 0.05 * high
    return (low - margin if high - low < _FLAT * high else 0.0, high + margin)


def _picture(place: int, name: str, members: Sequence[Arm], limits: tuple[float, float] | None) -> Picture | None:
    lines = []
    plain = [arm for arm in members if arm.is_plain]
    selecting = [arm for arm in members if not arm.is_plain]
    for style, (label, group) in enumerate((("plain training on all of them", plain), (_label(selecting), selecting))):
        points = sorted({(_seen(arm), arm.mean("peak_gib") or 0.0) for arm in group})
        if points:
            lines.append(Line(label, style, [x for x, _ in points], [y for _, y in points], marked=True))
    caption = "" if limits is None or limits[0] == 0 else "Heights do not start at 0; the table has the numbers."
    return line_picture(
        f"batch-{place}",
        f"Peak memory against batch size, {name}",
        lines,
        x_label="examples that a step looks at",
        y_label="peak, GiB",
        limits=limits,
        caption=caption,
        whole_x=True,
    )


def _label(arms: Sequence[Arm]) -> str:
    if not arms:
        return ""
    shares = {(arm.coreset_size or 0) / (arm.large_batch_size or 1) for arm in arms}
    part = f", {100 * shares.pop():.0f}% trained on" if len(shares) == 1 else ""
    return f"{describe(arms[0])}{part}"


def _outcome(base: Arm, name: str, members: Sequence[Arm]) -> str:
    """The base's peak and time against plain training on r and on b."""
    parts = []
    for size, what in ((base.large_batch_size, "r"), (base.coreset_size, "b")):
        other = next((arm for arm in members if arm.is_plain and arm.coreset_size == size), None)
        found = [
            f"{times(mine / theirs)} the {quantity}"
            for key, quantity in (("peak_gib", "peak memory"), ("step_s", "time per step"))
            if other is not None and (mine := base.mean(key)) is not None and (theirs := other.mean(key))
        ]
        if found:
            parts.append(f"{' and '.join(found)} of plain training on {what} = {size}")
    return f"With {name}, {quoted(base.name)} takes {', and '.join(parts)}." if parts else ""


def _side_by_side(shown: Sequence[tuple[str, Sequence[Arm]]]) -> Table:
    """One row for each pair of sizes, the protocols beside each other."""
    columns = [Column("training"), Column("looked at", whole), Column("trained on", whole)]
    for name, _ in shown:
        short = name.replace("accumulation ", "")
        columns += [
            Column(f"{short}: micro-batch", whole),
            Column(f"{short}: peak, GiB", _GIB),
            Column(f"{short}: × plain peak", times),
            Column(f"{short}: s per step", seconds),
            Column(f"{short}: × plain time", times),
        ]
    found = [{(arm.is_plain, _seen(arm), arm.coreset_size or 0): arm for arm in members} for _, members in shown]
    kinds = sorted({kind for arms in found for kind in arms}, key=lambda kind: (kind[1], not kind[0], kind[2]))
    rows: list[list[object]] = []
    for is_plain, seen, trained in kinds:
        row: list[object] = [f"plain {trained}" if is_plain else f"{trained} of {seen}", seen, trained]
        for arms in found:
            arm, plain = arms.get((is_plain, seen, trained)), arms.get((True, seen, seen))
            row.append(micro_batch_size(arm) if arm else None)
            for key in ("peak_gib", "step_s"):
                mine = arm.mean(key) if arm else None
                theirs = plain.mean(key) if plain and not is_plain else None
                row += [mine, mine / theirs if mine is not None and theirs else None]
        rows.append(row)
    note = (
        "× plain: against plain training on as many examples as the arm looks at, under the same protocol. Seconds of "
        "arms that ran a few steps for their memory are rough."
    )
    return Table("protocols", "Memory against batch size, both protocols", columns, rows, note)


def _made(shown: Sequence[tuple[str, Sequence[Arm]]]) -> Table:
    """How every arm cut up its batches."""
    columns = [Column("protocol"), Column("arm"), *micro_batch_columns(), Column("peak, GiB", _GIB)]
    rows = [
        [name, arm.name, *micro_batch_cells(arm), arm.mean("peak_gib")]
        for name, members in shown
        for arm in sorted(members, key=lambda arm: (_seen(arm), not arm.is_plain))
    ]
    note = f"An arm that fits both protocols is listed under both. {MICRO_BATCH_NOTE}"
    return Table("micro_batches", "Micro-batches of both protocols", columns, rows, note, folded=True)
