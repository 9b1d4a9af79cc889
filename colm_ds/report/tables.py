"""Tables that read the same in the terminal, in Markdown, in HTML and in JSON, and how numbers are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from colm_ds.report.statistics import Difference, Measure
from colm_ds.untrusted.printable import visible

MISSING = "–"
SEEDS_NOTE = "± is the standard error of the mean over seeds."

Format = Callable[[float], str]

_BRIEF = 18  # characters of a cell of text that is kept on one line
_NARROW = 80  # characters, with gaps, of a table that fits beside a picture


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        label: its heading, with the unit.
        format: text of a number; None for a column of text.
        best: which of its numbers is set in bold, "min" or "max"; "row" if it takes part in `Table.best_of_rows`.
        key: the number of an arm that it shows, in tables of arms.
    """

    label: str
    format: Format | None = None
    best: str | None = None
    key: str = ""

    def text(self, cell: Any) -> str:
        """Write a cell; a dash for None."""
        if cell is None:
            return MISSING
        if self.format is None:
            return str(cell)
        if not isinstance(cell, (Measure, Difference)):
            return self.format(cell)
        mean, error = self.format(cell.mean), cell.standard_error
        if not error or error < 1e-9 * abs(cell.mean):  # of one seed, or of a count that no seed changes
            return mean
        decimals = len(mean.partition(".")[2])  # of a number as precise as its size calls for, the error's too
        written = f"{error:,.{decimals}f}" if self.format is compact else self.format(error).removeprefix("+")
        return f"{mean} ± {written}"


@dataclass(frozen=True)
class Table:
    """Rows of cells; a cell is text, a number, a `Measure`, a `Difference` or None. The first cell names the row.

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

    @property
    def is_wide(self) -> bool:
        """Return whether it needs the page's whole width."""
        return sum(width + 3 for width in self._widths()) > _NARROW

    def text_rows(self) -> list[list[str]]:
        """Write every cell."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def classes(self) -> list[str]:
        """Name the kind of every column for the page: "number", "text" (it wraps) or "brief"."""
        return [
            "number" if column.format else "text" if width > _BRIEF else "brief"
            for column, width in zip(self.columns, self._widths(), strict=True)
        ]

    def _widths(self) -> list[int]:
        """Return the longest cell of every column, or word of its heading, in characters."""
        rows = [*self.text_rows(), [max(column.label.split(" "), key=len) for column in self.columns]]
        return [max(len(row[place]) for row in rows) for place in range(len(self.columns))]

    def best_cells(self) -> set[tuple[int, int]]:
        """Return row and column of the cells that stand out: the best of a column or row, measurable differences."""
        found = {
            (index, place)
            for index, row in enumerate(self.rows)
            for place, cell in enumerate(row)
            if isinstance(cell, Difference) and cell.is_measurable and cell.standard_error is not None
        }
        for place, column in enumerate(self.columns):
            found |= self._best([(index, place) for index in range(len(self.rows))], column.best)
        for index in range(len(self.rows)):
            cells = [(index, place) for place, column in enumerate(self.columns) if column.best == "row"]
            found |= self._best(cells, self.best_of_rows)
        return found

    def _best(self, cells: Sequence[tuple[int, int]], best: str | None) -> set[tuple[int, int]]:
        """Return the cells with the best number; none where there is nothing to choose from."""
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
        """Return it for JSON: numbers as numbers, means of seeds; with their errors where there are any."""
        errors = [[plain(getattr(cell, "standard_error", None)) for cell in row] for row in self.rows]
        return {
            **{"key": self.key, "title": self.title, "note": self.note},
            "columns": [column.label for column in self.columns],
            "rows": [[plain(cell) for cell in row] for row in self.rows],
            **({"standard_errors": errors} if any(any(row) for row in errors) else {}),
        }


def plain(cell: Any) -> Any:
    """Return a cell for JSON: a mean, a finite number rounded to 6 digits, anything else as it is."""
    if isinstance(cell, (Measure, Difference)):
        cell = cell.mean
    if isinstance(cell, float):
        return float(f"{cell:.6g}") if math.isfinite(cell) else None
    return cell


def format_terminal(table: Table, widest: int = 28) -> str:
    """Align a table for the terminal; cells of more than `widest` characters are cut in the middle."""
    lines = [[column.label for column in table.columns]]
    lines += [[shorten(cell, widest) for cell in row] for row in table.text_rows()]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]
    head, *body = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
    return "\n".join([head, "─" * len(head), *body])


def fixed(digits: int) -> Format:
    """Write numbers with so many decimals."""
    return lambda value: f"{value:.{digits}f}"


def signed(form: Format) -> Format:
    """Write numbers with their sign; the minus is a real one, what reads as zero has none."""

    def write(value: float) -> str:
        shown = form(abs(value))
        return shown if not re.search(r"[1-9]", shown) else ("−" if value < 0 else "+") + shown

    return write


def whole(value: float) -> str:
    """Write a count with thousands separated."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * value:.1f}%"


def times(value: float) -> str:
    """Write a ratio."""
    return f"{value:.2f} ×"


def compact(value: float) -> str:
    """Write a number of any size with 3 significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2g}"


def clean(text: Any) -> str:
    """Return text on one line without characters that XML forbids or a terminal or browser obeys."""
    return " ".join(visible(text).split())


def quoted(name: str) -> str:
    """Return a name for a sentence: in quotation marks where its end could not be told otherwise."""
    return f"“{name}”" if " " in name or "," in name else name


def listed(words: Sequence[str]) -> str:
    """Enumerate words: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shorten(text: Any, most: int) -> str:
    """Return clean text of at most so many characters; the surplus is cut out of the middle."""
    shown = clean(text)
    head = (most - 1) // 2
    return shown if len(shown) <= most else f"{shown[:head]}…{shown[head + 1 - most :]}"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: "1 step", "3 steps"."""
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"
