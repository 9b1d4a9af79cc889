"""Signals of the selection along training: variance of its gradient, length of what it takes, loss by source."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from colm_ds.report.arms import Arm
from colm_ds.report.charts import Line, Picture, line_picture
from colm_ds.report.curves import last_tenth, smooth, thin
from colm_ds.report.facts import Curve
from colm_ds.report.quality import mark_small, source_names
from colm_ds.report.section import ReportSection
from colm_ds.report.tables import Column, Table, fixed, times


def signals_section(arms: Sequence[Arm], small: Collection[str]) -> ReportSection:
    """Gradient variance of the coresets, completion length of the selected, and training loss by source.

    Args:
        arms: the arms.
        small: names of the small sources.
    """
    pictures = [_variance_picture(arms), _kappa_picture(arms), _length_picture(arms)]
    tables = [_means_table(arms), _loss_table(arms, small)]
    text = []
    if any(arm.signal("gradient_variance.coreset").values for arm in arms):
        text.append(
            "Variance is the squared distance of the coreset's mean gradient of all trained linear modules (of the "
            "probed layer in runs of version 0.1.0) to that of the large batch, relative to the latter's squared "
            "length; beside it what as many random examples of the same batch have on average. Kappa is the one over "
            "the other, worth the number of random examples with the coreset's error. Uniform medoids of a source can "
            "have the direction right and still lie far away: Adam ignores the length."
        )
    return ReportSection("signals", "What was taken", text, [p for p in pictures if p], [t for t in tables if t])


def _variance_picture(arms: Sequence[Arm]) -> Picture | None:
    lines = []
    for style, arm in enumerate(arms):
        for kind in ("coreset", "random"):
            curve = thin(smooth(arm.signal(f"gradient_variance.{kind}")))
            label = arm.name if kind == "coreset" else f"{arm.name}: as many at random"
            lines.append(Line(label, 2 * style + (kind == "random"), curve.steps, curve.values))
    return line_picture(
        "variance", "Variance of the coreset's gradient", lines, x_label="step", y_label="relative to |mean gradient|²"
    )


def _kappa_picture(arms: Sequence[Arm]) -> Picture | None:
    curves = {arm.name: thin(smooth(arm.signal("gradient_variance.kappa"))) for arm in arms}
    lines = [Line(name, style, curve.steps, curve.values) for style, (name, curve) in enumerate(curves.items())]
    return line_picture(
        "kappa",
        "Kappa: the coreset's error over that of random examples",
        lines,
        x_label="step",
        y_label="kappa",
        caption="Below 1 a coreset is nearer to its large batch than as many random examples are.",
    )


def _length_picture(arms: Sequence[Arm]) -> Picture | None:
    curves = {arm.name: thin(smooth(arm.signal("label_tokens.coreset"))) for arm in arms}
    lines = [Line(name, style, curve.steps, curve.values) for style, (name, curve) in enumerate(curves.items())]
    batch = next((found for arm in arms if (found := arm.signal("label_tokens.large_batch")).values), Curve())
    batch = thin(smooth(batch))
    lines.append(Line("the large batch", len(arms), batch.steps, batch.values))
    title = "Completion length of the selected"
    return line_picture("lengths", title, lines, x_label="step", y_label="labelled tokens")


def _means_table(arms: Sequence[Arm]) -> Table | None:
    rows: list[list[object]] = []
    for arm in arms:
        length, whole = (_mean(arm.signal(f"label_tokens.{kind}").values) for kind in ("coreset", "large_batch"))
        own, random = (_mean(arm.signal(f"gradient_variance.{kind}").values) for kind in ("coreset", "random"))
        worth = _mean(arm.signal("gradient_variance.worth").values)
        rows.append([arm.name, length, _ratio(length, whole), own, random, _ratio(own, random), worth])
    if all(value is None for row in rows for value in row[1:]):
        return None
    columns = [
        Column("arm"),
        Column("labelled tokens of an example", fixed(1)),
        Column("× the large batch's", times),
        Column("gradient variance", fixed(3)),
        Column("of random examples", fixed(3)),
        Column("× random", times),
        Column("worth, random examples", fixed(1)),
    ]
    if all(row[-1] is None for row in rows):  # not measured, or by version 0.1.0
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("signals", "What was taken, means over the run", columns, rows)


def _loss_table(arms: Sequence[Arm], small: Collection[str]) -> Table | None:
    found = [
        {name: _mean(last_tenth(curve.values)) for name, curve in arm.source_losses().items() if curve.values}
        for arm in arms
    ]
    named = source_names(arms, found)
    if not named:
        return None
    columns = [Column("source"), *(Column(arm.name, fixed(4)) for arm in arms)]
    rows: list[list[object]] = [[mark_small(name, small), *(mine.get(name) for mine in found)] for name in named]
    title = "Training loss of the selected examples by source, last tenth of the steps"
    return Table("source_losses", title, columns, rows, folded=len(rows) > 12)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
