"""Pictures of a comparison: lines, bars, dots, discs. Each is SVG with its legend as data and a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colm_ds.report.facts import Curve
from colm_ds.report.svg import COLORS, GRID, INK, PAPER, drawing, to_svg
from colm_ds.report.tables import shorten

WIDTH = 460
DASHES = ((), (5.0, 1.6), (1.2, 1.4), (6.0, 1.5, 1.2, 1.5), (10.0, 2.0))
"""Dash and gap lengths of line styles, in line widths; 5 styles and 7 colours give 35 distinct lines."""
MARKERS = ("o", "s", "^", "D", "v")
MAX_POINTS = 200

_MAX_LABEL = 26
_LARGEST_DISC = 1500  # area, square points


@dataclass(frozen=True)
class Style:
    """Look of something in a picture and its legend: by an index, None for the text's colour; thick for CoLM."""

    index: int | None
    is_thick: bool = False

    @property
    def color(self) -> str:
        """Return the colour's stand-in, see `report.svg`."""
        return INK if self.index is None else COLORS[self.index % len(COLORS)]

    @property
    def width(self) -> float:
        """Return the width of a line."""
        return 3.2 if self.is_thick else 1.6

    @property
    def marker(self) -> str:
        """Return the marker."""
        return MARKERS[(self.index or 0) % len(MARKERS)]

    @property
    def dashes(self) -> tuple[float, ...]:
        """Return dash and gap lengths in line widths, none for a solid line."""
        return DASHES[(self.index or 0) % len(DASHES)]


@dataclass(frozen=True)
class LegendItem:
    """One entry of a legend; `kind` is "line", "marker", "patch" or "tick"."""

    label: str
    style: Style
    kind: str = "line"


