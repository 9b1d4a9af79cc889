"""Loss weights of the medoids of one pool: uniform, cluster sizes, or matched to the pool's mean signal."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.errors import SelectionError

WEIGHTS = ("uniform", "cluster", "matched")

RIDGE = 0.1
"""Pull of matched weights towards 1, as a multiple of the mean diagonal of the Gram matrix."""

MAX_WEIGHT = 4.0
"""Maximum matched weight: one example counts as at most four."""

FEW = 2
"""Pools with at most this many picks are weighted alike: there is nothing to match with."""


def cluster_weights(cluster_sizes: Tensor) -> Tensor:
    """Return weights in proportion to the examples that each medoid stands for, normalised to mean 1.

    Args:
        cluster_sizes: int64 `[k]`, each at least 1.

    Returns:
        float32 `[k]`.
    """
    return mean_one(cluster_sizes.double())


def matched_weights(
    picks: Tensor,
    target: Tensor,
    sizes: Tensor | None = None,
    *,
    ridge: float = RIDGE,
    max_weight: float = MAX_WEIGHT,
) -> Tensor:
    """Return weights that bring the picks' mean signal closest to the pool's.

    A pick deviates from the pool's mean by d_s = c_s - t_s g: c_s its signal, t_s its part in the divisor (1 in a
    mean over examples, its labelled tokens in a mean over tokens), g the pool's sum of signals over its sum of parts.
    Minimises |sum_s w_s d_s / k|^2 + lambda |w - 1|^2 under sum w = k and 0 <= w <= `max_weight`, lambda being `ridge`
    times the mean diagonal of the Gram matrix of d_s / k. As the mean is fixed, the weights cannot shrink the gradient
    as raw least squares does.

    Args:
        picks: signals c_s of the picks, `[k, K]`.
        target: g, `[K]`.
        sizes: t_s, `[k]`; default: 1.
        ridge: lambda's factor.
        max_weight: at least 1.

    Returns:
        float32 `[k]`, mean 1; all ones for up to `FEW` picks, or if no pick differs from the mean.

    Raises:
        SelectionError: if the shapes do not fit.
    """
    if picks.dim() != 2 or target.shape != picks.shape[1:] or (sizes is not None and sizes.shape != picks.shape[:1]):
        shapes = f"picks {tuple(picks.shape)} and target {tuple(target.shape)}"
        raise SelectionError(f"matched_weights: {shapes}. Give [k, K] and [K], and sizes [k] if any.")
    k = picks.shape[0]
    if k <= FEW:
        return torch.ones(k, device=picks.device)
    parts = torch.ones(k, 1, dtype=torch.float64, device=picks.device) if sizes is None else sizes.double()[:, None]
    beyond = (picks.double() - parts * target.double()) / k
    penalty = ridge * float(beyond.square().sum()) / k
    if penalty <= 0.0:
        return torch.ones(k, device=picks.device)
    # Divide by the penalty, so that the tolerances below mean the same for signals of any scale.
    return mean_one(_on_the_simplex(_Hessian(beyond / penalty**0.5), max_weight))


class _Hessian:
    """H = I + F F^T, positive definite `[k, k]`; it is never formed where F `[k, K]` has fewer columns than rows.

    Attributes:
        device: device of F.
    """

    def __init__(self, factor: Tensor) -> None:
        self.device = factor.device
        self._factor = factor
        self._ones = torch.ones(len(factor), dtype=torch.float64, device=factor.device)
        self._whole = None if factor.shape[1] < len(factor) else factor @ factor.T + torch.diag(self._ones)

    def __len__(self) -> int:
        return len(self._factor)

    def times(self, vector: Tensor) -> Tensor:
        """Return H v, float64 `[k]`."""
        if self._whole is not None:
            return self._whole @ vector
        return vector + self._factor @ (self._factor.T @ vector)

    def solve(self, places: Tensor, right: Tensor) -> Tensor:
        """Solve H[places, places] x = right, float64 `[len(places), m]`."""
        if self._whole is not None:
            return torch.linalg.solve(self._whole[places][:, places], right)
        factor = self._factor[places]
        small = factor.T @ factor
        small.diagonal().add_(1.0)
        return right - factor @ torch.linalg.solve(small, factor.T @ right)  # Woodbury

    def largest_row_sum(self) -> float:
        """Return an upper bound on the largest sum of absolute values in a row."""
        size = self._factor.abs()
        return 1.0 + float((size @ (size.T @ self._ones)).max())


def mean_one(weights: Tensor) -> Tensor:
    """Scale weights to mean 1, float32; all ones if they sum to 0."""
    total = weights.sum()
    if len(weights) == 0 or not float(total) > 0.0:
        return torch.ones_like(weights, dtype=torch.float32)
    return (weights * (len(weights) / total)).float()


def _on_the_simplex(hessian: _Hessian, upper: float) -> Tensor:
    """Minimise w^T H w / 2 - sum w over 0 <= w <= upper with sum w = k, for H positive definite; float64 `[k]`.

    Moving the equation into the objective by its multiplier leaves a problem with bounds only, whose sum falls as the
    multiplier rises, and linearly as long as the same weights are at a bound: Newton's method inside a bracket ends
    at the exact solution.
    """
    k = len(hessian)
    # At a push (1 less the multiplier) of 0 all weights are 0; at the high end all are at the upper bound.
    low, high = 0.0, upper * hessian.largest_row_sum() * (1.0 + 1e-9)
    push = 1.0
    line = _Line(hessian, torch.zeros(k, dtype=torch.int64, device=hessian.device), upper)
    solution = line.at(push)
    for _ in range(_MOST_STEPS):
        line, solution = _bounded(line, push)
        excess = float(solution.sum()) - k
        if abs(excess) <= 1e-10 * k:
            break
        low, high = (low, push) if excess > 0.0 else (push, high)
        push = push - excess / line.rise if line.rise > 0.0 else low
        if not low < push < high:
            push = (low + high) / 2.0
    return solution.clamp(0.0, upper)


_MOST_STEPS = 200
"""Maximum steps of Newton's method, which takes about ten; bisection alone would have converged by then."""


