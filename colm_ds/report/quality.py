"""What came out of it: the arms side by side, against plain training, by source, and along training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from colm_ds.report.arms import Arm, mean_curve
from colm_ds.report.charts import Line, Picture, dot_picture, line_picture
from colm_ds.report.curves import envelope, seconds_at, smooth, steps_of, thin, value_at
from colm_ds.report.differences import difference, ratio, references
from colm_ds.report.facts import Curve
from colm_ds.report.section import ReportSection
from colm_ds.report.tables import MISSING, Column, Table, fixed, percent, seconds, signed, times, whole
from colm_ds.run_folder.read import lookup

ROLES = {
    "plain_r": "plain on r",
    "plain_r_steps": "plain on r, equal accumulation steps",
    "plain_b": "plain on b",
    "keep_random": "small kept, rest random",
}

_LOSS = fixed(4)
_FOCUS = "Heights are those of the last two thirds, to tell the ends apart; what lies outside is in the table."


def arms_table(arms: Sequence[Arm], *, short: bool = False) -> Table:
    """One row for each arm: quality, time, memory, examples.

    Args:
        arms: the arms.
        short: without what the arms are, for the terminal.
    """
    classified = any(arm.mean("accuracy") is not None for arm in arms)
    has_perplexity = any(arm.mean("perplexity") is not None for arm in arms)
    columns = [
        Column("arm"),
        *([] if short else [Column("b of r")]),
        Column("seeds", whole),
        Column("steps", whole),
        Column("held-out loss", _LOSS, "min"),
        Column("macro", _LOSS, "min"),
        Column("small sources", _LOSS, "min"),
        *([Column("perplexity", fixed(2), "min")] if has_perplexity else []),
        *([Column("accuracy", percent, "max"), Column("before training", percent)] if classified else []),
        Column("exact match", percent, "max"),
        Column("s per step", seconds, "min"),
        Column("p10–p90"),
        Column("peak GiB", fixed(2), "min"),
        Column("trained", whole),
        Column("probed", whole),
        *([] if short else [Column("selection")]),
    ]
    rows = []
    for arm in arms:
        quality = [arm.scalars.get(f"heldout_{key}") for key in ("overall", "macro", "small")]
        rows.append(
            [
                arm.name + ("" if arm.is_finished else " (unfinished)"),
                *([] if short else [_sizes(arm)]),
                len(arm.counted),
                arm.num_steps,
                *quality,
                *([arm.scalars.get("perplexity")] if has_perplexity else []),
                *([arm.mean("accuracy"), arm.mean("accuracy_before")] if classified else []),
                arm.mean("exact_match"),
                arm.mean("step_s"),
                _range(arm),
                arm.mean("peak_gib"),
                arm.mean("examples_trained"),
                arm.mean("examples_probed"),
                *([] if short else [describe(arm)]),
            ]
        )
    note = (
        "Losses are nats per labelled token at the end of training: over all tokens (held-out), mean over sources "
        "(macro) and mean over the small sources; ± is the standard error over seeds. Seconds are the median of a step "
        "and its 10% and 90% quantiles. Trained and probed count examples over the whole run. Bold: the best number of "
        "a column, whether or not the difference is measurable."
    )
    return Table("arms", "Arms", columns, rows, note)


def describe(arm: Arm) -> str | None:
    """What an arm trains on, in a few words; None if its configuration does not say."""
    if arm.selector is None:
        return None
    if arm.selector == "full":
        return "plain, every example"
    if arm.selector == "random":
        return "plain, random"
    if arm.selector == "keep_random":
        return "small sources kept, rest random"
    if arm.selector != "colm":
        return arm.selector
    estimator = str(lookup(arm.colm, "probe", "estimator") or "signal")
    count = lookup(arm.colm, "probe", "num_probes")
    if estimator != "exact" and isinstance(count, int):
        estimator += f" K = {count}"
    pool = " in one pool" if arm.colm.get("per_source") is False else ""
    return f"medoids{pool} by {estimator}, {arm.colm.get('weights', 'uniform')} weights"


def against_table(arms: Sequence[Arm]) -> Table | None:
    """Every arm held against plain training on r, on b, and against random picks beside the small sources."""
    has_errors = any(len(arm.counted) > 1 for arm in arms)
    columns = [
        Column("arm"),
        Column("against"),
        Column("Δ held-out", signed(4)),
        Column("Δ held-out, %", signed(1)),
        *([Column("± standard error", fixed(4))] if has_errors else []),
        Column("held-out loss is"),
        Column("Δ macro", signed(4)),
        Column("Δ small sources", signed(4)),
        Column("small sources' loss is"),
        Column("time per step", times),
        Column("peak memory", times),
    ]
    rows = []
    for arm in arms:
        others = references(arm, arms)
        roles = ROLES | ({"plain_r": "plain on r, equal micro-batch"} if "plain_r_steps" in others else {})
        for role, other in others.items():
            overall, macro, small = (difference(arm, other, f"heldout_{key}") for key in ("overall", "macro", "small"))
            rows.append(
                [
                    arm.name,
                    f"{other.name} ({roles[role]})",
                    overall.mean if overall else None,
                    100 * overall.relative if overall else None,
                    *([overall.standard_error if overall else None] if has_errors else []),
                    overall.verdict if overall else None,
                    macro.mean if macro else None,
                    small.mean if small else None,
                    small.verdict if small else None,
                    ratio(arm, other, "step_s"),
                    ratio(arm, other, "peak_gib"),
                ]
            )
    note = (
        "Δ is the arm's loss minus the other's, negative where the arm is better; of several seeds the mean of the "
        "differences seed by seed. With several seeds a difference is measurable if its 95% interval (Student's t) "
        "leaves out zero; with a single seed, differences below 1% are called not measurably different, and larger "
        "ones may still be the luck of the seed. Ratios of time and memory are the arm's over the other's."
    )
    return Table("against", "Against plain training", columns, rows, note) if rows else None


def sources_section(arms: Sequence[Arm], small: Collection[str]) -> ReportSection:
    """Held-out loss, and exact match where there is any, by source."""
    shares = data_shares(arms)
    tables, pictures = [], []
    for key, group, title, form, best in (
        ("heldout_per_source", "heldout", "Held-out loss by source, nats per token", _LOSS, "min"),
        ("exact_match_per_source", "exact_match", "Exact match by source", percent, "max"),
    ):
        found = [arm.groups.get(group, {}) for arm in arms]
        named = source_names(arms, found)
        columns = [
            Column("source"),
            Column("share of the data", percent),
            *(Column(arm.name, form, "row") for arm in arms),
        ]
        rows = [[mark_small(name, small), shares.get(name), *(values.get(name) for values in found)] for name in named]
        if not rows:
            continue
        tables.append(Table(key, title, columns, rows, best_of_rows=best))
        scale = 1 if form is _LOSS else 100
        dots = [
            (arm.name, style, {mark_small(name, small): scale * measure.mean for name, measure in values.items()})
            for style, (arm, values) in enumerate(zip(arms, found, strict=True))
        ]
        x_label = "nats per token" if form is _LOSS else "answers that match, %"
        marked = [mark_small(name, small) for name in named]
        pictures.append(
            dot_picture(key.replace("_", "-"), title, marked, dots, None, x_label=x_label, from_zero=scale == 100)
        )
    return ReportSection("sources", "By source", pictures=[p for p in pictures if p is not None], tables=tables)


def data_shares(arms: Sequence[Arm]) -> dict[str, float]:
    """Share of each source in the training data, from the first arm that knows them."""
    found = next((arm.groups["data_share"] for arm in arms if "data_share" in arm.groups), {})
    return {name: share.mean for name, share in found.items()}


def source_names(arms: Sequence[Arm], groups: Sequence[Mapping[str, object]]) -> list[str]:
    """Names that occur in any of the groups, by falling share of the data."""
    shares = data_shares(arms)
    known = dict.fromkeys(name for group in groups for name in group)
    return sorted(known, key=lambda name: -shares.get(name, 0.0))


def mark_small(name: str, small: Collection[str]) -> str:
    """A source's name, with "(small)" where it is one."""
    return f"{name} (small)" if name in small else name


