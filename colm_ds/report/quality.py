"""Quality of the arms: at the end, against each other, along training, by source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colm_ds.report.arms import AXES, Arm
from colm_ds.report.charts import Picture, even_places
from colm_ds.report.facts import LOSS, PERPLEXITY, Curve, Facts
from colm_ds.report.section import (
    SEEDS,
    Item,
    ReportSection,
    View,
    arm_table,
    by_source,
    columns_of,
    curve_picture,
    group_columns,
)
from colm_ds.report.statistics import difference
from colm_ds.report.tables import SEEDS_NOTE, Column, Table, compact, fixed, signed, whole

_MAIN = (
    "heldout.accuracy",
    "heldout.perplexity.overall",
    "heldout.overall",
)  # an arm is judged by the first of these that any has
_MOST_ROWS = 25  # of each arm along training
_MOST_SOURCES = 8  # with pictures of their own, in pretraining


def quality_section(view: View) -> ReportSection:
    """Compare the ends of training, the way there, and what was trained on."""
    pictures = [_heldout(view, "overall", "overall", axis) for axis in AXES]
    small = [_heldout(view, "small", "mean of the small sources", axis) for axis in ("steps", "seconds")]
    losses = [_training(view, axis) for axis in ("steps", "seconds")]
    text = [
        "Held-out losses are nats per labelled token on examples that no arm trains on. Equal steps say what a step is "
        "worth, equal seconds what an hour is worth; evaluation does not count. Bands are standard errors over seeds. "
        "Arms train on different examples: one that chooses harder ones shows a higher training loss without being "
        "worse."
    ]
    items = [
        Item(tables=[quality_table(view.arms), differences_table(view)]),
        Item([*pictures, *small, *losses], [along_table(view)]),
    ]
    return ReportSection("quality", "Quality", text, items)


def quality_columns(arms: Sequence[Arm]) -> list[Column]:
    """Return the numbers that say how good an arm is."""
    losses = columns_of("heldout.overall", "heldout.macro", "heldout.small", "heldout.big")
    others = ("heldout.perplexity.overall", "heldout.accuracy", "heldout_before.accuracy", "exact_match.overall")
    return [*losses, *columns_of(*others), *group_columns(arms, "evaluation")]


def main_column(arms: Sequence[Arm]) -> Column:
    """Return what arms are judged by: accuracy, perplexity or held-out loss."""
    return columns_of(next((key for key in _MAIN if any(key in arm.values for arm in arms)), _MAIN[-1]))[0]


def quality_table(arms: Sequence[Arm]) -> Table | None:
    """Make the table of the arms' quality at the end of training."""
    note = f"At the end of training. {SEEDS_NOTE} Bold: the best mean, whether or not the difference is measurable."
    return arm_table("quality", "Quality", arms, quality_columns(arms), SEEDS, note)


def differences_table(view: View) -> Table | None:
    """Make the table of differences to the arms that each is held against, seed by seed; None if there are none."""
    main = main_column(view.arms)
    columns = [main, *(column for column in quality_columns(view.arms) if column.best and column is not main)]
    columns = [column for column in columns if sum(column.key in arm.values for arm in view.arms) > 1]
    rows: list[list[Any]] = []
    for arm in view.arms:
        for other, named in view.references(arm):
            gaps = [difference(arm.values.get(column.key), other.values.get(column.key)) for column in columns]
            gap = difference(arm.values.get(main.key), other.values.get(main.key))
            words = [gap.verdict(main.best), 100 * gap.relative] if gap else [None, None]
            rows.append([arm.name, named, *words, *gaps])
    heads = [Column("arm"), Column("against"), Column(f"{main.label} is"), Column("by %", signed(fixed(1)))]
    heads += [Column(f"Δ {column.label}", signed(column.format or LOSS)) for column in columns]
    note = (
        "Δ is the arm's number minus the other's: the mean of the differences seed by seed, ± its standard error. With "
        "several seeds a difference is measurable if its 95% interval (Student's t) leaves out zero (bold); with a "
        "single seed, differences below 1% are called not measurably different."
    )
    return Table("differences", "Differences, seed by seed", heads, rows, note) if rows and columns else None


def along_table(view: View) -> Table | None:
    """Make the table of held-out loss or perplexity at some of the steps at which they were measured."""
    read, form, quantity = _quantity(view)
    curves = [(arm, arm.curves(read)) for arm in view.arms]
    named = view.sources(*([key[7:] for key in own if key.startswith("source.")] for _, own in curves))
    members = {"overall": "overall"} | {f"source.{name}": view.mark(name) for name in named}
    rows: list[list[Any]] = []
    for arm, own in curves:
        overall = own.get("overall", Curve())
        for place in even_places(len(overall.steps), _MOST_ROWS):
            step = overall.steps[place]
            clocks = [clock[place] if clock else None for clock in (overall.tokens, overall.seconds)]
            rows.append([arm.name, step, *clocks, *(own.get(key, Curve()).at("steps", step) for key in members)])
    columns = [Column("arm"), Column("step", whole), Column("tokens", whole), Column("seconds", compact)]
    columns += [Column(label, form) for label in members.values()]
    title = f"Held-out {quantity} along training"
    return Table("along", title, columns, rows, "Means over seeds.", folded=True) if rows else None


def sources_section(view: View) -> ReportSection:
    """Compare quality by source."""
    units = {"heldout": "nats per token", "heldout.perplexity": "perplexity", "exact_match": "answers that match, %"}
    titles = ("Held-out loss by source", "Held-out perplexity by source", "Exact match by source")
    keys = ("heldout_per_source", "perplexity", "exact_match_per_source")
    items = [
        by_source(view, key, title, f"{name}.per_source", unit, f"{name}.overall", SEEDS_NOTE)
        for key, title, (name, unit) in zip(keys, titles, units.items(), strict=True)
    ]
    named = view.sources(*(arm.group("heldout.perplexity.per_source") for arm in view.arms))[:_MOST_SOURCES]
    along = [_heldout(view, f"source.{name}", view.mark(name), "steps", f"along-{n}") for n, name in enumerate(named)]
    return ReportSection("sources", "By source", [], [*items, Item(along)])


def _quantity(view: View) -> tuple[Any, Any, str]:
    """Return what is drawn along training: perplexity where an arm has it, else loss."""
    if any(arm.curves(Facts.perplexity) for arm in view.arms):
        return Facts.perplexity, PERPLEXITY, "perplexity"
    return Facts.heldout, LOSS, "loss"


def _heldout(view: View, member: str, what: str, axis: str, key: str = "") -> Picture | None:
    """Draw held-out loss or perplexity along training."""
    read, form, quantity = (Facts.heldout, LOSS, "loss") if member == "small" else _quantity(view)
    return curve_picture(
        view,
        f"{key or quantity + '-' + member}-{axis}",
        f"Held-out {quantity}, {what}, by {axis[:-1]}",
        lambda arm: arm.curves(read).get(member, Curve()),
        "perplexity" if quantity == "perplexity" else "nats per token",
        form,
        axis=axis,
        smoothed=False,
        focus=True,
    )


def _training(view: View, axis: str) -> Picture | None:
    """Draw the training loss, a moving average."""
    title = f"Training loss, by {axis[:-1]}"
    read, unit = lambda arm: arm.step_curve("loss"), "nats per token"
    return curve_picture(view, f"train-{axis}", title, read, unit, LOSS, axis=axis, focus=True)
