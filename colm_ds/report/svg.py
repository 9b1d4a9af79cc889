"""matplotlib figures as inline SVG that takes its colours from the page, for light and dark, with nothing to load."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from colm_ds.report.tables import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where it is used: who reads a run's facts does not need it

INK, GRID, PAPER = "#010101", "#020202", "#030303"
"""Stand-ins for the page's own colours: text, grid lines, background."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's colours and a grey, replaced by the page's shades of them, which differ between light and dark."""

_VARIABLES = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--page)"} | {
    color: f"var(--c{index}, {color})" for index, color in enumerate(COLORS)
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of so many SVG units, with our settings while it is drawn and saved."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text, with its own fonts
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        yield figure


def to_svg(figure: Figure, key: str, description: str) -> str:
    """Return a figure as SVG text: no prolog, no metadata, ids of its own, the page's colours and font.

    Args:
        figure: made by `drawing`, which must still be open.
        key: different for every figure of a page.
        description: what it shows, for who does not see it.
    """
    import matplotlib

    stream = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = key  # ids follow from it
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None  # matplotlib always writes one
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {view[0]} role="img" aria-label={quoteattr(clean(description))}'
    text = f'{start} style="stroke-linejoin: round">' + text[text.index(">") + 1 :]
    return re.sub(r">\s+<", "><", text.replace("\n", " "))
