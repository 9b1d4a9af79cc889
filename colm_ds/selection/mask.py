"""The sparse mask: the h coordinates of the signal in which examples are compared (CoLM, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.transfer import to_device

CRITERIA = ("grad", "weight", "weight_grad", "random")


def top_coordinates(score: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores, ascending; ties go to the lowest index.

    Args:
        score: `[d]`.
        count: h; all coordinates if it is d or more.

    Returns:
        int64 `[min(count, d)]`.
    """
    if count >= len(score):
        return torch.arange(len(score), device=score.device)
    if score.device.type != "cpu":
        return _top_by_sorting(score, count)
    threshold = score.topk(count, sorted=False).values.min()
    above = (score > threshold).nonzero().flatten()
    level = (score == threshold).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, level]).sort().values


def _top_by_sorting(score: Tensor, count: int) -> Tensor:
    """Do the same as `top_coordinates` without synchronising: a GPU sorts fast, and ties need no count."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def mask_coordinates(
    criterion: str,
    count: int,
    *,
    mean: Tensor,
    parameters: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the coordinates of one pool's mask.

    Args:
        criterion: `grad` (largest |mean u|, the paper's), `weight` (largest |parameter|), `weight_grad` (largest
            |parameter * mean u|) or `random`.
        count: h.
        mean: mean Adam-normalised gradient of the pool, `[d]`.
        parameters: value of every probed parameter, `[d]`; for the weight criteria.
        generator: private CPU generator; for `random`.

    Returns:
        Ascending int64 `[min(count, d)]`.

    Raises:
        SelectionError: if the criterion is unknown or lacks what it needs.
    """
    if criterion == "grad":
        return top_coordinates(mean.abs(), count)
    if criterion == "random":
        chosen = torch.randperm(len(mean), generator=generator)[:count]
        return to_device(chosen.sort().values, mean.device)
    if criterion not in CRITERIA:
        raise SelectionError(f"mask criterion {criterion!r} is unknown. Choose one of {', '.join(CRITERIA)}.")
    if parameters is None:
        raise SelectionError(f"mask criterion {criterion!r} needs the probed parameters. Use 'grad' without them.")
    score = parameters.abs() if criterion == "weight" else (parameters * mean).abs()
    return top_coordinates(score, count)
