"""Scores: numbers of an example, or its last hidden state, from the same pass as the probe; several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from colm_ds.models.architecture import Architecture
from colm_ds.models.example_loss import candidate_scores
from colm_ds.models.token_loss import sums_by_row
from colm_ds.probe.estimators import VectorRows
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.tail import LabelFunction, TailInput, from_logits, label_losses, labelled_hidden, tail_losses
from colm_ds.selection import Exchange, Signals
from colm_ds.types import Coreset

SCORES = ("loss", "confidence", "gradient_norm", "hidden", "margin", "el2n")


def confidences(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the mean probability of the likeliest tokens, or that of the likeliest candidate, float32 `[batch]`.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """
    batch = tail.batch
    if batch.groups is not None:
        return candidate_scores(label_losses(architecture, tail), batch.groups).softmax(dim=1).amax(dim=1).float()
    largest = from_logits(architecture, tail, lambda logits, targets: logits.float().softmax(dim=-1).amax(dim=-1))
    return sums_by_row(largest, batch.rows, len(batch.counts)) / batch.counts.clamp_min(1.0)


def margins(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the mean over labelled tokens of p(token) less the largest other p, float32 `[batch]`, from -1 to 1.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """

    def margin(logits: Tensor, targets: Tensor) -> Tensor:
        probability = logits.float().softmax(dim=-1)
        own = probability.gather(1, targets[:, None])
        other = probability.scatter(1, targets[:, None], 0.0).amax(dim=-1)
        return own[:, 0] - other

    return _mean_of_labels(architecture, tail, margin)


def el2n(architecture: Architecture, tail: TailInput) -> Tensor:
    """Return the mean over labelled tokens of the norm of one-hot label less probabilities, float32 `[batch]`.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
    """

    def error(logits: Tensor, targets: Tensor) -> Tensor:
        probability = logits.float().softmax(dim=-1)
        own = probability.gather(1, targets[:, None])[:, 0]
        return (1.0 - 2.0 * own + probability.square().sum(dim=-1)).clamp_min(0.0).sqrt()

    return _mean_of_labels(architecture, tail, error)


def _mean_of_labels(architecture: Architecture, tail: TailInput, function: LabelFunction) -> Tensor:
    """Return the mean over labels of a function of their logits; of a classification example, over its candidates'."""
    batch = tail.batch
    if batch.groups is not None:
        scores = candidate_scores(label_losses(architecture, tail), batch.groups)
        return function(scores, batch.groups.golds).float()
    values = from_logits(architecture, tail, function)
    return sums_by_row(values, batch.rows, len(batch.counts)) / batch.counts.clamp_min(1.0)


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
    """One or several scores, or hidden states, per example; all ranks get all of them."""

    is_local = False

    def __init__(self, architecture: Architecture, device: torch.device, *kinds: str) -> None:
        """Score by `kinds`, one or more of `SCORES`, in columns side by side."""
        self._architecture = architecture
        self._device = device
        self._widths = {kind: architecture.hidden_size if kind == "hidden" else 1 for kind in kinds}
        self._rows = VectorRows()

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`; a score depends on its example alone, so `parts` are ignored."""
        self._rows.begin(probed)

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        columns = [self._score(kind, tail) for kind in self._widths]
        scores = torch.cat([column.reshape(len(column), -1).float() for column in columns], dim=1)
        self._rows.add(positions, scores[: len(positions)])

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`."""
        signals = self._rows.gather(batch_size, sum(self._widths.values()), self._device, exchange)
        return replace(signals, widths=self._widths)

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Do nothing: there is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _score(self, kind: str, tail: TailInput) -> Tensor:
        if kind == "gradient_norm":
            return gradient_norms(self._architecture, tail)
        with torch.no_grad():
            return _WITHOUT_GRADIENT[kind](self._architecture, tail)


_WITHOUT_GRADIENT: dict[str, Callable[[Architecture, TailInput], Tensor]] = {
    "loss": lambda architecture, tail: tail_losses(architecture, tail).float(),
    "confidence": confidences,
    "hidden": last_hidden,
    "margin": margins,
    "el2n": el2n,
}
