"""A report as one HTML file, from the template beside this module, and as Markdown, without pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colm_ds.report.section import ReportSection
from colm_ds.report.svg import COLORS
from colm_ds.report.tables import Table, clean
from colm_ds.untrusted.printable import visible

_SHAPES = {  # outlines of the markers, in legends
    "o": "M14.4 6 a3.6 3.6 0 1 0 7.2 0 a3.6 3.6 0 1 0 -7.2 0 Z",
    "s": "M14.6 2.6 H21.4 V9.4 H14.6 Z",
    "^": "M18 1.8 L22.2 9.6 L13.8 9.6 Z",
    "D": "M18 1 L23 6 L18 11 L13 6 Z",
    "v": "M18 10.2 L22.2 2.4 L13.8 2.4 Z",
}


def render_page(title: str, about: str, summary: str, caveats: Sequence[str], sections: Sequence[ReportSection]) -> str:
    """Return the HTML page; arguments are attributes of a `Comparison`; sections with nothing to show are left out."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    words = {"title": title, "about": about, "summary": summary, "caveats": caveats, "sections": shown(sections)}
    return environment.get_template("template.html").render(words, shapes=_SHAPES, num_colors=len(COLORS))


def render_markdown(
    title: str, about: str, summary: str, caveats: Sequence[str], sections: Sequence[ReportSection]
) -> str:
    """Return the words and tables of the page as Markdown; arguments as in `render_page`."""
    parts = [f"# {_text(title)}", _text(about), _text(summary)]
    parts += ["\n".join(f"- {_text(caveat)}" for caveat in caveats)] if caveats else []
    for section in shown(sections):
        parts += [f"## {_text(section.title)}", *(_text(paragraph) for paragraph in section.text)]
        parts += [markdown_table(table) for table in section.tables]
        parts += [_listing(title, text) for item in section.items for title, text in item.listings.items()]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table as Markdown with its title and note."""
    best = table.best_cells()
    lines = [[_text(column.label) for column in table.columns]]
    lines.append(["---" if column.format is None else "---:" for column in table.columns])
    for index, row in enumerate(table.text_rows()):
        cells = [_text(cell) for cell in row]
        lines.append([f"**{cell}**" if (index, place) in best else cell for place, cell in enumerate(cells)])
    parts = [f"### {_text(table.title)}", "\n".join(f"| {' | '.join(line)} |" for line in lines), _text(table.note)]
    return "\n\n".join(part for part in parts if part)


def shown(sections: Sequence[ReportSection]) -> list[ReportSection]:
    """Return the sections that have something to show."""
    return [each for each in sections if each.pictures or each.tables or any(item.listings for item in each.items)]


def _text(value: Any) -> str:
    """Return text in which nothing is markup."""
    escaped = re.sub(r"([\\`*<>\[\]|&$~#])", r"\\\1", clean(value))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)


def _listing(title: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"### {_text(title)}\n\n{fence}json\n{text}\n{fence}"
