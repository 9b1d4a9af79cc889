"""Parts of a report, whatever it is written as, and the ways in which sections show the arms' numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from colm_ds.report.arms import AXES, BY_SIGNALS, Arm, references
from colm_ds.report.charts import Line, Picture, Style, bar_picture, dot_picture, line_picture, smooth
from colm_ds.report.facts import GROUPS, NUMBERS, Curve
from colm_ds.report.svg import COLORS
from colm_ds.report.tables import Column, Format, Table, compact, quoted, whole

MAX_ARMS = 5
"""Arms in a picture unless more are asked for; tables have all."""

ROLES = {
    "plain_r": "plain on r",
    "plain_r_steps": "plain on r, equal accumulation steps",
    "plain_b": "plain on b",
    "keep_random": "small kept, rest random",
}

Lead = Mapping[Column, Callable[[Arm], Any]]
SEEDS: Lead = {
    Column("seeds", whole): lambda arm: len(arm.used),
    Column("steps", whole): lambda arm: arm.num_steps,
}
"""Columns that tables of arms may start with, and their cells."""


@dataclass(frozen=True)
class Item:
    """Pictures and the tables of their numbers, shown beside each other; `listings` are long texts by title, folded."""

    pictures: Sequence[Picture | None] = ()
    tables: Sequence[Table | None] = ()
    listings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportSection:
    """One of the six sections of a report: its name in links, heading, paragraphs, and what it shows."""

    key: str
    title: str
    text: Sequence[str]
    items: Sequence[Item]

    @property
    def pictures(self) -> list[Picture]:
        """Return the pictures of all items."""
        return [picture for item in self.items for picture in item.pictures if picture is not None]

    @property
    def tables(self) -> list[Table]:
        """Return the tables of all items."""
        return [table for item in self.items for table in item.tables if table is not None]


@dataclass(frozen=True)
class View:
    """Arms as the sections look at them.

    Attributes:
        arms: the arms, in order.
        small: names of the small sources.
        against: arms that all are held against; none: those that `references` chooses.
        drawn: the arms in pictures.
        sized: further arms, of other batch sizes, for memory against batch size only.
    """

    arms: Sequence[Arm]
    small: Collection[str]
    against: Sequence[Arm]
    drawn: Sequence[Arm]
    sized: Sequence[Arm] = ()

    def style(self, arm: Arm) -> Style:
        """Return how an arm is drawn in every picture: thick if it chooses by gradients or what stands for them."""
        return Style([other.name for other in self.drawn].index(arm.name), arm.selector in BY_SIGNALS)

    def references(self, arm: Arm) -> list[tuple[Arm, str]]:
        """Return the arms that one is held against, with their names and roles."""
        if self.against:
            return [(other, other.name) for other in self.against if other is not arm]
        chosen = references(arm, self.arms)
        roles = ROLES | ({"plain_r": "plain on r, equal micro-batch"} if "plain_r_steps" in chosen else {})
        return [(other, f"{other.name} ({roles[role]})") for role, other in chosen.items()]

    def data_shares(self) -> dict[str, float]:
        """Return the share of each source in the training data, from the first arm that knows them."""
        shares = next((shares for arm in self.arms if (shares := arm.group("data_share"))), {})
        return {name: share.mean for name, share in shares.items()}

    def sources(self, *groups: Collection[str]) -> list[str]:
        """Sort the sources that occur in any of the groups by falling share of the data."""
        shares = self.data_shares()
        return sorted(dict.fromkeys(name for group in groups for name in group), key=lambda name: -shares.get(name, 0))

    def mark(self, name: str) -> str:
        """Return a source's name, with "(small)" where it is one."""
        return f"{name} (small)" if name in self.small else name


def main_arm(arms: Sequence[Arm]) -> Arm | None:
    """Choose the arm that a comparison is about: of those that select by signals first, control last, then the best."""
    selecting = [arm for arm in arms if arm.selector is not None and not arm.is_plain]
    order = {**dict.fromkeys(BY_SIGNALS, 0), "keep_random": 2}
    return min(
        selecting,
        key=lambda arm: (
            not arm.is_finished,
            order.get(arm.selector or "", 1),
            arm.mean("heldout.overall") or math.inf,
        ),
        default=None,
    )


