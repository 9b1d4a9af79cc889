"""The `"colm"` section and the DeepSpeed configuration around it; imported at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colm_ds.config.colm import CoLMSection
    from colm_ds.config.colm import CoLMSection as ColmConfig
    from colm_ds.config.resolve import ResolvedConfig, load_config, resolve_config

__all__ = ["CoLMSection", "ColmConfig", "ResolvedConfig", "load_config", "resolve_config"]

_PLACES = {
    "CoLMSection": ("colm_ds.config.colm", "CoLMSection"),
    "ColmConfig": ("colm_ds.config.colm", "CoLMSection"),  # the name of version 0.1.0
    "ResolvedConfig": ("colm_ds.config.resolve", "ResolvedConfig"),
    "load_config": ("colm_ds.config.resolve", "load_config"),
    "resolve_config": ("colm_ds.config.resolve", "resolve_config"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
