"""What a step's coreset is, as it goes into `metrics.jsonl`."""

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
    losses: Tensor,
    broken: Sequence[int] = (),
    variance: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Counts, losses, lengths and coherence.

    Args:
        batch: the large batch.
        coreset: what was chosen of it.
        source_names: by source id.
        losses: mean token loss of every example that was trained on, by position, float64 `[r]`.
        broken: positions left out as their loss was not finite.
        variance: of `GradientVariance`, in the steps that measure it.

    Returns:
        `kept_small`, `dropped_small`, `nonfinite` (examples whose signal or loss was not) and `nonfinite_examples`
        (index in the dataset, source, what); by source name `seen` (examples of the large batch), `per_source` (of the
        coreset), `loss` (mean over its examples, unweighted; sources without any left out) and `coherence`;
        `label_tokens` (mean of an example, in the coreset and in the large batch); `gradient_variance`, if measured:
        `coreset`, `random`, `kappa`, `worth`.
    """
    names = [*source_names, "joint"]  # the joint pool has source id -1
    trained = torch.tensor([p for p in coreset.positions.tolist() if p not in broken], dtype=torch.int64)
    seen, counts = (_counts(batch.sources[index], source_names) for index in (slice(None), coreset.positions))
    sums = torch.zeros(len(source_names), dtype=torch.float64).index_add(0, batch.sources[trained], losses[trained])
    num_trained = _counts(batch.sources[trained], source_names)
    lengths = batch.num_label_tokens.double()
    found = {
        "kept_small": coreset.num_kept,
        "dropped_small": coreset.num_dropped_small,
        "nonfinite": coreset.num_nonfinite + len(broken),
        "nonfinite_examples": [
            {"index": int(batch.indices[p]), "source": source_names[int(batch.sources[p])], "what": what}
            for what, positions in (("signal", coreset.nonfinite), ("loss", broken))
            for p in positions
        ],
        "seen": seen,
        "per_source": counts,
        "loss": {
            name: total / num_trained[name]
            for name, total in zip(source_names, sums.tolist(), strict=True)
            if num_trained[name]
        },
        "label_tokens": {
            "coreset": float(lengths[coreset.positions].mean()),
            "large_batch": float(lengths.mean()),
        },
        "coherence": {names[source]: value for source, value in coreset.coherence.items()},
    }
    return found if variance is None else found | {"gradient_variance": dict(variance)}


def _counts(sources: Tensor, source_names: Sequence[str]) -> dict[str, int]:
    counts = torch.bincount(sources, minlength=len(source_names)).tolist()
    return dict(zip(source_names, counts, strict=True))
