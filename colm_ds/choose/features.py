"""Signals of every example of a dataset by one pass of a model, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from colm_ds.batching.assign import micro_batches
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.config.colm import ProbeConfig
from colm_ds.data.token_cache import cache_key, load_arrays, store_arrays
from colm_ds.models.architecture import find_architecture
from colm_ds.models.patch import eval_mode
from colm_ds.probe.registry import make_estimator
from colm_ds.probe.self_check import check_architecture
from colm_ds.probe.tail import run_trunk
from colm_ds.process.progress import Progress
from colm_ds.selection import SINGLE_PROCESS, Signals
from colm_ds.types import SourcedDataset

FORMAT_VERSION = 1
"""Part of every key; raise it when signals change."""


def signals_of_dataset(
    model: nn.Module,
    data: SourcedDataset,
    probe: ProbeConfig,
    signal: str,
    also: Sequence[str] = (),
    *,
    seed: int = 0,
    progress: bool = False,
) -> Signals:
    """Return the signals of all examples, by the estimator or the scores of training.

    Args:
        model: the model on its device, bare or in a `PeftModel`.
        data: the examples.
        probe: the `"probe"` section.
        signal: "gradient", or a score.
        also: further scores of the same pass.
        seed: seeds the signs of a sketch.
        progress: whether to show a progress bar.

    Returns:
        Signals with float32 `vectors` `[N, K]`, on the CPU.

    Raises:
        ProbeError: if the model has no such signal.
    """
    device = next(model.parameters()).device
    architecture = find_architecture(model, probe.layer)
    check_architecture(model, architecture, None)
    estimator = make_estimator(
        probe, architecture, device, seed=seed, betas=(0.9, 0.999), eps=1e-8, adam=False, signal=signal, also=also
    )
    size = len(data)
    plan = micro_batches(
        [list(range(size))],
        torch.from_numpy(np.asarray(data.lengths).astype(np.int64)),
        equal_counts=False,
        max_tokens=probe.resolved_max_tokens(device.type),
    )[0]
    estimator.begin(1, torch.arange(size), size)
    with eval_mode(model), torch.no_grad(), Progress("scoring", size, "examples", shown=progress) as bar:
        for positions in plan:
            micro = make_micro_batch([data[position] for position in positions]).to(device)
            tail = run_trunk(model, architecture, micro)
            estimator.observe(tail, torch.tensor(positions, dtype=torch.int64), micro.example_lengths)
            bar.advance(len(positions))
    signals = estimator.signals(size, SINGLE_PROCESS)
    assert signals.vectors is not None
    return Signals(signals.positions, signals.finite.cpu(), vectors=signals.vectors.cpu(), widths=signals.widths)


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
        model: see `signals_of_dataset`.
        data: the examples.
        digest: digest of the examples.
        probe: see `signals_of_dataset`.
        signal: see `signals_of_dataset`.
        also: see `signals_of_dataset`.
        folder: folder of the cache; None: no cache.
        seed: see `signals_of_dataset`.
        progress: see `signals_of_dataset`.
    """
    if folder is None:
        return signals_of_dataset(model, data, probe, signal, also, seed=seed, progress=progress)
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
    signals = signals_of_dataset(model, data, probe, signal, also, seed=seed, progress=progress)
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
