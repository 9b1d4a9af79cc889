"""Training data with sources: reading, prompts, tokens, clusters and held-out parts; imported at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colm_ds.batching.collate import length_sorted_batches, pad_batch, padding_fraction
    from colm_ds.batching.mixture import MixtureSampler
    from colm_ds.data.entries import DataEntry
    from colm_ds.data.examples import load_examples
    from colm_ds.data.formats import find_files, read_records
    from colm_ds.data.holdout import split_holdout
    from colm_ds.data.prompt import encode_example, encode_examples, encode_prompt, format_prompt
    from colm_ds.data.token_dataset import TokenDataset

__all__ = [
    "DataEntry",
    "MixtureSampler",
    "TokenDataset",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "find_files",
    "format_prompt",
    "length_sorted_batches",
    "load_examples",
    "pad_batch",
    "padding_fraction",
    "read_records",
    "split_holdout",
]

_PLACES = {
    "colm_ds.batching.collate": ("length_sorted_batches", "pad_batch", "padding_fraction"),
    "colm_ds.batching.mixture": ("MixtureSampler",),
    "colm_ds.data.entries": ("DataEntry",),
    "colm_ds.data.examples": ("load_examples",),
    "colm_ds.data.formats": ("find_files", "read_records"),
    "colm_ds.data.holdout": ("split_holdout",),
    "colm_ds.data.prompt": ("encode_example", "encode_examples", "encode_prompt", "format_prompt"),
    "colm_ds.data.token_dataset": ("TokenDataset",),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