def training_section(arms: Sequence[Arm]) -> ReportSection:
    """Training loss by step and by second."""
    raw = {arm.name: mean_curve(arm.train_loss()) for arm in arms}
    smoothed = {name: smooth(curve) for name, curve in raw.items() if curve.values}
    pictures = []
    for by, x_label, title in (
        ("steps", "step", "Training loss by step"),
        ("seconds", "seconds of training", "Training loss by time"),
    ):
        lines = []
        for style, arm in enumerate(arms):
            if arm.name not in smoothed:
                continue
            line, faint = thin(smoothed[arm.name]), envelope(raw[arm.name])
            x = getattr(faint, by)
            lines.append(Line(arm.name, style, getattr(line, by), line.values, (x, faint.values) if x else None))
        pictures.append(
            line_picture(
                f"train-{by}", title, lines, x_label=x_label, y_label="nats per token", caption=_FOCUS, focus=True
            )
        )
    text = [
        "The loss of the examples that each step trained on, a moving average over the raw values in the background. "
        "Arms choose different examples, and one that chooses harder ones shows a higher training loss without being "
        "worse: held-out loss decides."
    ]
    table = _curve_table("train_loss", "Training loss (moving average) and seconds of training", arms, smoothed, 25)
    return ReportSection("training", "Training loss", text, [p for p in pictures if p], [table] if table else [])


