"""Held-out perplexity of pretraining, overall and by source, against steps, tokens and seconds."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from colm_ds.report.arms import Arm
from colm_ds.report.charts import Line, Picture, line_picture
from colm_ds.report.curves import even_places, value_at
from colm_ds.report.facts import Curve
from colm_ds.report.quality import mark_small, source_names
from colm_ds.report.section import ReportSection
from colm_ds.report.tables import Column, Table, fixed, seconds, whole

OVERALL = "overall"
AXES = {
    "steps": ("step", "by step"),
    "tokens": ("tokens trained on", "by tokens"),
    "seconds": ("seconds of training", "by time"),
}
"""What a curve can be drawn against: its label, and the end of the title."""

_PERPLEXITY = fixed(2)
_MOST_ROWS = 25  # of each arm along training
_MOST_SOURCES = 8  # with pictures of their own
_FOCUS = "Heights are those of the last two thirds, to tell the ends apart; what lies outside is in the table."


def perplexity_section(arms: Sequence[Arm], small: Collection[str]) -> ReportSection:
    """Pictures and tables of perplexity, for arms of which one at least measured it.

    One arm shares a picture with its sources; of several, every source has pictures of its own.

    Args:
        arms: the arms.
        small: names of the small sources.
    """
    found = {arm.name: arm.perplexity() for arm in arms}
    sources = [name for name in source_names(arms, list(found.values())) if name != OVERALL]
    pictures: list[Picture | None] = []
    if len(arms) == 1:
        lines = {mark_small(name, small): (arms[0], found[arms[0].name].get(name)) for name in (OVERALL, *sources)}
        pictures += [_picture("perplexity", "Held-out perplexity", lines, axis) for axis in AXES]
    else:
        for place, name in enumerate([OVERALL, *sources[:_MOST_SOURCES]]):
            title = f"Held-out perplexity, {mark_small(name, small)}"
            lines = {arm.name: (arm, found[arm.name].get(name)) for arm in arms}
            pictures += [_picture(f"perplexity-{place}", title, lines, axis) for axis in AXES]
    text = [
        "The exponential of the mean loss per token on held-out chunks; overall, of the sources' losses weighted by "
        "their shares of the mixture. Seconds count training steps only, not the evaluations; tokens are those trained "
        "on."
    ]
    if len(arms) > 1 and len(sources) > _MOST_SOURCES:
        text.append(f"Pictures of the {_MOST_SOURCES} largest sources; the tables have all of them.")
    tables = [_final_table(arms, sources, small), _along_table(arms, sources, small)]
    return ReportSection("perplexity", "Held-out perplexity", text, [each for each in pictures if each], tables)


def _picture(key: str, title: str, lines: dict[str, tuple[Arm, Curve | None]], axis: str) -> Picture | None:
    x_label, ending = AXES[axis]
    drawn = []
    for style, (label, (arm, curve)) in enumerate(lines.items()):
        points = [] if curve is None else _points(arm, curve, axis)
        drawn.append(Line(label, style, [x for x, _ in points], [y for _, y in points], marked=True))
    return line_picture(
        f"{key}-{axis}",
        f"{title}, {ending}",
        drawn,
        x_label=x_label,
        y_label="perplexity",
        caption=_FOCUS,
        focus=True,
    )


def _points(arm: Arm, curve: Curve, axis: str) -> list[tuple[float, float]]:
    """Horizontal position and height of what a curve has of an axis."""
    if axis == "steps":
        return [(float(step), value) for step, value in zip(curve.steps, curve.values, strict=True)]
    if axis == "seconds":
        return list(zip(curve.seconds, curve.values, strict=True)) if curve.seconds else []
    tokens = arm.tokens()
    known = [(value_at(tokens, step), value) for step, value in zip(curve.steps, curve.values, strict=True)]
    return [(count, value) for count, value in known if count is not None]


def _final_table(arms: Sequence[Arm], sources: Sequence[str], small: Collection[str]) -> Table:
    """The last perplexity of every arm, overall and by source."""
    columns = [Column("source"), *(Column(arm.name, _PERPLEXITY, "row") for arm in arms)]
    curves = [arm.perplexity() for arm in arms]
    rows = [
        [mark_small(name, small), *(mine[name].values[-1] if name in mine else None for mine in curves)]
        for name in (OVERALL, *sources)
    ]
    return Table("perplexity", "Held-out perplexity, the last one", columns, rows, best_of_rows="min")


def _along_table(arms: Sequence[Arm], sources: Sequence[str], small: Collection[str]) -> Table:
    """Perplexities of every arm at some of the steps at which they were measured."""
    columns = [Column("arm"), Column("step", whole), Column("tokens", whole), Column("seconds", seconds)]
    columns += [Column(mark_small(name, small), _PERPLEXITY) for name in (OVERALL, *sources)]
    rows: list[list[object]] = []
    for arm in arms:
        curves, tokens = arm.perplexity(), arm.tokens()
        overall = curves.get(OVERALL, Curve())
        for place in even_places(len(overall.steps), _MOST_ROWS):
            step = overall.steps[place]
            row: list[object] = [arm.name, step, value_at(tokens, step)]
            row.append(overall.seconds[place] if overall.seconds else None)
            row += [value_at(curves[name], step) if name in curves else None for name in (OVERALL, *sources)]
            rows.append(row)
    return Table("perplexity_along", "Held-out perplexity along training", columns, rows, folded=len(rows) > 12)
