"""Describe a step's coreset for metrics.jsonl and logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.types import Coreset, LargeBatch


def describe_coreset(
    batch: LargeBatch,
    coreset: Coreset,
    source_names: Sequence[str],
    *,
    losses: Tensor | None = None,
    broken: Sequence[int] = (),
    variance: Mapping[str, float] | None = None,
    stored: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return a coreset's counts, losses, lengths and coherence.

    Args:
        batch: the large batch.
        coreset: what was chosen of it.
        source_names: by source id.
        losses: mean token loss of every example that was trained on, by position, float64 `[r]`; None: not known yet.
        broken: positions left out as their loss was not finite.
        variance: of `GradientVariance`, in the steps that measure it.
        stored: see `Selection.stored`.

    Returns:
        `kept_small`, `dropped_small`, `nonfinite` (examples whose signal or loss was not) and `nonfinite_examples`
        (index in the dataset, source, what); by source name `seen` (examples of the large batch), `per_source` (of the
        coreset), `loss` (mean over its examples, unweighted; sources without any left out; only if `losses` are
        given) and `coherence`;
        `label_tokens` (mean of an example, in the coreset and in the large batch); `gradient_variance`, if measured:
        `coreset`, `random`, `kappa`, `worth`; `stored_signal`, of choices by stored sketches: `share`, `age`,
        `cosine` (of the sketches that the step replaced with its own).
    """
    names = [*source_names, "joint"]  # the joint pool has source id -1
    lengths = batch.num_label_tokens.double()
    described: dict[str, Any] = {
        "kept_small": coreset.num_kept,
        "dropped_small": coreset.num_dropped_small,
        "nonfinite": coreset.num_nonfinite + len(broken),
        "nonfinite_examples": [
            {"index": int(batch.indices[p]), "source": source_names[int(batch.sources[p])], "what": what}
            for what, positions in (("signal", coreset.nonfinite), ("loss", broken))
            for p in positions
        ],
        "seen": _counts(batch.sources, source_names),
        "per_source": _counts(batch.sources[coreset.positions], source_names),
        "label_tokens": {
            "coreset": float(lengths[coreset.positions].mean()),
            "large_batch": float(lengths.mean()),
        },
        "coherence": {names[source]: value for source, value in coreset.coherence.items()},
    }
    if losses is not None:
        described["loss"] = _mean_losses(batch, coreset, source_names, losses, broken)
    if variance is not None:
        described["gradient_variance"] = dict(variance)
    if stored is not None:
        described["stored_signal"] = dict(stored)
    return described


def _mean_losses(
    batch: LargeBatch, coreset: Coreset, source_names: Sequence[str], losses: Tensor, broken: Sequence[int]
) -> dict[str, float]:
    trained = torch.tensor([p for p in coreset.positions.tolist() if p not in broken], dtype=torch.int64)
    sums = torch.zeros(len(source_names), dtype=torch.float64).index_add(0, batch.sources[trained], losses[trained])
    counts = _counts(batch.sources[trained], source_names)
    return {name: total / counts[name] for name, total in zip(source_names, sums.tolist(), strict=True) if counts[name]}


def _counts(sources: Tensor, source_names: Sequence[str]) -> dict[str, int]:
    counts = torch.bincount(sources, minlength=len(source_names)).tolist()
    return dict(zip(source_names, counts, strict=True))
