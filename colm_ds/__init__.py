"""Training on mixtures of data sources with mini-batch coresets (CoLM, arXiv 2407.19580) over DeepSpeed.

`colm_ds.selection` needs torch only; what needs DeepSpeed is imported at first use.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

_LAZY = {
    "initialize": "colm_ds.engine",
    "CoLMEngine": "colm_ds.engine",
    "CoresetSelector": "colm_ds.engine",
    "example_losses": "colm_ds.integrations.plain_loop",
}

__all__ = ["CoLMEngine", "CoresetSelector", "__version__", "example_losses", "initialize"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'colm_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


_MOVED = {
    "colm_ds.checkpoint": "colm_ds.checkpoints.atomic",
    "colm_ds.coreset_selector": "colm_ds.engine.coreset_selector",
    "colm_ds.families": "colm_ds.models.families",
    "colm_ds.recipe": "colm_ds.recipes.recipe",
    "colm_ds.seeds": "colm_ds.randomness",
    "colm_ds.training_loss": "colm_ds.models.example_loss",
}
"""Modules of version 0.1.0 that scripts may import, and where they are now; the old names go with 0.3."""


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name, with a `DeprecationWarning`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        moved = _MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {moved}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(moved)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # which the import replaced


sys.meta_path.append(_MovedModules())


def _tells_something(record: logging.LogRecord) -> bool:
    """Return whether a message of DeepSpeed's is not the one that a machine without a GPU has none.

    transformers imports DeepSpeed wherever it is installed, so that every loop would begin with it.
    """
    return not str(record.msg).startswith("Setting accelerator to CPU.")


logging.getLogger("DeepSpeed").addFilter(_tells_something)