def heldout_section(arms: Sequence[Arm]) -> ReportSection:
    """Held-out loss along training, overall and on the small sources, by step and by second."""
    curves = {key: {arm.name: arm.heldout(key) for arm in arms} for key in ("overall", "small")}
    pictures: list[Picture | None] = []
    tables: list[Table | None] = []
    for key, what in (("overall", "overall"), ("small", "mean of the small sources")):
        for by, x_label, ending in (("steps", "step", "by step"), ("seconds", "seconds of training", "by time")):
            lines = [
                Line(arm.name, style, getattr(curve, by), curve.values if getattr(curve, by) else [], marked=True)
                for style, arm in enumerate(arms)
                if (curve := curves[key][arm.name]).values
            ]
            title = f"Held-out loss, {what}, {ending}"
            pictures.append(
                line_picture(
                    f"heldout-{key}-{by}",
                    title,
                    lines,
                    x_label=x_label,
                    y_label="nats per token",
                    caption=_FOCUS,
                    focus=True,
                )
            )
        tables.append(_curve_table(f"heldout_{key}", f"Held-out loss, {what}", arms, curves[key], 25, exact=True))
    text = [
        "Nats per labelled token on examples that no arm trains on. Seconds count training steps only, not the "
        "evaluations."
    ]
    return ReportSection(
        "heldout", "Held-out loss", text, [p for p in pictures if p is not None], [t for t in tables if t is not None]
    )


def _curve_table(
    key: str, title: str, arms: Sequence[Arm], curves: Mapping[str, Curve], most: int, *, exact: bool = False
) -> Table | None:
    """Values of every arm's curve at some steps, and the seconds that it took to get there."""
    shown = [(arm.name, curves[arm.name]) for arm in arms if arm.name in curves and curves[arm.name].values]
    steps = steps_of([curve for _, curve in shown], most)
    if not steps:
        return None
    nearby = 0 if exact else max(1, steps[-1] // 200)
    columns = [Column("step", whole), *(Column(name, _LOSS) for name, _ in shown)]
    columns += [Column(f"{name}, s", seconds) for name, curve in shown if curve.seconds]
    rows = [
        [
            step,
            *(value_at(curve, step, nearby) for _, curve in shown),
            *(seconds_at(curve, step) for _, curve in shown if curve.seconds),
        ]
        for step in steps
    ]
    return Table(key, title, columns, rows, folded=len(rows) > 12)


def _sizes(arm: Arm) -> str | None:
    if arm.coreset_size is None and arm.large_batch_size is None:
        return None
    size, large = (MISSING if value is None else str(value) for value in (arm.coreset_size, arm.large_batch_size))
    return f"{size} of {large}"


def _range(arm: Arm) -> str | None:
    low, high = arm.mean("step_s_p10"), arm.mean("step_s_p90")
    return None if low is None or high is None else f"{seconds(low)}–{seconds(high)}"