@dataclass(frozen=True)
class Picture:
    """A picture of the page: a prefix of its ids, its title, SVG text, legend, and what to see in it."""

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
        style: how it is drawn.
        x: horizontal positions.
        y: heights.
        errors: half the height of a band around it; empty for none.
        marked: whether its points are marked.
        level: height of a short mark of its colour at the right edge.
    """

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
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
) -> Picture | None:
    """Draw lines; None if there is no point.

    With `focus` heights are those of the last two thirds, so that a steep start does not flatten the rest; `limits` are
    the lowest and highest height shown.
    """
    shown = [line for line in lines if len(line.x)]
    if not shown:
        return None
    with drawing(WIDTH, 280) as figure:
        axes = figure.subplots()
        end = max(max(line.x) for line in shown)
        for line in sorted(shown, key=lambda line: line.style.is_thick):
            if any(line.errors):
                y, errors = np.array(line.y), np.array(line.errors)
                axes.fill_between(line.x, y - errors, y + errors, color=line.style.color, alpha=0.15, linewidth=0)
            drawn = axes.plot(line.x, line.y, color=line.style.color, linewidth=line.style.width)[0]
            drawn.set_linestyle((0, line.style.dashes) if line.style.dashes else "solid")
            if line.marked or len(line.x) == 1:
                drawn.set(marker=line.style.marker, markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6)
            if line.level is not None:
                axes.plot([0.955 * end, 1.015 * end], [line.level] * 2, color=line.style.color, linewidth=1.2)
        _label(axes, x_label, y_label)
        _set_ticks(axes.xaxis, integer=all(float(x).is_integer() for x in shown[0].x))
        axes.grid(axis="y")
        axes.set_ylim(*limits if limits else _focused(shown) if focus else (None, None))
        axes.set_xlim(left=0 if min(min(line.x) for line in shown) >= 0 else None)
        svg = to_svg(figure, key, title)
    return Picture(key, title, svg, [LegendItem(line.label, line.style) for line in shown], caption)


def bar_picture(
    key: str,
    title: str,
    bars: Mapping[str, Mapping[str, float]],
    parts: Sequence[str],
    *,
    x_label: str,
    caption: str = "",
    stacked: bool = True,
) -> Picture | None:
    """Draw horizontal bars, from the top; their parts follow one another or lie below each other."""
    if not parts:
        return None
    height = 0.66 if stacked else 0.8 / len(parts)
    with drawing(WIDTH, 56 + (30 if stacked else 12 * len(parts) + 10) * len(bars)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(bars))
        for index, part in enumerate(parts):
            lengths = np.array([bar.get(part, 0.0) for bar in bars.values()])
            places = np.arange(len(bars)) + (0.0 if stacked else height * (index + 0.5) - 0.4)
            axes.barh(places, lengths, height, left, color=Style(index).color, edgecolor=PAPER, linewidth=0.8)
            left = left + lengths if stacked else left
        _rows(axes, list(bars), x_label)
        svg = to_svg(figure, key, title)
    legend = [LegendItem(part, Style(index), "patch") for index, part in enumerate(parts)]
    return Picture(key, title, svg, legend, caption)


def dot_picture(
    key: str,
    title: str,
    rows: Sequence[str],
    dots: Sequence[tuple[str, Style, Mapping[str, float]]],
    base: tuple[str, Mapping[str, float]] | None,
    *,
    x_label: str,
    caption: str = "",
    from_zero: bool = True,
) -> Picture | None:
    """Draw dots (label, style, position in each row), and a tick in every row for what they are held against."""
    dots = [dot for dot in dots if dot[2]]
    if not dots or not rows:
        return None
    step = 0.7 / max(len(dots), 2)
    with drawing(WIDTH, 56 + len(rows) * max(22, 5 * len(dots) + 8)) as figure:
        axes = figure.subplots()
        ticks = [(base[1][row], place) for place, row in enumerate(rows) if base and row in base[1]]
        axes.vlines([x for x, _ in ticks], [y - 0.42 for _, y in ticks], [y + 0.42 for _, y in ticks], INK, linewidth=2)
        for index, (_, style, positions) in enumerate(dots):
            offset = step * (index - (len(dots) - 1) / 2)
            points = [(positions[row], place + offset) for place, row in enumerate(rows) if row in positions]
            _markers(axes, points, style)
        for place in range(len(rows) - 1):
            axes.axhline(place + 0.5, color=GRID, linewidth=0.6)
        _rows(axes, rows, x_label, from_zero=from_zero)
        svg = to_svg(figure, key, title)
    legend = [LegendItem(label, style, "marker") for label, style, _ in dots]
    legend += [LegendItem(base[0], Style(None), "tick")] if base else []
    return Picture(key, title, svg, legend, caption)


def disc_picture(
    key: str,
    title: str,
    discs: Sequence[tuple[str, Style, float, float, float]],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Picture | None:
    """Draw discs (label, style, horizontal position, height, area in any unit); None if there are none."""
    if not discs:
        return None
    largest = max(disc[4] for disc in discs)
    with drawing(WIDTH, 300) as figure:
        axes = figure.subplots()
        for _, style, x, y, area in sorted(discs, key=lambda disc: -disc[4]):
            axes.scatter([x], [y], s=_LARGEST_DISC * area / largest, color=style.color, alpha=0.35, linewidths=0)
            _markers(axes, [(x, y)], style)
        axes.margins(0.16, 0.2)
        axes.grid()
        _label(axes, x_label, y_label)
        svg = to_svg(figure, key, title)
    return Picture(key, title, svg, [LegendItem(label, style, "marker") for label, style, *_ in discs], caption)


def smooth(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """Average over a moving window of a fifteenth of the points, at least 7, and keep at most so many points.

    The window is centred; at the start it narrows, because curves are steep there, and at the end it is cut off.
    """
    count = len(curve.values)
    half = max(3, count // 30)
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    places = np.arange(count)
    reach = np.minimum(half, places)
    stop = np.minimum(places + reach + 1, count)
    means = (sums[stop] - sums[places - reach]) / (stop - places + reach)
    kept = even_places(count, most)
    seconds, tokens = ([clock[place] for place in kept] if clock else [] for clock in (curve.seconds, curve.tokens))
    return Curve([curve.steps[place] for place in kept], seconds, tokens, [float(means[place]) for place in kept])


def even_places(count: int, most: int) -> list[int]:
    """Return at most so many places out of `count`, evenly spaced, first and last included."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _markers(axes: Any, points: Sequence[tuple[float, float]], style: Style) -> None:
    drawn = axes.plot([x for x, _ in points], [y for _, y in points], linestyle="none", color=style.color)[0]
    size = 8.5 if style.is_thick else 6.0
    drawn.set(marker=style.marker, markersize=size, markeredgecolor=PAPER, markeredgewidth=0.6)


def _label(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _set_ticks(axes.xaxis)
    _set_ticks(axes.yaxis)


def _set_ticks(axis: Any, *, integer: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator  # see svg.py

    axis.set_major_locator(MaxNLocator(6, integer=integer))


def _rows(axes: Any, labels: Sequence[str], x_label: str, *, from_zero: bool = True) -> None:
    _label(axes, x_label, "")
    axes.set_yticks(range(len(labels)), [shorten(label, _MAX_LABEL) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if from_zero:
        axes.set_xlim(left=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _focused(lines: Sequence[Line]) -> tuple[float, float]:
    """Return heights that hold every line after its first third, and its last three points, with a margin."""
    late = [
        y
        for line in lines
        for place, (x, y) in enumerate(zip(line.x, line.y, strict=True))
        if x >= line.x[0] + (line.x[-1] - line.x[0]) / 3 or place >= len(line.x) - 3
    ]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
