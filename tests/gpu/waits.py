"""Counts where a GPU is waited for, and tells our waits from those of the libraries below us."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_OURS = f"{Path(__file__).resolve().parents[2] / 'colm_ds'}/"
_SILENT = ("/torch/", "/contextlib.py", "/warnings.py", "/traceback.py", __file__)
"""Frames between a wait and whoever asked for it."""


@dataclass
class Waits:
    """Places of a block that waited, as `file:line function`.

    Attributes:
        ours: asked for by a line of colm_ds.
        others: asked for by a library that we call, DeepSpeed or transformers.
    """

    ours: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def note(self, stack: Sequence[traceback.FrameSummary]) -> None:
        """Count one wait.

        Args:
            stack: the frames, the outermost first.
        """
        asking = [frame for frame in stack if not any(part in frame.filename for part in _SILENT)][-1]
        where = f"{asking.filename}:{asking.lineno} {asking.name}"
        (self.ours if asking.filename.startswith(_OURS) else self.others).append(where)


@contextmanager
def counting_waits() -> Iterator[Waits]:
    """Count the synchronising calls of the block that PyTorch knows of (`torch.cuda.set_sync_debug_mode`)."""
    waits = Waits()

    def shown(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            waits.note(traceback.extract_stack())

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
