"""Selection and whether it paid: shares of sources, equal budgets, coherence, gradient variance, lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colm_ds.report.arms import AXES, Arm, equal_budget
from colm_ds.report.charts import Line, Picture, Style, line_picture, smooth
from colm_ds.report.facts import Curve, Facts
from colm_ds.report.section import Item, ReportSection, View, arm_table, by_source, curve_picture, group_columns
from colm_ds.report.statistics import ratio
from colm_ds.report.tables import SEEDS_NOTE, Column, Table, fixed, quoted, signed, times
from colm_ds.run_folder.coherence import coherence_summary
from colm_ds.run_folder.read import lookup, numbers

_VARIANCE = "coreset.gradient_variance"


def selected_section(view: View) -> ReportSection:
    """Show what selection took, what it rested on, and what it bought."""
    text = [
        "Selection pays where an arm is better at equal seconds; one that is better at equal steps alone takes "
        "dearer steps. Coherence is the length of a source's mean gradient signal over the mean length: near 1 a "
        "medoid stands for its source, near 1/√n (n examples in the large batch) choosing within a source cannot "
        "beat chance. Variance is the squared distance of the coreset's mean gradient of all trained matrices "
        "(of the probed layer in runs of version 0.1.0) to the large batch's, relative to the latter's squared "
        "length; × random, or kappa, is that over the same of as many random examples, worth the number of random "
        "examples with the coreset's error."
    ]
    note = "Counted over all examples that the runs trained on; plain training follows the data."
    shares = by_source(view, "shares", "Share of each source in the coreset", "coreset_share", "examples, %", note=note)
    losses = by_source(
        view,
        "source_losses",
        "Training loss of the selected, last tenth of the steps",
        "late_loss",
        "nats per token",
        note=SEEDS_NOTE,
    )
    items = [Item(tables=[paid_table(view)]), shares, *_coherence(view), _signals(view), losses]
    return ReportSection("selected", "What was selected, and whether it paid", text, items)


def paid_table(view: View) -> Table | None:
    """Hold every arm that selects against others at equal budgets; None if there is nothing to hold it against."""
    rows: list[list[Any]] = []
    for arm in view.arms:
        for other, named in view.references(arm) if arm.selector is not None and not arm.is_plain else ():
            gaps = [equal_budget(arm, other, axis) for axis in AXES]
            small = equal_budget(arm, other, "seconds", "small")
            costs = [
                ratio(arm.values.get(key), other.values.get(key)) for key in ("step_s.median", "peak_memory_gib.peak")
            ]
            rows.append([arm.name, named, *gaps, gaps[-1].verdict() if gaps[-1] else None, small, *costs])
    form = signed(fixed(4))
    columns = [Column("arm"), Column("against"), *(Column(f"Δ loss, equal {axis}", form) for axis in AXES)]
    columns += [Column("at equal seconds it is"), Column("Δ small sources, equal seconds", form)]
    columns += [Column("time per step", times), Column("peak memory", times)]
    note = (
        "Δ held-out loss, seed by seed ± its standard error, where both arms have spent as much: the most that all "
        "their runs have, between evaluations on a straight line. Before its end the learning rate of an arm has not "
        "come down: a run of its own with fewer steps is the fairer comparison. Ratios are the arm's over the "
        "other's."
    )
    table = Table("paid", "Whether it paid: equal steps, equal tokens, equal seconds", columns, rows, note)
    return table if any(cell is not None for row in rows for cell in row[2:]) else None


def _coherence(view: View) -> list[Item]:
    """Show how far the gradients of one source agree, and say what that means for medoids."""
    pictures: list[Picture | None] = []
    rows: list[list[Any]] = []
    for place, arm in enumerate(view.arms):
        found = [_coherences(facts) for facts in arm.used]
        end = [_coherences(facts, late=True) for facts in arm.used]
        curves, floors = arm.step_curves("coreset.coherence"), found[0].get("unrelated", {})
        late = end[0].get("per_source", {})
        for name, mean in arm.group("coreset.coherence").items():
            rows.append([arm.name, name, mean, late.get(name), floors.get(name)])
        lines = []
        for style, (name, curve) in enumerate(curves.items()):
            line = smooth(curve)
            lines.append(Line(name, Style(style), line.steps, line.values, level=floors.get(name)))
        words = [str(each[0].get("verdict", "")) for each in (found, end)]
        caption = f"{quoted(arm.name)}: {words[0]}; in the last tenth of the steps {words[1]}."
        if arm in view.drawn:
            picture = line_picture(
                f"coherence-{place}",
                f"Coherence by source: {arm.name}",
                lines,
                x_label="step",
                y_label="|mean g| / mean |g|",
                limits=(0.0, 1.02),
                caption=f"{caption} Marks at the right: 1/√n.",
            )
            pictures.append(picture)
    if not rows:
        return []
    forms = {label: fixed(3) for label in ("mean of the steps", "last tenth", "1/√n, unrelated gradients")}
    columns = [Column("arm"), Column("source"), *(Column(label, form) for label, form in forms.items())]
    spsa = any(lookup(arm.config, "colm", "probe", "estimator") == "spsa" for arm in view.arms)
    note = SEEDS_NOTE + " spsa sees a gradient through K directions only: with K = 1 the ratio scatters." * spsa
    return [Item(pictures, [Table("coherence", "Coherence by source", columns, rows, note)])]


def _coherences(facts: Facts, *, late: bool = False) -> dict[str, Any]:
    """Summarise a run's coherence, or that of the last tenth of its steps; empty if it did not look at gradients."""
    steps = facts.run.steps[-max(1, len(facts.run.steps) // 10) :] if late else facts.run.steps
    kept = [{key: numbers(lookup(step, "coreset", key)) for key in ("seen", "coherence")} for step in steps]
    return coherence_summary([{"coreset": each} for each in kept], facts.small)


def _signals(view: View) -> Item:
    """Show variance, kappa and lengths along training, and their means."""
    random, lengths = [], []
    for place, arm in enumerate(view.drawn):
        curves: Mapping[str, Curve] = arm.step_curves(_VARIANCE)
        shown = smooth(curves.get("random", Curve()))
        style = Style(len(view.drawn) + place)
        random.append(Line(f"{arm.name}: as many at random", style, shown.steps, shown.values))
    batch = next((found["large_batch"] for arm in view.arms if "large_batch" in (found := _lengths(arm))), Curve())
    shown = smooth(batch)
    lengths.append(Line("the large batch", Style(len(view.drawn)), shown.steps, shown.values))
    pictures = [
        curve_picture(
            view,
            "variance",
            "Variance of the coreset's gradient",
            lambda arm: arm.step_curves(_VARIANCE).get("coreset", Curve()),
            "relative to |mean gradient|²",
            caption="Selection helps where a line is below that of as many random examples.",
            further=random,
        ),
        curve_picture(
            view,
            "kappa",
            "Kappa: the coreset's error over that of random examples",
            lambda arm: arm.step_curves(_VARIANCE).get("kappa", Curve()),
            "kappa",
            caption="Below 1 a coreset is nearer to its large batch than as many random examples are.",
        ),
        curve_picture(
            view,
            "lengths",
            "Completion length of the selected",
            lambda arm: _lengths(arm).get("coreset", Curve()),
            "labelled tokens",
            caption="Beside the large batch's: whether selection prefers short or long completions.",
            further=lengths,
        ),
    ]
    columns = [*group_columns(view.arms, "label_tokens"), *group_columns(view.arms, "gradient_variance")]
    columns = [column for column in columns if not column.key.endswith(("large_batch", "kappa"))]
    return Item(pictures, [arm_table("signals", "What was taken", view.arms, columns, note=SEEDS_NOTE)])


def _lengths(arm: Arm) -> Mapping[str, Curve]:
    return arm.step_curves("coreset.label_tokens")
