"""`sketch`: the exact gradient reduced to K numbers a_k^T G_i b_k, without ever forming it (docs/HOW.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import ProbeError
from colm_ds.models.architecture import Architecture
from colm_ds.probe.directions import sign_vectors
from colm_ds.probe.estimators import VectorRows, multiply_by_parts
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.tail import TailInput
from colm_ds.selection import Exchange, Signals
from colm_ds.selection.transfer import to_device
from colm_ds.types import Coreset

_FLOOR = 1e-4
"""Minimum second moment of a row or column, relative to the mean one: scales differ by a factor of at most 100."""


def sketch_vectors(delta: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute c_ik = sum over tokens of (delta_t . a_k)(x_t . b_k) / sqrt(K) = a_k^T G_i b_k / sqrt(K).

    Args:
        delta: `[batch, length, out]`.
        inputs: x, `[batch, length, in]`.
        rows: a, `[K, out]`.
        columns: b, `[K, in]`.

    Returns:
        float32 `[batch, K]`.
    """
    return token_products(delta, inputs, rows, columns).sum(dim=1) / rows.shape[0] ** 0.5


def token_products(delta: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute (delta_t . a_k)(x_t . b_k) of every token, float32 `[batch, length, K]`; see `sketch_vectors`."""
    return (delta.float() @ rows.T) * (inputs.float() @ columns.T)


def draw_signs(
    architecture: Architecture, num_probes: int, seed: int, epoch: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Draw signs a `[K, out]` and b `[K, in]` of every probed matrix, its own for each.

    Args:
        architecture: parts of the model.
        num_probes: K.
        seed: seed of the run.
        epoch: the step for `refresh: step`, 0 for `refresh: run`.
        device: where to put them.
    """
    drawn = []
    for place, target in enumerate(architecture.targets):
        suffix = str(place) if place else ""
        rows = sign_vectors(seed, f"rows{suffix}", epoch, num_probes, target.out_features, device)
        columns = sign_vectors(seed, f"columns{suffix}", epoch, num_probes, target.in_features, device)
        drawn.append((rows, columns))
    return drawn


def second_moments(delta: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate means over columns and over rows of G_i^2 by the same signs, without forming G_i.

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
        """Return inverse roots for delta `[out]` and x `[in]`, relative to their means; ones before any update."""
        return _inverse_root(self.row), _inverse_root(self.column)

    def size(self) -> Tensor:
        """Return 1 / sqrt of the mean corrected second moment, by which scales become absolute; 1 before any update."""
        corrected = 1.0 - self._beta2 ** max(1, self.count)
        mean = (self.row.mean() * self.column.mean()).sqrt() / corrected  # two estimates of one number
        return torch.where(mean > 0, mean.clamp_min(1e-38).rsqrt(), torch.ones_like(mean))

    def update(self, row_mean: Tensor, column_mean: Tensor) -> None:
        """Update with the means over this step's selected examples."""
        self.row.mul_(self._beta2).add_(row_mean, alpha=1.0 - self._beta2)
        self.column.mul_(self._beta2).add_(column_mean, alpha=1.0 - self._beta2)
        self.count += 1


def _inverse_root(moment: Tensor) -> Tensor:
    mean = moment.mean()
    return torch.where(mean > 0, (moment / mean.clamp_min(1e-38) + _FLOOR).rsqrt(), torch.ones_like(moment))


class SketchEstimator:
    """K numbers per example: r x K floats are exchanged, without a mask; the second moment is kept as two vectors."""

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
        adam: bool = True,
        targets_from: int | None = None,
        absolute: bool = False,
    ) -> None:
        self._architecture = architecture
        self._device = device
        self._num_probes = num_probes
        self._every_step = every_step
        self._seed = seed
        self._adam = adam
        self._targets_from = targets_from
        self._absolute = absolute
        self._rows = VectorRows()
        self._moments: dict[int, Tensor] = {}
        self._parts: Tensor | None = None
        self._histories = [
            FactoredHistory(target.out_features, target.in_features, beta2, device) for target in architecture.targets
        ]
        self._signs: list[tuple[Tensor, Tensor]] = []
        self._epoch: int | None = None

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`; draws the step's signs."""
        self._rows.begin(probed)
        self._moments, self._parts = {}, parts
        epoch = step if self._every_step else 0
        if epoch != self._epoch:
            self._epoch = epoch
            self._signs = draw_signs(self._architecture, self._num_probes, self._seed, epoch, self._device)

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        vectors: list[Tensor] = []
        moments: list[Tensor] = []
        factors = gradient_factors(self._architecture, tail)
        for (delta, inputs), (rows, columns), history in zip(factors, self._signs, self._histories, strict=True):
            delta, inputs = delta[: len(positions)], inputs[: len(positions)]
            vectors.append(self._sketch(delta, inputs, rows, columns, history, positions))
            if self._adam:
                moments += second_moments(delta, inputs, rows, columns)
        # Each matrix has its own signs, so the sum of their sketches is a sketch of all together.
        self._rows.add(positions, multiply_by_parts(torch.stack(vectors).sum(dim=0), self._parts, positions))
        if self._adam:
            squares = multiply_by_parts(torch.cat(moments, dim=1), self._parts, positions, power=2)
            self._moments |= dict(zip(positions.tolist(), squares, strict=True))

    def _sketch(
        self,
        delta: Tensor,
        inputs: Tensor,
        rows: Tensor,
        columns: Tensor,
        history: FactoredHistory,
        positions: Tensor,
    ) -> Tensor:
        """Sketch gradients, scaled by the history, and targets' as they are: products are then <D g_i, g_target>."""
        row_scale, column_scale = history.scales()
        if self._absolute:
            row_scale = row_scale * history.size() / (delta.shape[2] * inputs.shape[2]) ** 0.5
        scaled = sketch_vectors(delta, inputs, rows * row_scale, columns * column_scale)
        if self._targets_from is None or not self._adam:
            return scaled
        targets = positions >= self._targets_from
        if not bool(targets.any()):
            return scaled
        plain = sketch_vectors(delta, inputs, rows, columns)
        return torch.where(to_device(targets, delta.device)[:, None], plain, scaled)

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`: all ranks get all sketches."""
        return self._rows.gather(batch_size, self._num_probes, self._device, exchange)

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Add the selected medoids' second moments to the history, summed over ranks."""
        medoids = coreset.positions[coreset.num_kept :].tolist()
        if medoids and self._adam:
            sizes = [len(part) for history in self._histories for part in (history.row, history.column)]
            total = torch.zeros(sum(sizes), device=self._device)
            for position in medoids:
                if position in self._moments:
                    total += self._moments[position]
            parts = (exchange.sum(total) / len(medoids)).split(sizes)
            for place, history in enumerate(self._histories):
                history.update(parts[2 * place], parts[2 * place + 1])
        self._moments = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the factored histories, concatenated over matrices."""
        return {
            "row": torch.cat([history.row for history in self._histories]),
            "column": torch.cat([history.column for history in self._histories]),
            "count": self._histories[0].count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the factored histories.

        Raises:
            ProbeError: if their shapes differ.
        """
        sizes = [
            [len(history.row) for history in self._histories],
            [len(history.column) for history in self._histories],
        ]
        if len(state["row"]) != sum(sizes[0]) or len(state["column"]) != sum(sizes[1]):
            raise ProbeError(
                "the saved sketch history has another shape. Resume with the model, LoRA rank and probe layer it had."
            )
        rows, columns = state["row"].split(sizes[0]), state["column"].split(sizes[1])
        for history, row, column in zip(self._histories, rows, columns, strict=True):
            history.row.copy_(row)
            history.column.copy_(column)
            history.count = int(state["count"])
