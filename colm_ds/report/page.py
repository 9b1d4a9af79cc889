"""A report as one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from colm_ds.report.charts import DASHES, LINE_WIDTH, MARKERS, LegendItem, Picture
from colm_ds.report.page_style import CSS
from colm_ds.report.section import Listing, ReportSection
from colm_ds.report.svg import COLORS
from colm_ds.report.tables import Table, clean

_BRIEF = 18  # characters of a cell that is kept on one line
_SHAPES = {
    "o": '<circle cx="18" cy="6" r="3.6" {fill}/>',
    "s": '<rect x="14.6" y="2.6" width="6.8" height="6.8" {fill}/>',
    "^": '<path d="M18 1.8 L22.2 9.6 L13.8 9.6 Z" {fill}/>',
    "D": '<path d="M18 1 L23 6 L18 11 L13 6 Z" {fill}/>',
    "v": '<path d="M18 10.2 L22.2 2.4 L13.8 2.4 Z" {fill}/>',
}


def render_page(title: str, about: str, summary: str, caveats: Sequence[str], sections: Sequence[ReportSection]) -> str:
    """The whole page.

    Args:
        title: its heading.
        about: one line below it: date and the like.
        summary: the paragraph that says what came out.
        caveats: what a reader must know before trusting it.
        sections: the chapters; empty ones are left out.
    """
    shown = [section for section in sections if not section.is_empty]
    links = "".join(f'<li><a href="#{escape(section.key)}">{_text(section.title)}</a></li>' for section in shown)
    warned = "".join(f"<li>{_text(caveat)}</li>" for caveat in caveats)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{_text(title)}</title>",
        f"<style>{CSS}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{_text(title)}</h1>",
        f'<p class="about">{_text(about)}</p>',
        f'<div class="summary"><p>{_text(summary)}</p></div>',
        f'<ul class="caveats">{warned}</ul>' if warned else "",
        f'<nav aria-label="Chapters"><ul>{links}</ul></nav></header>',
        "<main>",
        *(_section(section) for section in shown),
        "</main>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(part for part in parts if part or part == parts[-1])


def _text(value: Any) -> str:
    return escape(clean(value))


def _unbroken(value: Any) -> str:
    """Text whose short hyphenated words do not break at the hyphen."""
    words = clean(value).split(" ")
    return " ".join(
        f'<span class="word">{escape(word)}</span>' if "-" in word and len(word) <= _BRIEF else escape(word)
        for word in words
    )


def _section(section: ReportSection) -> str:
    parts = [f'<section id="{escape(section.key)}">', f"<h2>{_text(section.title)}</h2>"]
    parts += [f"<p>{_text(paragraph)}</p>" for paragraph in section.text]
    if section.pictures:
        parts += ['<div class="pictures">', *(_picture(picture) for picture in section.pictures), "</div>"]
    parts += [_table(table, headed=table.title != section.title) for table in section.tables]
    parts += [_listing(listing) for listing in section.listings]
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    legend = "".join(f"<li>{_swatch(item)}<span>{_text(item.label)}</span></li>" for item in picture.legend)
    parts = [f"<figure><figcaption>{_text(picture.title)}</figcaption>", picture.svg]
    if legend:
        parts.append(f'<ul class="legend">{legend}</ul>')
    if picture.caption:
        parts.append(f'<p class="caption">{_text(picture.caption)}</p>')
    return "\n".join([*parts, "</figure>"])


def _swatch(item: LegendItem) -> str:
    """A small picture of a line, marker or patch, drawn as in the charts."""
    head = '<svg viewBox="0 0 36 12" aria-hidden="true">'
    if item.kind == "tick":
        return f'{head}<path d="M18 0 V12" style="stroke: currentColor; stroke-width: 2"/></svg>'
    if item.style is None:
        return (
            f'{head}<path d="M2 6 H34" style="stroke: currentColor; stroke-width: 1.4; stroke-dasharray: 3 2"/></svg>'
        )
    color = f"var(--c{item.style % len(COLORS)})"
    if item.kind == "patch":
        return f'{head}<rect x="6" y="1" width="24" height="10" style="fill: {color}"/></svg>'
    shape = _SHAPES[MARKERS[item.style % len(MARKERS)]].format(fill=f'style="fill: {color}"')
    if item.kind == "marker":
        return f"{head}{shape}</svg>"
    dashes = " ".join(f"{length * LINE_WIDTH:.2f}" for length in DASHES[item.style % len(DASHES)])
    style = f"stroke: {color}; stroke-width: {LINE_WIDTH}" + f"; stroke-dasharray: {dashes}" * bool(dashes)
    return f'{head}<path d="M1 6 H35" style="{style}"/></svg>'


def _table(table: Table, *, headed: bool = True) -> str:
    best = table.best_cells()
    texts = table.text_rows()
    classes = [
        "number"
        if column.format
        else "text"
        if max((len(row[place]) for row in texts), default=0) > _BRIEF
        else "brief"
        for place, column in enumerate(table.columns)
    ]
    heads = "".join(
        f'<th scope="col" class="{kind}">{_unbroken(column.label)}</th>'
        for kind, column in zip(classes, table.columns, strict=True)
    )
    rows = []
    for index, row in enumerate(texts):
        cells = [f'<th scope="row" class="{classes[0]}">{_unbroken(row[0])}</th>']
        for place, cell in enumerate(row[1:], start=1):
            kind = classes[place] + " best" * ((index, place) in best)
            cells.append(f'<td class="{kind}">{_text(cell)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    if table.folded:
        return f'<details class="numbers"><summary>{_text(table.title)}: the numbers</summary>{note}{body}</details>'
    head = f"<h3>{_text(table.title)}</h3>\n" if headed else ""
    return f"{head}{body}{note}"


def _listing(listing: Listing) -> str:
    text = "\n".join(clean_line(line) for line in listing.text.split("\n"))
    return f"<details><summary>{_text(listing.title)}</summary><pre>{escape(text)}</pre></details>"


def clean_line(line: str) -> str:
    """A line of preformatted text: its indent is kept."""
    indent = len(line) - len(line.lstrip(" "))
    return " " * indent + clean(line)
