"""Signals of every example of a dataset by one pass of a model, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from colm_ds.config.colm import ProbeConfig
from colm_ds.data.token_cache import cache_key, load_arrays, store_arrays
from colm_ds.probe.of_examples import signals_of_examples
from colm_ds.selection import Signals
from colm_ds.types import SourcedDataset

FORMAT_VERSION = 1
"""Part of every key; raise it when signals change."""


def cached_signals(
    model: nn.Module,
    data: SourcedDataset,
    digest: str,
    probe: ProbeConfig,
    signal: str,
    also: Sequence[str] = (),
    *,
    folder: Path | None,
    seed: int = 0,
    progress: bool = False,
) -> Signals:
    """Return the signals of all examples, from a folder if they were computed before, else computed and put there.

    Args:
        model: see `signals_of_examples`.
        data: the examples.
        digest: digest of the examples.
        probe: see `signals_of_examples`.
        signal: see `signals_of_examples`.
        also: see `signals_of_examples`.
        folder: folder of the cache; None: no cache.
        seed: see `signals_of_examples`.
        progress: see `signals_of_examples`.
    """
    if folder is None:
        return signals_of_examples(model, data, data.lengths, probe, signal, also, seed=seed, progress=progress)
    key = cache_key(
        {
            "version": FORMAT_VERSION,
            "data": digest,
            "model": digest_of_weights(model),
            "signal": [signal, *also],
            "probe": probe.model_dump(mode="json") if signal == "gradient" else probe.layer,
            "seed": seed if signal == "gradient" else 0,
        }
    )
    known = load_arrays(folder, key, {"vectors": "float32"}, lambda arrays, facts: _fits(arrays, facts, len(data)))
    if known is not None:
        vectors = torch.from_numpy(np.array(known[0]["vectors"])).reshape(len(data), -1)
        return Signals(
            torch.arange(len(data)), torch.isfinite(vectors).all(dim=1), vectors=vectors, widths=known[1]["widths"]
        )
    signals = signals_of_examples(model, data, data.lengths, probe, signal, also, seed=seed, progress=progress)
    assert signals.vectors is not None
    arrays = {"vectors": signals.vectors.numpy().reshape(-1)}
    facts = {"width": signals.vectors.shape[1], "widths": dict(signals.widths)}
    store_arrays(folder, key, arrays, facts, lambda kept, about: _fits(kept, about, len(data)))
    return signals


def digest_of_weights(model: nn.Module) -> str:
    """Return a digest of the values of all parameters by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(_bytes_of(parameter.detach()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _fits(arrays: dict[str, np.ndarray], facts: dict[str, Any], num_examples: int) -> bool:
    return len(arrays["vectors"]) == num_examples * int(facts["width"])
