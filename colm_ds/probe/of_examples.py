"""Signals of examples by one pass of a model outside training, by the estimators and scores of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from colm_ds.batching.assign import micro_batches
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.config.colm import ProbeConfig
from colm_ds.models.architecture import find_architecture
from colm_ds.models.patch import eval_mode
from colm_ds.probe.registry import make_estimator
from colm_ds.probe.self_check import check_architecture
from colm_ds.probe.tail import run_trunk
from colm_ds.process.progress import Progress
from colm_ds.selection import SINGLE_PROCESS, Signals


def signals_of_examples(
    model: nn.Module,
    examples: Any,
    lengths: Sequence[int] | Tensor | np.ndarray,
    probe: ProbeConfig,
    signal: str,
    also: Sequence[str] = (),
    *,
    seed: int = 0,
    progress: bool = False,
) -> Signals:
    """Return the signals of examples, by the estimator or the scores of training.

    Args:
        model: the model on its device, bare or in a `PeftModel`.
        examples: N examples by their place, such as a list or a dataset.
        lengths: tokens of each, `[N]`.
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
    size = len(lengths)
    plan = micro_batches(
        [list(range(size))],
        torch.from_numpy(np.asarray(lengths).astype(np.int64)),
        equal_counts=False,
        max_tokens=probe.resolved_max_tokens(device.type),
    )[0]
    estimator.begin(1, torch.arange(size), size)
    with eval_mode(model), torch.no_grad(), Progress("scoring", size, "examples", shown=progress) as bar:
        for positions in plan:
            micro = make_micro_batch([examples[position] for position in positions]).to(device)
            tail = run_trunk(model, architecture, micro)
            estimator.observe(tail, torch.tensor(positions, dtype=torch.int64), micro.example_lengths)
            bar.advance(len(positions))
    signals = estimator.signals(size, SINGLE_PROCESS)
    assert signals.vectors is not None
    return Signals(signals.positions, signals.finite.cpu(), vectors=signals.vectors.cpu(), widths=signals.widths)
