"""Reports: what runs cost and what came out of them, as a page, as Markdown, as JSON and in the terminal."""

from __future__ import annotations

from colm_ds.report.comparison import Comparison, compare, format_table, result_tables, run_records
from colm_ds.run_folder.read import Run, load_run

__all__ = ["Comparison", "Run", "compare", "format_table", "load_run", "result_tables", "run_records"]