class _Line:
    """Weights as the push rises while the same ones stay at a bound: the others rise linearly.

    Attributes:
        hessian: H.
        state: -1 at 0, 0 between, 1 at `upper`, int64 `[k]`.
        upper: the bound.
        rise: increase of the sum per unit of push.
    """

    def __init__(self, hessian: _Hessian, state: Tensor, upper: float) -> None:
        self.hessian, self.state, self.upper = hessian, state, upper
        self._inside = (state == 0).nonzero().flatten()
        self._bounds = torch.where(state > 0, upper, 0.0).double()
        right = torch.stack([torch.ones_like(self._bounds), hessian.times(self._bounds)])[:, self._inside]
        self._slope, self._offset = hessian.solve(self._inside, right.T).T
        self.rise = float(self._slope.sum())

    def at(self, push: float) -> Tensor:
        """Return the optimal weights while the others stay at their bounds, float64 `[k]`."""
        solution = self._bounds.clone()
        solution[self._inside] = push * self._slope - self._offset
        return solution


def _bounded(line: _Line, push: float) -> tuple[_Line, Tensor]:
    """Minimise w^T H w / 2 - push sum w over 0 <= w <= upper; return the line and the minimum on it.

    Block principal pivoting: moves every weight on the wrong side at once; after three rounds without progress
    only the last one, which cannot cycle (Judice and Pires 1992).

    Args:
        line: line to start from.
        push: the linear term.
    """
    fewest, patience = len(line.state) + 1, 3
    while True:
        state, solution = line.state, line.at(push)
        slope = line.hessian.times(solution) - push
        tolerance = 1e-12 * max(1.0, float(slope.abs().max()), line.upper)
        wanted = state.clone()
        wanted[(state == 0) & (solution < -tolerance)] = -1
        wanted[(state == 0) & (solution > line.upper + tolerance)] = 1
        wanted[((state < 0) & (slope < -tolerance)) | ((state > 0) & (slope > tolerance))] = 0
        wrong = (wanted != state).nonzero().flatten()
        if len(wrong) == 0:
            return line, solution
        if len(wrong) < fewest or patience > 0:
            fewest, patience = (len(wrong), 3) if len(wrong) < fewest else (fewest, patience - 1)
        else:
            wanted = state.index_put((wrong[-1],), wanted[wrong[-1]])
        line = _Line(line.hessian, wanted, line.upper)