def drawn_arms(arms: Sequence[Arm], most: int, against: Sequence[Arm] = ()) -> list[Arm]:
    """Choose the arms in pictures: the main one, its references, then those by signals and others by held-out loss."""
    main = main_arm(arms)
    first = [] if main is None else [main, *(against or references(main, arms).values())]
    by_loss = sorted(arms, key=lambda arm: (arm.selector not in BY_SIGNALS, arm.mean("heldout.overall") or math.inf))
    names = list(dict.fromkeys(arm.name for arm in [*first, *by_loss]))[:most]
    return [arm for arm in arms if arm.name in names]


def columns_of(*keys: str) -> list[Column]:
    """Return the columns of single numbers."""
    return [NUMBERS[key] for key in keys]


def group_columns(arms: Sequence[Arm], name: str, order: Sequence[str] = ()) -> list[Column]:
    """Return a column for every member of a group that any arm has, those of `order` first."""
    known = dict.fromkeys(member for arm in arms for member in arm.group(name))
    members = [member for member in dict.fromkeys([*order, *known]) if member in known]
    return [replace(GROUPS[name], label=GROUPS[name].label.format(each), key=f"{name}.{each}") for each in members]


def arm_table(
    key: str, title: str, arms: Sequence[Arm], columns: Sequence[Column], lead: Lead | None = None, note: str = ""
) -> Table | None:
    """Make a table with a row for each arm; None if no arm has any of the numbers, which columns name by `key`."""
    lead = lead or {}
    known = [column for column in columns if any(column.key in arm.values for arm in arms)]
    rows = [
        [shown_name(arm), *(read(arm) for read in lead.values()), *(arm.values.get(column.key) for column in known)]
        for arm in arms
    ]
    return Table(key, title, [Column("arm"), *lead, *known], rows, note) if known else None


def shown_name(arm: Arm) -> str:
    """Return an arm's name, marked if it is not finished."""
    return arm.name + ("" if arm.is_finished else " (unfinished)")


def by_source(view: View, key: str, title: str, name: str, unit: str, first: str = "", note: str = "") -> Item:
    """Show a group of numbers by source: dots, and a table with a column for each arm.

    The unit is the picture's, a percentage if it ends with %; `first` is a single number for a first row, "overall".
    """
    shares = view.data_shares()
    named = view.sources(*(arm.group(name) for arm in view.arms))
    if not named:
        return Item()
    scale = 100 if unit.endswith("%") else 1
    dots = {arm: {source: scale * each.mean for source, each in arm.group(name).items()} for arm in view.drawn}
    positions = {source: [row[source] for row in dots.values() if source in row] for source in named}
    spread = {source: max(values) - min(values) for source, values in positions.items() if len(values) > 1}
    widest = max(spread, key=lambda source: spread[source], default=None)
    base = {view.mark(source): 100 * share for source, share in shares.items()}
    picture = dot_picture(
        key.replace("_", "-"),
        title,
        [view.mark(source) for source in named],
        [(arm.name, view.style(arm), {view.mark(k): x for k, x in row.items()}) for arm, row in dots.items()],
        ("share in the data", base) if name == "coreset_share" else None,
        x_label=unit,
        caption="" if widest is None else f"Furthest apart: {view.mark(widest)}, by {compact(spread[widest])}.",
        from_zero=scale == 100,
    )
    return Item([picture], [source_table(view, key, title, name, first, note)])


