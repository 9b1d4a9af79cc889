"""Baselines that choose b of all r examples by one number each, or by their hidden states (CoLM, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.coreset import Signals
from colm_ds.selection.exchange import Exchange
from colm_ds.selection.selectors import StatelessSelector
from colm_ds.selection.transfer import to_cpu
from colm_ds.selection.two_round import pick_medoids
from colm_ds.types import NUM_NAMED, Coreset, LargeBatch


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores, ascending int64; ties to the lowest index.

    Args:
        scores: `[n]`.
        count: at most n.
    """
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def middle(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` scores around the median, ascending int64; ties to the lowest index.

    Args:
        scores: `[n]`.
        count: at most n.
    """
    order = torch.sort(scores, stable=True).indices
    first = (len(scores) - count) // 2
    return order[first : first + count].sort().values


class _Scored(StatelessSelector):
    """Base of selectors that score every example by one number; sources play no part."""

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """Select the b examples that `_places` returns among the scored ones with a finite number."""
        scores, finite = self._scores(batch, signals)
        looked_at = finite if signals is None or signals.unprobed is None else finite & ~signals.unprobed.cpu()
        usable = looked_at.nonzero().flatten()
        places = self._places(scores[usable], min(self.context.size, len(usable)))
        return Coreset(
            positions=usable[places],
            weights=torch.ones(len(places)),
            num_nonfinite=int((~finite).sum()),
            nonfinite=tuple((~finite).nonzero().flatten()[:NUM_NAMED].tolist()),
        )

    def _scores(self, batch: LargeBatch, signals: Signals | None) -> tuple[Tensor, Tensor]:
        """Return a row per example of the large batch, and whether it is finite, bool `[r]`; both on the CPU."""
        if signals is None or signals.vectors is None:
            raise SelectionError(f"selector {type(self).__name__} was given no signals. Run the probe first.")
        scores = torch.zeros(batch.size, signals.vectors.shape[1])
        vectors, finite = to_cpu([signals.vectors.float(), signals.finite])
        scores[signals.positions] = vectors
        return scores, finite

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return largest(scores[:, 0], count)


class BigLossSelector(_Scored):
    """BL: the examples with the largest mean token loss."""

    signal: str | None = "loss"


class GradientNormSelector(_Scored):
    """GN: the examples with the largest gradient of the last V projection."""

    signal: str | None = "gradient_norm"


class LeastConfidenceSelector(_Scored):
    """LC: the examples whose likeliest tokens have the smallest mean probability."""

    signal: str | None = "confidence"

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return largest(-scores[:, 0], count)


class MiddlePerplexitySelector(_Scored):
    """MP: the examples around the median perplexity."""

    signal: str | None = "loss"

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return middle(scores[:, 0], count)


class CompletionLengthSelector(_Scored):
    """CL: the examples with the most labelled tokens; nothing is probed."""

    can_choose_ahead = True

    def _scores(self, batch: LargeBatch, signals: Signals | None) -> tuple[Tensor, Tensor]:
        return batch.num_label_tokens.float()[:, None], torch.ones(batch.size, dtype=torch.bool)


class HiddenMedoidsSelector(_Scored):
    """FL: medoids of the last hidden states, of all examples together."""

    signal: str | None = "hidden"

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return pick_medoids(scores, count, self.context.settings.metric).indices
