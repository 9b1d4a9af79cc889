"""How far the coreset's mean gradient is from the large batch's, and a random subset's would be (CoLM, Fig. 3b)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_ds.models.architecture import Architecture
from colm_ds.probe.factors import example_gradients, gradient_factors
from colm_ds.probe.tail import TailInput
from colm_ds.selection import Exchange
from colm_ds.selection.transfer import to_device
from colm_ds.types import Coreset, LargeBatch


class GradientVariance:
    """Takes in the exact gradients of all examples of a large batch, one at a time; keeps two sums of them.

    With g the gradients of the probed matrices, r and b the sizes: the coreset's error is
    |sum over S of w_i g_i / b - mean over M of g_i|^2, and what b of the r at random have on average is
    (1 - b / r) / b times the variance of the g_i, sum |g_i - mean|^2 / (r - 1). Both are given relative to
    |mean over M of g_i|^2. Examples whose gradient is not finite are left out of all of it.
    """

    def __init__(self, architecture: Architecture, batch: LargeBatch, coreset: Coreset, device: torch.device) -> None:
        self._architecture = architecture
        weights = torch.zeros(batch.size, 2, dtype=torch.float64)  # of each example in the coreset, and if it is there
        weights[coreset.positions, 0] = coreset.weights.double()
        weights[coreset.positions, 1] = 1.0
        self._weights = to_device(weights, device)
        d = architecture.num_coordinates
        self._sums = torch.zeros(2, d, dtype=torch.float64, device=device)  # of the coreset (weighted) and of all
        self._scalars = torch.zeros(3, dtype=torch.float64, device=device)  # sum |g|^2, examples, chosen ones

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        factors = gradient_factors(self._architecture, tail)
        for row, position in enumerate(positions.tolist()):
            gradient = example_gradients(factors, row, lengths[row]).double()
            square = gradient.square().sum()
            finite = torch.isfinite(square)
            gradient, square = (torch.where(finite, value, 0.0) for value in (gradient, square))
            weight, chosen = self._weights[position]
            self._sums[0] += weight * gradient
            self._sums[1] += gradient
            self._scalars += torch.stack([square, finite.double(), chosen * finite])

    def result(self, exchange: Exchange) -> dict[str, float] | None:
        """`coreset` and `random`; None where there is nothing to compare. All ranks call it together."""
        sums = exchange.sum(self._sums)
        total, r, b = exchange.sum(self._scalars).tolist()
        if r < 2 or b < 1:
            return None
        mean = sums[1] / r
        scale = float(mean.square().sum())
        if scale == 0.0:
            return None
        error = float((sums[0] / b - mean).square().sum())
        variance = max(0.0, total - r * scale) / (r - 1)
        return {"coreset": error / scale, "random": (1.0 - b / r) / b * variance / scale}
