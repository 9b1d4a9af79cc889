"""The table of arms for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from colm_ds.report.arms import make_arms
from colm_ds.report.quality import arms_table
from colm_ds.report.tables import shorten
from colm_ds.run_folder.read import Run

_WIDEST = 28


def format_table(runs: Sequence[Run]) -> str:
    """Quality, time, memory and examples of every arm, one line each, columns aligned.

    Args:
        runs: the runs to compare; those that differ in their seed only are one arm.
    """
    arms, _ = make_arms(runs)
    table = arms_table(arms, short=True)
    rows = [[shorten(cell, _WIDEST) for cell in row] for row in table.text_rows()]
    lines = [[column.label for column in table.columns], *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]

    def joined(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    head, *body = [joined(line) for line in lines]
    return "\n".join([head, "─" * len(head), *body])
