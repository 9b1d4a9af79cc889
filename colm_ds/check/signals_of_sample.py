"""Compute the signals of estimators from a sample's tokens and exact gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.config.colm import ProbeConfig
from colm_ds.probe.directions import Directions, LowRankDirections, sign_vectors
from colm_ds.probe.projection import project
from colm_ds.selection import DenseGradients, LowRankGradients, Signals


@dataclass(frozen=True)
class SampleFacts:
    """Facts of the N examples of a sample.

    Attributes:
        sources: source of each, int64 `[N]`.
        lengths: tokens of each, int64 `[N]`.
        num_label_tokens: labelled tokens of each, int64 `[N]`.
        indices: index of each in the dataset, int64 `[N]`.
        parts: labelled tokens, by which signals are multiplied in a mean over tokens, float32 `[N]`; None: 1.
        features: features of the estimator `tokens` with `length_power: 0`, float32 `[N, K]`, on the CPU; None if
            tokens have no vectors.
        exact: gradients of the probed matrices, concatenated, float32 `[N, d]`, on the CPU; None if the model's
            family is unknown or they are too large.
        shapes: output and input features of each of these matrices.
        learning_rate: of the run's optimizer, for selectors that weigh a step with it.
    """

    sources: Tensor
    lengths: Tensor
    num_label_tokens: Tensor
    indices: Tensor
    parts: Tensor | None
    features: Tensor | None
    exact: Tensor | None
    shapes: tuple[tuple[int, int], ...] = ()
    learning_rate: float | None = None

    def can(self, estimator: str) -> bool:
        """Return whether the signals of an estimator can be computed."""
        return (self.features if estimator == "tokens" else self.exact) is not None

    def signals(self, probe: ProbeConfig, examples: Tensor, step: int, seed: int) -> Signals:
        """Return the signals of a large batch, as a training step with `geometry: plain` would compute them.

        `spsa` is the exact gradient along its directions: its two-sided difference without the error.

        Args:
            probe: the estimator and its settings.
            examples: examples of the batch, int64 `[r]`.
            step: 1-based step, seeds directions and signs.
            seed: seed of the run.
        """
        r = len(examples)
        positions, finite = torch.arange(r), torch.ones(r, dtype=torch.bool)
        parts = None if self.parts is None else self.parts[examples]
        if probe.estimator == "tokens":
            assert self.features is not None
            scale = self.num_label_tokens[examples].float() ** -probe.length_power
            return Signals(
                positions, finite, vectors=_times(self.features[examples] * scale[:, None], parts), parts=parts
            )
        assert self.exact is not None
        rows = _times(self.exact[examples], parts)
        if probe.estimator == "exact":
            return Signals(positions, finite, gradients=DenseGradients(rows), parts=parts)
        count, epoch = probe.resolved_num_probes, step if probe.refresh == "step" else 0
        if probe.estimator == "sketch":
            return Signals(positions, finite, vectors=_sketched(rows, self.shapes, count, epoch, seed), parts=parts)
        if probe.estimator == "projection":
            directions = Directions(seed, epoch, count, rows.shape[1])
            return Signals(positions, finite, vectors=project(DenseGradients(rows), directions, None), parts=parts)
        along = _directions(probe, self.shapes, count, epoch, seed)
        coefficients = torch.stack([rows @ along.direction(number) for number in range(count)], dim=1)
        gradients = LowRankGradients(coefficients, along)
        return Signals(positions, finite, gradients=gradients, vectors=coefficients, parts=parts)


def _times(rows: Tensor, parts: Tensor | None) -> Tensor:
    return rows if parts is None else rows * parts[:, None]


def _directions(
    probe: ProbeConfig, shapes: Sequence[tuple[int, int]], count: int, epoch: int, seed: int
) -> Directions | LowRankDirections:
    """Return the directions that `spsa` takes in a step."""
    if probe.direction_rank == "full":
        return Directions(seed, epoch, count, sum(rows * columns for rows, columns in shapes))
    return LowRankDirections(seed, epoch, count, list(shapes), probe.direction_rank, "cpu")


def _sketched(rows: Tensor, shapes: Sequence[tuple[int, int]], count: int, epoch: int, seed: int) -> Tensor:
    """Return a_k^T G b_k / sqrt(K) summed over the matrices, through the estimator's own signs; float32 `[n, K]`."""
    total = torch.zeros(len(rows), count)
    sizes = [out_features * in_features for out_features, in_features in shapes]
    for place, (part, (out_features, in_features)) in enumerate(zip(rows.split(sizes, dim=1), shapes, strict=True)):
        suffix = str(place) if place else ""
        left = sign_vectors(seed, f"rows{suffix}", epoch, count, out_features, part.device)
        right = sign_vectors(seed, f"columns{suffix}", epoch, count, in_features, part.device)
        through = part.reshape(-1, out_features, in_features) @ right.T  # G b, [n, out, K]
        total += (through * left.T).sum(dim=1)
    return total / count**0.5
