"""`sketch`: the exact gradient seen through K numbers a_k^T G_i b_k, without ever forming it (DESIGN, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import ProbeError
from colm_ds.probe.architecture import Architecture
from colm_ds.probe.directions import sign_vectors
from colm_ds.probe.estimators import VectorRows
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.tail import TailInput
from colm_ds.selection import Exchange, Signals
from colm_ds.types import Coreset

_FLOOR = 1e-4
"""Least second moment of a row or column, relative to the mean one: a scale differs from another by 100 at most."""


def sketch_vectors(delta: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """c_ik = sum over tokens of (delta_t . a_k)(x_t . b_k) / sqrt(K), which is a_k^T G_i b_k / sqrt(K).

    Args:
        delta: `[batch, length, out]`.
        inputs: x, `[batch, length, in]`.
        rows: a, `[K, out]`.
        columns: b, `[K, in]`.

    Returns:
        float32 `[batch, K]`.
    """
    left, right = delta.float() @ rows.T, inputs.float() @ columns.T
    return (left * right).sum(dim=1) / rows.shape[0] ** 0.5


def second_moments(delta: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Means over columns and over rows of G_i^2, estimated through the same signs without forming G_i.

    For random signs b the square of (G_i b)_o has the mean sum_j G_ioj^2; the mean over K vectors is unbiased, with a
    relative standard error of at most sqrt(2 / K) per example.

    Args:
        delta: `[batch, length, out]`.
        inputs: x, `[batch, length, in]`.
        rows: a, signs `[K, out]`.
        columns: b, signs `[K, in]`.

    Returns:
        Row means `[batch, out]` and column means `[batch, in]`, float32.
    """
    delta, inputs = delta.float(), inputs.float()
    through_columns = delta.transpose(1, 2) @ (inputs @ columns.T)  # G b, [batch, out, K]
    through_rows = inputs.transpose(1, 2) @ (delta @ rows.T)  # G^T a, [batch, in, K]
    row_means = through_columns.square().mean(dim=2) / inputs.shape[2]
    column_means = through_rows.square().mean(dim=2) / delta.shape[2]
    return row_means, column_means


class FactoredHistory:
    """Row and column means of the second moment of selected gradients, factored as in Adafactor.

    Attributes:
        row: bias-uncorrected mean over columns, float32 `[out]`.
        column: bias-uncorrected mean over rows, float32 `[in]`.
        count: updates so far.
    """

    def __init__(self, out_features: int, in_features: int, beta2: float, device: torch.device) -> None:
        self.row = torch.zeros(out_features, device=device)
        self.column = torch.zeros(in_features, device=device)
        self.count = 0
        self._beta2 = beta2

    def scales(self) -> tuple[Tensor, Tensor]:
        """Inverse square roots for delta `[out]` and x `[in]`, each relative to its mean; ones before any update."""
        return _inverse_root(self.row), _inverse_root(self.column)

    def update(self, row_mean: Tensor, column_mean: Tensor) -> None:
        """Take in the means over this step's selected examples."""
        self.row.mul_(self._beta2).add_(row_mean, alpha=1.0 - self._beta2)
        self.column.mul_(self._beta2).add_(column_mean, alpha=1.0 - self._beta2)
        self.count += 1


def _inverse_root(moment: Tensor) -> Tensor:
    mean = moment.mean()
    return torch.where(mean > 0, (moment / mean.clamp_min(1e-38) + _FLOOR).rsqrt(), torch.ones_like(moment))


class SketchEstimator:
    """K numbers per example: r x K floats travel, no mask is needed, the second moment is kept as two vectors."""

    is_local = False

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        *,
        num_probes: int,
        every_step: bool,
        beta2: float,
        seed: int,
    ) -> None:
        self._architecture = architecture
        self._device = device
        self._num_probes = num_probes
        self._every_step = every_step
        self._seed = seed
        self._rows = VectorRows()
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}
        target = architecture.target
        self._history = FactoredHistory(target.out_features, target.in_features, beta2, device)
        self._signs: tuple[Tensor, Tensor] | None = None
        self._epoch: int | None = None

    def begin(self, step: int, probed: Tensor, num_local: int) -> None:
        """See `Estimator.begin`; draws the step's signs."""
        self._rows.begin(probed)
        self._moments = {}
        epoch = step if self._every_step else 0
        if epoch != self._epoch:
            target, count = self._architecture.target, self._num_probes
            rows = sign_vectors(self._seed, "rows", epoch, count, target.out_features, self._device)
            columns = sign_vectors(self._seed, "columns", epoch, count, target.in_features, self._device)
            self._epoch, self._signs = epoch, (rows, columns)

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        assert self._signs is not None
        rows, columns = self._signs
        delta, inputs = gradient_factors(self._architecture, tail)
        delta, inputs = delta[: len(positions)], inputs[: len(positions)]
        row_scale, column_scale = self._history.scales()
        self._rows.add(positions, sketch_vectors(delta, inputs, rows * row_scale, columns * column_scale))
        moments = second_moments(delta, inputs, rows, columns)
        for position, row, column in zip(positions.tolist(), *moments, strict=True):
            self._moments[position] = row, column

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`: all ranks get all sketches."""
        return self._rows.gather(batch_size, self._num_probes, self._device, exchange)

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Take the selected medoids' second moments into the history, summed over ranks."""
        medoids = coreset.positions[coreset.num_kept :].tolist()
        if medoids:
            history = self._history
            total = torch.zeros(len(history.row) + len(history.column), device=self._device)
            for position in medoids:
                if position in self._moments:
                    total += torch.cat(self._moments[position])
            total = exchange.sum(total) / len(medoids)
            history.update(total[: len(history.row)], total[len(history.row) :])
        self._moments = {}

    def state_dict(self) -> dict[str, Any]:
        """The factored history."""
        history = self._history
        return {"row": history.row, "column": history.column, "count": history.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the factored history.

        Raises:
            ProbeError: if it is of another shape.
        """
        history = self._history
        if state["row"].shape != history.row.shape or state["column"].shape != history.column.shape:
            raise ProbeError("the saved sketch history has another shape. Resume with the model and LoRA rank it had.")
        history.row.copy_(state["row"])
        history.column.copy_(state["column"])
        history.count = int(state["count"])
