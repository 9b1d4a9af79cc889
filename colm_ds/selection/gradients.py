"""Per-example gradients read in chunks, so that the [r, d] matrix need not exist."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Gradients(Protocol):
    """Rows of per-example gradients that this process can read.

    Attributes:
        num_coordinates: d, the length of a gradient.
    """

    num_coordinates: int

    def chunk(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Return coordinates start to stop of some rows, float32 `[len(rows), stop - start]`; may be overwritten."""
        ...

    def columns(self, rows: Tensor, index: Tensor) -> Tensor:
        """Return the given rows at the given coordinates, float32 `[len(rows), len(index)]`."""
        ...


class DirectionSource(Protocol):
    """K directions of length d, shared by all examples and ranks."""

    num_coordinates: int

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return coordinates start to stop of every direction, float32 `[K, stop - start]`."""
        ...

    def columns(self, index: Tensor) -> Tensor:
        """Return every direction at the given coordinates, float32 `[K, len(index)]`."""
        ...


class LowRankGradients:
    """Gradients estimated along K directions: g_i = mean over k of c_ik z_k (CoLM, equation 6, for K = 1).

    Attributes:
        coefficients: float32 `[n, K]`.
    """

    def __init__(self, coefficients: Tensor, directions: DirectionSource) -> None:
        self.coefficients = coefficients.float()
        self.num_coordinates = directions.num_coordinates
        self._directions = directions

    def chunk(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """See `Gradients.chunk`."""
        return self._combine(rows, self._directions.chunk(start, stop))

    def columns(self, rows: Tensor, index: Tensor) -> Tensor:
        """See `Gradients.columns`."""
        return self._combine(rows, self._directions.columns(index))

    def direction(self, start: int, stop: int) -> Tensor:
        """Return coordinates start to stop of the only direction, float32 `[stop - start]`."""
        return self._directions.chunk(start, stop)[0]

    def _combine(self, rows: Tensor, directions: Tensor) -> Tensor:
        coefficients = self.coefficients[rows]
        num_probes = coefficients.shape[1]
        if num_probes == 1:
            return coefficients * directions  # an outer product: avoids launching a matrix multiplication
        return (coefficients / num_probes) @ directions


class DenseGradients:
    """Gradients held as a matrix, `[n, d]` in any float type; for one rank's own examples only."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.num_coordinates = matrix.shape[1]

    def chunk(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """See `Gradients.chunk`."""
        return self.matrix[:, start:stop][rows].float()

    def columns(self, rows: Tensor, index: Tensor) -> Tensor:
        """See `Gradients.columns`."""
        return self.matrix[rows[:, None], index[None, :]].float()


def finite_rows(matrix: Tensor) -> Tensor:
    """Return which rows hold finite numbers only, bool `[n]`; reads a few rows at a time."""
    parts = [torch.isfinite(part).all(dim=1) for part in matrix.split(max(1, (1 << 22) // max(matrix.shape[1], 1)))]
    return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool, device=matrix.device)
