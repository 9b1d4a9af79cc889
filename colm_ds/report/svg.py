"""matplotlib figures as inline SVG that takes its colours from the page, for light and dark, with nothing to load."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from colm_ds.report.tables import clean

INK, GRID, PAPER = "#010101", "#020202", "#030303"
"""Stand-ins for the page's own colours: text, grid lines, background."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's colours and a grey, replaced by the page's shades of them, which differ between light and dark."""

_VARIABLES = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--page)"} | {
    color: f"var(--c{index}, {color})" for index, color in enumerate(COLORS)
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "colm_ds",
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
    """A figure of so many SVG units, with our settings while it is drawn and saved."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text, with its own fonts
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        yield figure


def to_svg(figure: Figure, key: str, description: str) -> str:
    """SVG text of a figure: no prolog, no metadata, ids of its own, the page's colours and font.

    Args:
        figure: made by `drawing`, which must still be open.
        key: prefix of its ids, different for every figure of a page.
        description: what it shows, for who does not see it.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(stream.getvalue())
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    _drop(root, "metadata")
    _drop(root, "style")
    used = set(re.findall(r"#([\w.-]+)", " ".join(_references(root))))
    for element in root.iter():
        _restyle(element, key, used)
    root.set("xmlns", _SVG.strip("{}"))
    root.set("role", "img")
    root.set("aria-label", clean(description))
    root.set("style", "stroke-linejoin: round")
    return ElementTree.tostring(root, encoding="unicode").replace("\n", "")


def _drop(root: ElementTree.Element, name: str) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.rpartition("}")[2] == name]:
            parent.remove(child)


def _references(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == _HREF or "url(#" in value:
                yield value


def _restyle(element: ElementTree.Element, key: str, used: set[str]) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    if element.text and not element.text.strip():
        element.text = None
    element.tail = None
    attributes = dict(element.attrib)
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            if value in used:
                element.set("id", f"{key}-{value}")
            continue
        if name == _HREF:
            name, value = "href", f"#{key}-{value.removeprefix('#')}"
        elif name == "clip-path":
            value = value.replace("url(#", f"url(#{key}-")
        elif name == "style":
            value = _page_style(value)
        elif name == "transform" and value.startswith("rotate(-0 "):
            continue
        elif name in ("d", "x", "y", "transform"):
            value = re.sub(r"(\.\d\d)\d+", r"\1", value)  # a hundredth of a unit is less than a pixel
        element.set(name, value)
    if element.tag == "text" and "fill:" not in element.get("style", ""):
        element.set("style", "fill: currentColor; " + element.get("style", ""))


def _page_style(style: str) -> str:
    """A style attribute with the page's colours and font."""
    style = re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), style)
    style = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1; font-family: inherit", style)
    return re.sub(r"font-family: [^;]*", "font-family: inherit", style)
