"""Baselines that choose b of all r examples by one number each, or by their hidden states (CoLM, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.selection.large_pools import pick_medoids
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector


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


class _Scored(PoolSelector):
    """Base of selectors that go by one score; as in the paper, sources play no part unless `outer_rules` says so."""

    outer_by_default = False

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        return Picks(self._places(pool.signals.float(), quota))

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return largest(scores[:, 0], count)


class BigLossSelector(_Scored):
    """BL: the examples with the largest mean token loss."""

    name = "big_loss"
    signal: str | None = "loss"


class GradientNormSelector(_Scored):
    """GN: the examples with the largest gradient of the last V projection."""

    name = "gradient_norm"
    signal: str | None = "gradient_norm"


class LeastConfidenceSelector(_Scored):
    """LC: the examples whose likeliest tokens have the smallest mean probability."""

    name = "least_confidence"
    signal: str | None = "confidence"

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return largest(-scores[:, 0], count)


class MiddlePerplexitySelector(_Scored):
    """MP: the examples around the median perplexity."""

    name = "middle_perplexity"
    signal: str | None = "loss"

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return middle(scores[:, 0], count)


class CompletionLengthSelector(_Scored):
    """CL: the examples with the most labelled tokens; nothing is probed."""

    name = "completion_length"
    can_choose_ahead = True

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        return Picks(largest(pool.batch.num_label_tokens[pool.positions].float(), quota))


class HiddenMedoidsSelector(_Scored):
    """FL: medoids of the last hidden states, of all examples together."""

    name = "hidden_medoids"
    signal: str | None = "hidden"

    def _places(self, scores: Tensor, count: int) -> Tensor:
        return pick_medoids(scores, count, self.context.settings.metric).indices
