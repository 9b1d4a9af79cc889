"""Which files and folders in an output folder are a run's own: nothing else there is ever removed."""

from __future__ import annotations

import shutil
from pathlib import Path

LOCK = "run.lock"

EVALUATION_ERROR = "evaluation_error.txt"
"""The traceback of a final evaluation that failed."""

_FILES = ("config.json", "metrics.jsonl", "summary.json", "config.tmp", "metrics.tmp", "summary.tmp", EVALUATION_ERROR)
_FOLDERS = ("checkpoints", "model", "adapter", "best_model", "monitor", "evaluation")
_PATTERNS = ("memory_*_rank*.pickle",)


def own_entries(folder: Path) -> list[Path]:
    """Return what a run writes and is there, by name; the lock is not counted."""
    named = [folder / name for name in (*_FILES, *_FOLDERS)]
    found = [path for path in named if path.is_file() or (path.is_dir() and path.name in _FOLDERS)]
    return sorted([*found, *(path for pattern in _PATTERNS for path in folder.glob(pattern))])


def remove_own(folder: Path) -> None:
    """Remove what a run wrote; other files stay where they are.

    Raises:
        OSError: if something can not be removed.
    """
    for path in own_entries(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