def member_table(
    view: View, key: str, title: str, name: str, members: Sequence[str], totals: Mapping[str, str], note: str = ""
) -> Table:
    """Make a table with a row for each member of a group, and for further numbers; a column for each arm.

    `totals` has the labels of the further rows by the path of their number.
    """
    column = GROUPS[name]
    rows: list[list[Any]] = [
        [member, *(arm.group(name).get(member) for arm in view.arms)]
        for member in members
        if any(member in arm.group(name) for arm in view.arms)
    ]
    rows += [[label, *(arm.values.get(each) for arm in view.arms)] for each, label in totals.items() if rows]
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    columns = [replace(column, label=arm.name, best="row") for arm in view.arms]
    head = Column("phase" if name in ("phase_s", "peak_memory_gib") else "part")
    return Table(key, title, [head, *columns], rows, note, best_of_rows=column.best)


def source_table(view: View, key: str, title: str, name: str, first: str = "", note: str = "") -> Table:
    """Make the table of `by_source`: the first row is overall, the second column the share of the data."""
    named, shares = view.sources(*(arm.group(name) for arm in view.arms)), view.data_shares()
    table = member_table(view, key, title, name, named, {first: "overall"}, note)
    rows = sorted(table.rows, key=lambda row: row[0] not in ("overall",))
    rows = [[view.mark(row[0]), shares.get(row[0]), *row[1:]] for row in rows]
    share = replace(GROUPS["data_share"], label="share of the data")
    return replace(table, columns=[Column("source"), share, *table.columns[1:]], rows=rows)


def by_part(view: View, table: Table, name: str, unit: str, caption: str, *left_out: str) -> Item:
    """Show a group of numbers by phase or part: bars, stacked unless they are peaks, beside their table."""
    bars = {arm.name: {part: each.mean for part, each in arm.group(name).items()} for arm in view.drawn}
    parts = [
        part
        for part in (row[0] for row in table.rows)
        if part not in left_out and any(bar.get(part, 0.0) > 0.002 * sum(bar.values()) for bar in bars.values())
    ]
    if len(parts) > len(COLORS):  # one colour each: the last share one
        others = parts[len(COLORS) - 1 :]
        parts = [*parts[: len(COLORS) - 1], ", ".join(others)]
        bars = {arm: bar | {parts[-1]: sum(bar.get(part, 0.0) for part in others)} for arm, bar in bars.items()}
    stacked = name != "peak_memory_gib"
    picture = bar_picture(table.key, table.title, bars, parts, x_label=unit, caption=caption, stacked=stacked)
    return Item([picture], [table if table.rows else None])


def curve_picture(
    view: View,
    key: str,
    title: str,
    read: Callable[[Arm], Curve],
    unit: str,
    form: Format = compact,
    *,
    axis: str = "steps",
    smoothed: bool = True,
    focus: bool = False,
    caption: str = "",
    further: Sequence[Line] = (),
) -> Picture | None:
    """Draw a number along training, a line for each arm, and further lines; None if no arm has it.

    The caption begins with what the lines end with, written by `form`; `axis` is one of `AXES`.
    """
    lines, ends = [], {}
    for arm in view.drawn:
        curve = smooth(read(arm)) if smoothed else read(arm)
        x = getattr(curve, axis)
        if x:
            ends[arm.name] = curve.values[-1]
            lines.append(Line(arm.name, view.style(arm), x, curve.values, curve.errors, marked=not smoothed))
    words = [f"At the end: {extremes(ends, form)}", caption, "Heights are those of the last two thirds." * focus]
    return line_picture(
        key,
        title,
        [*lines, *further] if lines else [],
        x_label=AXES[axis],
        y_label=unit,
        caption=" ".join(filter(None, words)),
        focus=focus,
    )


def extremes(named: Mapping[str, float | None], form: Format) -> str:
    """Say which of several numbers is lowest and which highest; empty for none."""
    known = sorted((value, name) for name, value in named.items() if value is not None)
    if len(known) < 2:
        return "".join(f"{quoted(name)}, {form(value)}." for value, name in known)
    (first, one), (last, other) = known[0], known[-1]
    if form(first) == form(last):
        return f"all about {form(first)}."
    return f"lowest {quoted(one)}, {form(first)}; highest {quoted(other)}, {form(last)}."
