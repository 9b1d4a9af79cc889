"""Pictures of a comparison: lines, stacked and grouped bars, dots. Each is SVG with its legend as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from colm_ds.report.svg import COLORS, GRID, INK, PAPER, drawing, to_svg
from colm_ds.report.tables import shorten

WIDTH = 460
LINE_WIDTH = 1.8
DASHES = ((), (5.0, 1.6), (1.2, 1.4), (6.0, 1.5, 1.2, 1.5), (10.0, 2.0))
"""Dash and gap lengths of line styles, in line widths; 5 styles and 7 colours give 35 distinct lines."""
MARKERS = ("o", "s", "^", "D", "v")

_MAX_LABEL = 26
_LARGEST_DISC = 1500  # area, square points


@dataclass(frozen=True)
class LegendItem:
    """One entry of a legend.

    Attributes:
        label: what it stands for.
        style: index of its colour, dashes and marker; None for the text's colour.
        kind: "line", "marker", "patch" or "tick".
    """

    label: str
    style: int | None
    kind: str = "line"


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        key: prefix of its ids.
        title: what it shows, with the units.
        svg: the picture.
        legend: what its colours stand for.
        caption: how to read it.
    """

    key: str
    title: str
    svg: str
    legend: list[LegendItem] = field(default_factory=list)
    caption: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a line chart.

    Attributes:
        label: its name.
        style: index of its colour, dashes and marker.
        x: horizontal positions.
        y: heights.
        faint: unsmoothed `(x, y)`, drawn faintly behind.
        marked: whether its points are marked.
        level: height of a short mark of its colour at the right edge.
    """

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    faint: tuple[Sequence[float], Sequence[float]] | None = None
    marked: bool = False
    level: float | None = None


def line_picture(
    key: str,
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
    focus: bool = False,
    limits: tuple[float, float] | None = None,
    whole_x: bool = False,
) -> Picture | None:
    """Lines over steps or seconds; None if there is no point.

    Args:
        key: prefix of the picture's ids.
        title: what it shows.
        lines: the lines; those without points are left out.
        x_label: what is to the right, with its unit.
        y_label: what is upwards, with its unit.
        caption: how to read it.
        focus: fit the height to what comes after the first third, so that a steep start does not flatten the rest.
        limits: lowest and highest height shown.
        whole_x: whether horizontal positions are whole numbers, as steps are anyway.
    """
    shown = [line for line in lines if len(line.x)]
    if not shown:
        return None
    with drawing(WIDTH, 280) as figure:
        axes = figure.subplots()
        for line in shown:
            color = COLORS[line.style % len(COLORS)]
            if line.faint is not None:
                axes.plot(*line.faint, color=color, linewidth=0.7, alpha=min(0.25, 0.6 / len(shown)))
        for line in shown:
            marked = line.marked or len(line.x) == 1
            axes.plot(
                line.x,
                line.y,
                color=COLORS[line.style % len(COLORS)],
                linewidth=LINE_WIDTH,
                linestyle=_linestyle(line.style),
                marker=MARKERS[line.style % len(MARKERS)] if marked else None,
                markersize=4.5,
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
            )
        end = max(max(line.x) for line in shown)
        for line in shown:
            if line.level is not None:
                color = COLORS[line.style % len(COLORS)]
                axes.plot([0.955 * end, 1.015 * end], [line.level, line.level], color=color, linewidth=1.2)
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_x or x_label == "step"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if limits is not None:
            axes.set_ylim(*limits)
        elif focus:
            axes.set_ylim(*_focused(shown))
        axes.set_xlim(left=0 if min(min(line.x) for line in shown) >= 0 else None)
        svg = to_svg(figure, key, title)
    return Picture(key, title, svg, [LegendItem(line.label, line.style) for line in shown], caption)


def stacked_picture(
    key: str,
    title: str,
    bars: Mapping[str, Mapping[str, float]],
    parts: Sequence[str],
    *,
    x_label: str,
    caption: str = "",
) -> Picture | None:
    """Horizontal stacked bars; None if there are none.

    Args:
        key: prefix of the picture's ids.
        title: what it shows.
        bars: lengths of the parts by name of the bar, from the top.
        parts: names of the parts, from the left.
        x_label: what lengths mean, with the unit.
        caption: how to read it.
    """
    if not bars or not any(bars.values()):
        return None
    with drawing(WIDTH, 56 + 30 * len(bars)) as figure:
        axes = figure.subplots()
        places = np.arange(len(bars))
        left = np.zeros(len(bars))
        for index, part in enumerate(parts):
            lengths = np.array([bar.get(part, 0.0) for bar in bars.values()])
            axes.barh(places, lengths, 0.66, left, color=COLORS[index % len(COLORS)], edgecolor=PAPER, linewidth=0.8)
            left = left + lengths
        _label_rows(axes, list(bars), x_label)
        svg = to_svg(figure, key, title)
    return Picture(key, title, svg, [LegendItem(part, index, "patch") for index, part in enumerate(parts)], caption)


def grouped_picture(
    key: str,
    title: str,
    bars: Mapping[str, Mapping[str, float]],
    parts: Sequence[str],
    *,
    x_label: str,
    caption: str = "",
) -> Picture | None:
    """Horizontal bars side by side, one for each part; arguments as in `stacked_picture`."""
    if not bars or not any(bars.values()):
        return None
    height = 0.8 / len(parts)
    with drawing(WIDTH, 56 + (12 * len(parts) + 10) * len(bars)) as figure:
        axes = figure.subplots()
        for index, part in enumerate(parts):
            rows = [(place, bar[part]) for place, bar in enumerate(bars.values()) if part in bar]
            places = [place - 0.4 + height * (index + 0.5) for place, _ in rows]
            lengths = [length for _, length in rows]
            axes.barh(places, lengths, height, color=COLORS[index % len(COLORS)], edgecolor=PAPER, linewidth=0.8)
        _label_rows(axes, list(bars), x_label)
        svg = to_svg(figure, key, title)
    return Picture(key, title, svg, [LegendItem(part, index, "patch") for index, part in enumerate(parts)], caption)


def dot_picture(
    key: str,
    title: str,
    rows: Sequence[str],
    dots: Sequence[tuple[str, int, Mapping[str, float]]],
    base: tuple[str, Mapping[str, float]] | None,
    *,
    x_label: str,
    caption: str = "",
    from_zero: bool = True,
) -> Picture | None:
    """Dots in rows, with a tick in every row for what they are held against; None if there are no dots.

    Args:
        key: prefix of the picture's ids.
        title: what it shows.
        rows: names of the rows, from the top.
        dots: label, style and position in each row, of every kind of dot.
        base: label and position in each row of the tick; None for no ticks.
        x_label: what positions mean, with the unit.
        caption: how to read it.
        from_zero: whether positions start at 0.
    """
    dots = [dot for dot in dots if dot[2]]
    if not dots or not rows:
        return None
    step = 0.7 / max(len(dots), 2)
    with drawing(WIDTH, 56 + len(rows) * max(22, 5 * len(dots) + 8)) as figure:
        axes = figure.subplots()
        known = base[1] if base else {}
        ticks = [(known[row], place) for place, row in enumerate(rows) if row in known]
        axes.vlines([x for x, _ in ticks], [y - 0.42 for _, y in ticks], [y + 0.42 for _, y in ticks], INK, linewidth=2)
        for index, (_, style, positions) in enumerate(dots):
            offset = step * (index - (len(dots) - 1) / 2)
            points = [(positions[row], place + offset) for place, row in enumerate(rows) if row in positions]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                linestyle="none",
                color=COLORS[style % len(COLORS)],
                marker=MARKERS[style % len(MARKERS)],
                markersize=6.5,
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
            )
        for place in range(len(rows) - 1):
            axes.axhline(place + 0.5, color=GRID, linewidth=0.6)
        _label_rows(axes, rows, x_label, from_zero=from_zero)
        svg = to_svg(figure, key, title)
    legend = [LegendItem(label, style, "marker") for label, style, _ in dots]
    return Picture(key, title, svg, [*legend, *([LegendItem(base[0], None, "tick")] if base else [])], caption)


def bubble_picture(
    key: str,
    title: str,
    bubbles: Sequence[tuple[str, int, float, float, float]],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Picture | None:
    """Discs in a plane, their areas in proportion to a third quantity; None if there are none.

    Args:
        key: prefix of the picture's ids.
        title: what it shows.
        bubbles: label, style, horizontal position, height and area (in any unit) of every disc.
        x_label: what is to the right, with its unit.
        y_label: what is upwards, with its unit.
        caption: how to read it, the unit of areas too.
    """
    if not bubbles:
        return None
    largest = max(bubble[4] for bubble in bubbles)
    with drawing(WIDTH, 300) as figure:
        axes = figure.subplots()
        for _, style, x, y, area in sorted(bubbles, key=lambda bubble: -bubble[4]):
            color = COLORS[style % len(COLORS)]
            axes.scatter([x], [y], s=_LARGEST_DISC * area / largest, color=color, alpha=0.35, linewidths=0)
            axes.plot([x], [y], color=color, marker=MARKERS[style % len(MARKERS)], markersize=6, markeredgecolor=PAPER)
        axes.margins(0.16, 0.2)
        axes.grid()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        svg = to_svg(figure, key, title)
    return Picture(key, title, svg, [LegendItem(label, style, "marker") for label, style, *_ in bubbles], caption)


def _linestyle(style: int) -> Any:
    dashes = DASHES[style % len(DASHES)]
    return (0, dashes) if dashes else "solid"


def _label_rows(axes: Any, labels: Sequence[str], x_label: str, *, from_zero: bool = True) -> None:
    axes.set_yticks(range(len(labels)), [shorten(label, _MAX_LABEL) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if from_zero:
        axes.set_xlim(left=0)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _focused(lines: Sequence[Line]) -> tuple[float, float]:
    """Heights that hold every line after its first third, and its last three points, with a margin."""
    low, high = float("inf"), float("-inf")
    for line in lines:
        start = line.x[0] + (line.x[-1] - line.x[0]) / 3
        late = [*(y for x, y in zip(line.x, line.y, strict=True) if x >= start), *list(line.y)[-3:]]
        if line.faint is not None:  # and most of the raw values, to show how they scatter
            raw = [y for x, y in zip(*line.faint, strict=True) if x >= start]
            late += np.quantile(raw, [0.1, 0.9]).tolist() if raw else []
        low, high = min([low, *late]), max([high, *late])
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
