"""Signals of the baselines: one number per example, or its last hidden state, from the same pass as the probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.models.architecture import Architecture
from colm_ds.models.example_loss import candidate_scores
from colm_ds.models.token_loss import sums_by_row
from colm_ds.probe.estimators import VectorRows
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.tail import TailInput, label_losses, labelled_hidden, tail_losses, top_probabilities
from colm_ds.selection import Exchange, Signals
from colm_ds.types import Coreset

SCORES = ("loss", "confidence", "gradient_norm", "hidden")


def confidences(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the mean probability of the likeliest tokens, or that of the likeliest candidate, float32 `[batch]`.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    batch = tail.batch
    if batch.groups is not None:
        return candidate_scores(label_losses(architecture, tail), batch.groups).softmax(dim=1).amax(dim=1).float()
    largest = top_probabilities(architecture, tail)
    return sums_by_row(largest, batch.rows, len(batch.counts)) / batch.counts.clamp_min(1.0)


def gradient_norms(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the norm of each example's gradient of the probed matrices, float32 `[batch]`, from its token factors.

    |sum_t delta_t x_t^T|^2 = sum_ts (delta_t . delta_s)(x_t . x_s), so no gradient is formed.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    squares = torch.zeros_like(tail.batch.counts)
    for delta, inputs in gradient_factors(architecture, tail):
        delta, inputs = delta.float(), inputs.float()
        products = (delta @ delta.transpose(1, 2)) * (inputs @ inputs.transpose(1, 2))
        squares = squares + products.sum(dim=(1, 2))
    return squares.clamp_min(0.0).sqrt()


def last_hidden(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the final hidden state, after the norm, that predicts the last token, float32 `[batch, hidden]`.

    For a classification example it is that at the end of the prompt.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    batch = tail.batch
    hidden = labelled_hidden(architecture, tail).float()
    if batch.groups is not None:
        return hidden[batch.groups.firsts]
    last = batch.counts.long().cumsum(0) - 1  # labelled positions are ordered by row
    states = hidden[last.clamp_min(0)]
    return torch.where(batch.counts[:, None] > 0, states, torch.zeros_like(states))


class ScoreEstimator:
    """One score, or one hidden state, per example; all ranks get all of them."""

    is_local = False

    def __init__(self, architecture: Architecture, device: torch.device, kind: str) -> None:
        self._architecture = architecture
        self._device = device
        self._kind = kind
        self._width = architecture.hidden_size if kind == "hidden" else 1
        self._rows = VectorRows()

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`; a score depends on its example alone, so `parts` are ignored."""
        self._rows.begin(probed)

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        scores = self._score(tail)
        self._rows.add(positions, scores.reshape(len(scores), -1)[: len(positions)])

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`."""
        return self._rows.gather(batch_size, self._width, self._device, exchange)

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Do nothing: there is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _score(self, tail: TailInput) -> Tensor:
        if self._kind == "gradient_norm":
            return gradient_norms(self._architecture, tail)
        with torch.no_grad():
            if self._kind == "loss":
                return tail_losses(self._architecture, tail).float()
            if self._kind == "confidence":
                return confidences(self._architecture, tail)
            return last_hidden(self._architecture, tail)
