"""A report as Markdown: the same words and numbers as the page, without its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from colm_ds.report.section import Listing, ReportSection
from colm_ds.report.tables import Table, clean


def render_markdown(
    title: str, about: str, summary: str, caveats: Sequence[str], sections: Sequence[ReportSection]
) -> str:
    """The whole report; arguments as in `render_page`."""
    parts = [f"# {_text(title)}", _text(about), _text(summary)]
    if caveats:
        parts.append("\n".join(f"- {_text(caveat)}" for caveat in caveats))
    for section in sections:
        if section.is_empty:
            continue
        parts.append(f"## {_text(section.title)}")
        parts += [_text(paragraph) for paragraph in section.text]
        for table in section.tables:
            parts += [f"### {_text(table.title)}", _table(table)]
            if table.note:
                parts.append(_text(table.note))
        parts += [_listing(listing) for listing in section.listings]
    return "\n\n".join(parts) + "\n"


def _text(value: Any) -> str:
    """Text in which nothing is markup."""
    escaped = re.sub(r"([\\`*<>\[\]|&$~#])", r"\\\1", clean(value))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)


def _table(table: Table) -> str:
    best = table.best_cells()
    lines = [[_text(column.label) for column in table.columns]]
    lines.append(["---" if column.format is None else "---:" for column in table.columns])
    for index, row in enumerate(table.text_rows()):
        cells = [_text(cell) for cell in row]
        lines.append([f"**{cell}**" if (index, place) in best else cell for place, cell in enumerate(cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listing(listing: Listing) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", listing.text)), default=0))
    return f"### {_text(listing.title)}\n\n{fence}json\n{listing.text}\n{fence}"
