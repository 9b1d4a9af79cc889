"""Training on mixtures of data sources with mini-batch coresets (CoLM, arXiv 2407.19580) over DeepSpeed.

`colm_ds.selection` needs torch only; what needs DeepSpeed is imported at first use.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "initialize": "colm_ds.engine.engine",
    "CoLMEngine": "colm_ds.engine.engine",
    "CoresetSelector": "colm_ds.engine.coreset_selector",
    "example_losses": "colm_ds.integrations.plain_loop",
}

__all__ = ["CoLMEngine", "CoresetSelector", "__version__", "example_losses", "initialize"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'colm_ds' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
