"""Names of what a run writes into its output folder, and the states that it can be in."""

from __future__ import annotations

import shutil
from pathlib import Path

from colm_ds.run_folder.files import read_object

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
LOCK = "run.lock"
EVALUATION_ERROR = "evaluation_error.txt"
"""Traceback of a final evaluation that failed."""

CHECKPOINTS, MODEL, ADAPTER, BEST_MODEL = "checkpoints", "model", "adapter", "best_model"
EVALUATION, MONITOR = "evaluation", "monitor"
RESULTS = "results.json"
"""Scores, in `EVALUATION`."""

REPORT_PAGE, REPORT_MARKDOWN, REPORT_NUMBERS = "report.html", "report.md", "report.json"
"""Files of a report, which `colm-ds report RUN` writes into the run's folder."""

FINISHED, UNFINISHED, STOPPED, DIVERGED = "finished", "unfinished", "stopped", "diverged"
NOT_EVALUATED = "not evaluated"
"""Status of a run whose steps are done and whose weights are written, but whose final evaluation failed."""

_FILES = (CONFIG, METRICS, SUMMARY, "config.tmp", "metrics.tmp", "summary.tmp", EVALUATION_ERROR)
_FOLDERS = (CHECKPOINTS, MODEL, ADAPTER, BEST_MODEL, MONITOR, EVALUATION)
_PATTERNS = (
    *("memory_*_rank*.pickle", ".config.json.*", ".metrics.jsonl.*", ".summary.json.*", ".*.partial"),
    f".{BEST_MODEL}*",
)


def own_entries(folder: Path) -> list[Path]:
    """Return the files and folders that a run writes and that exist, by name; the lock is not counted."""
    named = [folder / name for name in (*_FILES, *_FOLDERS)]
    existing = [path for path in named if path.is_file() or (path.is_dir() and path.name in _FOLDERS)]
    return sorted([*existing, *(path for pattern in _PATTERNS for path in folder.glob(pattern))])


def remove_own(folder: Path) -> None:
    """Remove what a run wrote, and the report about it, if its numbers show that it is one; other files stay.

    Raises:
        OSError: if something cannot be removed.
    """
    is_ours = {"title", "arms", "tables"} <= read_object(folder / REPORT_NUMBERS).keys()
    reports = [folder / name for name in (REPORT_PAGE, REPORT_MARKDOWN, REPORT_NUMBERS) if is_ours]
    for path in [*own_entries(folder), *(path for path in reports if path.is_file())]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
