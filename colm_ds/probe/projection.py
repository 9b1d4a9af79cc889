"""`projection`: exact gradients, Adam-normalised entry by entry, projected on K random directions (CoLM, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.models.architecture import Architecture
from colm_ds.probe.directions import Directions
from colm_ds.probe.estimators import VectorRows
from colm_ds.probe.exact import ExactEstimator
from colm_ds.probe.tail import TailInput
from colm_ds.selection import AdamHistory, DenseGradients, Exchange, Signals
from colm_ds.selection.transfer import to_device
from colm_ds.types import Coreset

_WIDTH = 1 << 14
"""Coordinates projected at a time."""


def project(gradients: DenseGradients, directions: Directions, history: AdamHistory | None) -> Tensor:
    """Compute z_k . u_i / sqrt(K) for u_i = g_i, Adam-normalised if there is a history; float32 `[n, K]`.

    Distances between projections are those between the u_i up to a relative error of about 1 / sqrt(K).

    Args:
        gradients: `[n, d]`.
        directions: z, standard normal.
        history: history of the selected examples' gradients.
    """
    rows = torch.arange(len(gradients.matrix), device=gradients.matrix.device)
    vectors = torch.zeros(len(rows), directions.num_probes, device=gradients.matrix.device)
    for start in range(0, gradients.num_coordinates if len(rows) else 0, _WIDTH):
        stop = min(start + _WIDTH, gradients.num_coordinates)
        chunk = gradients.chunk(rows, start, stop)
        chunk = history.normalise(chunk, slice(start, stop)) if history else chunk
        vectors.addmm_(chunk, directions.chunk(start, stop).T)
    return vectors / directions.num_probes**0.5


class ProjectionEstimator:
    """K numbers per example are exchanged; every rank keeps its examples' gradients until the choice is made."""

    is_local = False

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        *,
        num_probes: int,
        every_step: bool,
        seed: int,
        history: AdamHistory | None,
    ) -> None:
        self._exact = ExactEstimator(architecture, device)
        self._architecture = architecture
        self._device = device
        self._num_probes = num_probes
        self._every_step = every_step
        self._seed = seed
        self._history = history
        self._rows = VectorRows()
        self._epoch = 0

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`."""
        self._exact.begin(step, probed, num_local, parts)
        self._rows.begin(probed)
        self._epoch = step if self._every_step else 0

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        self._exact.observe(tail, positions, lengths)

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`: all ranks get all projections."""
        matrix, positions = self._exact.local_gradients()
        size = self._architecture.num_coordinates
        directions = Directions(self._seed, self._epoch, self._num_probes, size, self._device)
        self._rows.add(positions, project(DenseGradients(matrix), directions, self._history))
        return self._rows.gather(batch_size, self._num_probes, self._device, exchange)

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Add the selected medoids' gradients to the history, summed over ranks."""
        medoids = coreset.positions[coreset.num_kept :]
        if self._history is not None:
            matrix, positions = self._exact.local_gradients()
            rows = to_device(torch.isin(positions, medoids).nonzero().flatten(), matrix.device)
            self._history.update(DenseGradients(matrix), rows, len(medoids), exchange)
        self._exact.update(coreset, exchange)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return self._history.state_dict() if self._history else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history."""
        if self._history is not None:
            self._history.load_state_dict(state)
