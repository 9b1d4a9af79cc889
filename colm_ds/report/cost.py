"""What it cost and what was selected: time, padding and exchanged bytes, shares of sources, coherence."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from colm_ds.report.arms import Arm
from colm_ds.report.charts import Line, Picture, dot_picture, line_picture, stacked_picture
from colm_ds.report.curves import envelope, last_tenth, smooth, thin
from colm_ds.report.facts import BYTE_KINDS, PHASES, Curve
from colm_ds.report.quality import data_shares, mark_small, source_names
from colm_ds.report.section import ReportSection
from colm_ds.report.tables import Column, Table, fixed, kib, percent, quoted, seconds, times, whole
from colm_ds.run_folder.coherence import JOINT, agreement
from colm_ds.run_folder.read import lookup, number

_MOST_COHERENCE_PICTURES = 6


def time_section(arms: Sequence[Arm]) -> ReportSection:
    """Seconds of a step by phase."""
    bars = {arm.name: _phases(arm) for arm in arms}
    parts = [*PHASES, *dict.fromkeys(name for bar in bars.values() for name in bar if name not in PHASES)]
    parts = [part for part in parts if any(part in bar for bar in bars.values())]
    picture = stacked_picture(
        "phases",
        "Seconds of a step by phase",
        bars,
        [part for part in parts if any(bar.get(part, 0.0) > 0.002 * sum(bar.values()) for bar in bars.values())],
        x_label="seconds (median of the steps)",
    )
    columns = [Column("arm"), *(Column(f"{part}, s", seconds) for part in parts), Column("step in all, s", seconds)]
    rows = [[arm.name, *(bars[arm.name].get(part) for part in parts), arm.mean("step_s")] for arm in arms]
    if any(arm.mean("data_loading_share") is not None for arm in arms):
        columns.append(Column("data-loading share", percent))
        rows = [[*row, arm.mean("data_loading_share")] for row, arm in zip(rows, arms, strict=True)]
    text = [
        "data: waiting for the large batch; probe: the pass over it; exchange: signals between ranks; select: the "
        "choice; forward, backward: over the coreset (train: both together, in older runs); step: the optimizer; "
        "other: what the total has beyond the phases. Each is a median over steps on rank 0, so that parts need not "
        "add up exactly. Data-loading share: seconds spent waiting for data over those of all steps but the first."
    ]
    tables = [Table("phases", "Seconds of a step by phase", columns, rows)] if parts else []
    return ReportSection("time", "Time", text if parts else [], [picture] if picture else [], tables)


def traffic_section(arms: Sequence[Arm]) -> ReportSection:
    """Padding in training and bytes exchanged between ranks."""
    kinds = [*BYTE_KINDS]
    kinds += [k for arm in arms for k in arm.groups.get("exchange_bytes", {}) if k not in kinds]
    columns = [
        Column("arm"),
        Column("ranks", whole),
        Column("padding", percent),
        *(Column(f"{kind}, KiB per step", kib) for kind in dict.fromkeys(kinds)),
    ]
    rows = [
        [
            arm.name,
            number(arm.config.get("world_size")),
            arm.mean("padding_fraction"),
            *(sent[kind].mean if kind in sent else None for kind in dict.fromkeys(kinds)),
        ]
        for arm in arms
        for sent in [arm.groups.get("exchange_bytes", {})]
    ]
    note = (
        "Padding: share of the tokens computed in training that are padding, mean of the steps. Exchanged: payload of "
        "the collectives, mean of a step: signals of examples, the selection itself, tokens of examples that are "
        "trained on another rank than the one that holds them. A single rank exchanges nothing."
    )
    has_any = any(value is not None for row in rows for value in row[2:])
    tables = [Table("traffic", "Padding and exchanged data", columns, rows, note)] if has_any else []
    table, picture = _padding_table(arms), _padding_picture(arms)
    tables += [table] if table else []
    return ReportSection("traffic", "Padding and exchange", pictures=[picture] if picture else [], tables=tables)


def _padding_picture(arms: Sequence[Arm]) -> Picture | None:
    """Padding along training."""
    lines = []
    for style, arm in enumerate(arms):
        curve = arm.signal("padding")
        curve = Curve(curve.steps, [], [100 * value for value in curve.values])
        smoothed, raw = thin(smooth(curve)), envelope(curve)
        lines.append(Line(arm.name, style, smoothed.steps, smoothed.values, (raw.steps, raw.values)))
    title = "Padding among the tokens computed in training"
    most = max((max(line.faint[1]) for line in lines if line.faint and line.faint[1]), default=0.0)
    return line_picture("padding", title, lines, x_label="step", y_label="%", limits=(0.0, max(1.0, 1.05 * most)))


def _padding_table(arms: Sequence[Arm]) -> Table | None:
    """Padding at the start, at the end and at its worst."""
    curves = {arm.name: arm.signal("padding").values for arm in arms if arm.signal("padding").values}
    if not curves:
        return None
    columns = [Column("arm"), *(Column(name, percent) for name in ("first tenth", "last tenth", "lowest", "highest"))]
    rows: list[list[object]] = [
        [name, _average(values[: max(1, len(values) // 10)]), _average(last_tenth(values)), min(values), max(values)]
        for name, values in curves.items()
    ]
    note = "Mean over seeds. It follows the lengths of what was chosen, the micro-batch and the number of ranks."
    return Table("padding", "Padding along training", columns, rows, note)


def shares_section(arms: Sequence[Arm], small: Collection[str]) -> ReportSection:
    """Share of each source among the examples trained on, against its share in the data."""
    data = data_shares(arms)
    found = {arm.name: arm.groups.get("coreset_share", {}) for arm in arms}
    trained = {arm: {name: share.mean for name, share in shares.items()} for arm, shares in found.items()}
    named = source_names(arms, [data, *found.values()]) if any(found.values()) else []
    marked = {name: mark_small(name, small) for name in named}

    def by_row(shares: Mapping[str, float]) -> dict[str, float]:
        return {marked[name]: 100 * share for name, share in shares.items() if name in marked}

    picture = dot_picture(
        "shares",
        "Share of each source in the coreset, against its share in the data",
        list(marked.values()),
        [(arm.name, style, by_row(trained[arm.name])) for style, arm in enumerate(arms)],
        ("share in the data", by_row(data)),
        x_label="share of the examples, %",
    )
    columns = [Column("source"), Column("in the data", percent)]
    for arm in arms:
        columns += [Column(arm.name, percent), Column(f"{arm.name}: × data", times)]
    rows = []
    for name in named:
        row: list[object] = [marked[name], data.get(name)]
        for arm in arms:
            share = trained[arm.name].get(name)
            row += [share, share / data[name] if share is not None and data.get(name) else None]
        rows.append(row)
    tables = (
        [Table("shares", "Share of each source in the coreset", columns, rows, folded=len(rows) > 12)] if rows else []
    )
    text = [
        "Counted over all examples that the run trained on. Plain training follows the data; keeping small sources "
        "whole raises their share at the cost of the others."
    ]
    return ReportSection("shares", "What was selected", text if rows else [], [picture] if picture else [], tables)


def coherence_section(arms: Sequence[Arm]) -> ReportSection:
    """How far the gradients of one source agree, and what that says about medoids."""
    pictures: list[Picture] = []
    rows = []
    verdicts = []
    for place, arm in enumerate(arms):
        curves = arm.coherence()
        expected = {name: _unrelated(arm, name) for name in curves}
        lines = []
        for style, (name, curve) in enumerate(curves.items()):
            smoothed, raw = thin(smooth(curve)), envelope(curve)
            lines.append(
                Line(name, style, smoothed.steps, smoothed.values, (raw.steps, raw.values), level=expected[name])
            )
            start = _average(curve.values[: max(1, len(curve.values) // 10)])
            rows.append(
                [arm.name, name, _average(curve.values), start, _average(last_tenth(curve.values)), expected[name]]
            )
        picture = line_picture(
            f"coherence-{place}",
            f"Coherence by source: {arm.name}",
            lines,
            x_label="step",
            y_label="|mean g| / mean |g|",
            limits=(0.0, 1.02),
            caption="Marks at the right: 1/√n, what unrelated gradients would give.",
        )
        if picture is not None:
            pictures.append(picture)
            verdicts.append(_coherence_verdict(arm, curves, expected))
    if not rows:
        return ReportSection("coherence", "Coherence")
    columns = [
        Column("arm"),
        Column("source"),
        Column("mean", fixed(3)),
        Column("first tenth", fixed(3)),
        Column("last tenth", fixed(3)),
        Column("1/√n, unrelated gradients", fixed(3)),
    ]
    text = [
        "Length of the mean gradient signal of a source's examples in the large batch over the mean length. Near 1 the "
        "examples pull the same way and a medoid stands for its source; near 1/√n, n being the source's examples in "
        "the large batch, they are unrelated and no example can stand for others: then the choice within a source can "
        "not beat a random one, and what is gained comes from the balance between sources.",
        *[verdict for verdict in verdicts if verdict],
    ]
    if any(lookup(arm.colm, "probe", "estimator") == "spsa" for arm in arms if arm.coherence()):
        text.append("spsa sees a gradient through K directions only; with K = 1 the ratio scatters from step to step.")
    if len(pictures) > _MOST_COHERENCE_PICTURES:
        text.append(f"Pictures of the first {_MOST_COHERENCE_PICTURES} arms; the table has all of them.")
    table = Table("coherence", "Coherence by source", columns, rows, folded=len(rows) > 12)
    return ReportSection("coherence", "Coherence", text, pictures[:_MOST_COHERENCE_PICTURES], [table])


def _coherence_verdict(arm: Arm, curves: Mapping[str, Curve], expected: Mapping[str, float | None]) -> str:
    """What the coherence of an arm says, on average over sources and steps, and towards the end."""
    known = [(curves[name].values, value) for name, value in expected.items() if value is not None]
    if not known:
        return ""
    floor = _average([value for _, value in known])
    mean = _average([_average(values) for values, _ in known])
    end = _average([_average(last_tenth(values)) for values, _ in known])
    text = f"{quoted(arm.name)}: {fixed(2)(mean)} on average, {fixed(2)(end)} in the last tenth of the steps, "
    text += f"where unrelated gradients would give {fixed(2)(floor)}: {agreement(mean, floor)}"
    late = agreement(end, floor)
    return text + (f"; towards the end {late}." if late != agreement(mean, floor) else ".")


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _unrelated(arm: Arm, name: str) -> float | None:
    """1/sqrt(n) of a source: n is its expected number of examples in the large batch."""
    shares = {key: share.mean for key, share in arm.groups.get("data_share", {}).items()}
    large = arm.large_batch_size
    if large is None or not shares:
        return None
    if name == JOINT and name not in shares:
        named = arm.config.get("small_sources")
        kept = named if arm.colm.get("small_sources") != "none" and isinstance(named, list) else []
        share = 1.0 - sum(shares.get(str(key), 0.0) for key in kept)
    else:
        share = shares.get(name, 0.0)
    return 1.0 / math.sqrt(max(1.0, large * share)) if share > 0 else None


def _phases(arm: Arm) -> dict[str, float]:
    """Seconds of each phase, and what the step has beyond them; forward and backward for training, where measured."""
    found = {name: measure.mean for name, measure in arm.groups.get("phase_s", {}).items()}
    if "backward" in found:
        found.pop("train", None)
    total = arm.mean("step_s")
    if found and total is not None and total > sum(found.values()):
        found["other"] = total - sum(found.values())
    return found
