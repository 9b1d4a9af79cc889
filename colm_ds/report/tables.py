"""A table that reads the same in the terminal, in Markdown, in HTML and in JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from colm_ds.report.arms import Measure

MISSING = "–"

Format = Callable[[float], str]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        label: its heading, with the unit.
        format: text of a number; None for a column of text.
        best: which of its numbers is set in bold, "min" or "max"; "row" if it takes part in `Table.best_of_rows`.
    """

    label: str
    format: Format | None = None
    best: str | None = None

    def text(self, cell: Any) -> str:
        """A cell as text; a dash for None."""
        if cell is None:
            return MISSING
        if self.format is None:
            return str(cell)
        if not isinstance(cell, Measure):
            return self.format(cell)
        mean = self.format(cell.mean)
        return mean if cell.standard_error is None else f"{mean} ± {self.format(cell.standard_error)}"


@dataclass(frozen=True)
class Table:
    """Rows of cells; a cell is text, a number, a `Measure` or None.

    Attributes:
        key: name in `report.json`.
        title: what it shows.
        columns: the columns.
        rows: cells in the order of the columns.
        note: what a reader must know about it.
        folded: whether the page shows it on request only.
        best_of_rows: which number of a row is set in bold: "min", "max" or none.
    """

    key: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    folded: bool = False
    best_of_rows: str | None = None

    def text_rows(self) -> list[list[str]]:
        """Every cell as text."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def best_cells(self) -> set[tuple[int, int]]:
        """Row and column of the cells that hold the best number of their column (or row)."""
        found: set[tuple[int, int]] = set()
        for place, column in enumerate(self.columns):
            cells = [(index, place) for index in range(len(self.rows))]
            found |= self._best(cells, column.best)
        for index in range(len(self.rows)):
            cells = [(index, place) for place, column in enumerate(self.columns) if column.best == "row"]
            found |= self._best(cells, self.best_of_rows)
        return found

    def _best(self, cells: Sequence[tuple[int, int]], best: str | None) -> set[tuple[int, int]]:
        """Cells with the best number; none where there is nothing to choose from."""
        known = {cell: plain(self.rows[cell[0]][cell[1]]) for cell in cells}
        values = {cell: value for cell, value in known.items() if isinstance(value, (int, float))}
        if best not in ("min", "max") or len(values) < 2:
            return set()
        chosen = (min if best == "min" else max)(values, key=lambda cell: values[cell])
        shown = {cell: self.columns[cell[1]].format for cell in values}
        texts = {cell: form(values[cell]) for cell, form in shown.items() if form is not None}
        found = {cell for cell, text in texts.items() if text == texts.get(chosen)}  # what reads the same is the same
        return found if len(found) < len(values) else set()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers as numbers, means of seeds."""
        rows = [[plain(cell) for cell in row] for row in self.rows]
        labels = [column.label for column in self.columns]
        return {"key": self.key, "title": self.title, "note": self.note, "columns": labels, "rows": rows}


def plain(cell: Any) -> Any:
    """A cell for JSON: the mean of a `Measure`, a finite number rounded to 6 digits, anything else as it is."""
    if isinstance(cell, Measure):
        cell = cell.mean
    if isinstance(cell, float):
        return float(f"{cell:.6g}") if math.isfinite(cell) else None
    return cell


def fixed(digits: int) -> Format:
    """Numbers with so many decimals."""
    return lambda value: f"{value:.{digits}f}"


def signed(digits: int) -> Format:
    """Numbers with their sign and so many decimals; the minus is a real one, zero has none."""

    def form(value: float) -> str:
        shown = f"{value:+.{digits}f}"
        return shown.replace("-", "−") if float(shown) else shown[1:]

    return form


def whole(value: float) -> str:
    """A count with thousands separated."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.1f}%"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f} ×"


def compact(value: float) -> str:
    """A number of any size with 3 significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2g}"


def seconds(value: float) -> str:
    """Seconds with the precision that their size calls for."""
    return compact(value)


def kib(value: float) -> str:
    """Bytes in KiB."""
    return compact(value / 1024)


def clean(text: Any) -> str:
    """Text on one line without characters that XML forbids."""
    shown = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))
    return " ".join(shown.split())


def quoted(name: str) -> str:
    """A name for a sentence: in quotation marks where its end could not be told otherwise."""
    return f"“{name}”" if " " in name or "," in name else name


def shorten(text: Any, most: int) -> str:
    """Clean text of at most so many characters; the surplus is cut out of the middle."""
    shown = clean(text)
    head = (most - 1) // 2
    return shown if len(shown) <= most else f"{shown[:head]}…{shown[head + 1 - most :]}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 step", "3 steps"; counts up to nine in words are for whoever writes prose."""
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"
