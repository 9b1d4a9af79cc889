"""Loss weights of the medoids of one pool: uniform, cluster sizes, or matched to the pool's mean signal."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.errors import SelectionError

WEIGHTS = ("uniform", "cluster", "matched")

RIDGE = 0.1
"""Pull of matched weights towards 1, as a multiple of the mean diagonal of the Gram matrix."""


def cluster_weights(cluster_sizes: Tensor) -> Tensor:
    """Weights in proportion to the examples each medoid stands for, normalised to mean 1.

    Args:
        cluster_sizes: int64 `[k]`, each at least 1.

    Returns:
        float32 `[k]`.
    """
    return mean_one(cluster_sizes.double())


def matched_weights(picks: Tensor, target: Tensor, ridge: float = RIDGE) -> Tensor:
    """Non-negative weights whose weighted mean of the picks' signals comes nearest to the pool's mean signal.

    Minimises |sum_s w_s c_s / k - target|^2 + lambda |w - 1|^2 over w >= 0, with lambda = `ridge` times the mean
    diagonal of the Gram matrix of c_s / k, then normalises to mean 1: raw least squares shrinks the gradient.

    Args:
        picks: signals c_s of the picks, `[k, K]`.
        target: mean signal of the whole pool, `[K]`.
        ridge: lambda's factor.

    Returns:
        float32 `[k]`, mean 1; all ones where the signals are zero.

    Raises:
        SelectionError: if the shapes do not fit.
    """
    if picks.dim() != 2 or target.shape != picks.shape[1:]:
        raise SelectionError(
            f"matched_weights: picks {tuple(picks.shape)} and target {tuple(target.shape)}. Give [k, K] and [K]."
        )
    k = picks.shape[0]
    scaled = picks.double() / max(k, 1)
    gram = scaled @ scaled.T
    penalty = ridge * float(gram.diagonal().mean()) if k else 0.0
    if penalty <= 0.0:
        return torch.ones(k, device=picks.device)
    # Divided by the penalty, so that the tolerance below means the same for signals of any size.
    hessian = gram / penalty + torch.eye(k, dtype=torch.float64, device=picks.device)
    return mean_one(_nonnegative_quadratic(hessian, scaled @ target.double() / penalty + 1.0))


def mean_one(weights: Tensor) -> Tensor:
    """Scale weights to mean 1, float32; all ones where they add up to nothing."""
    total = weights.sum()
    if len(weights) == 0 or not float(total) > 0.0:
        return torch.ones_like(weights, dtype=torch.float32)
    return (weights * (len(weights) / total)).float()


def _nonnegative_quadratic(hessian: Tensor, linear: Tensor) -> Tensor:
    """argmin over w >= 0 of w^T H w / 2 - q^T w, H positive definite: block principal pivoting.

    Exchanges every infeasible variable at once; after three exchanges without progress, only the last one, which can
    not cycle (Portugal, Judice and Vicente 1994).
    """
    k = len(linear)
    free = torch.ones(k, dtype=torch.bool, device=linear.device)
    fewest, patience = k + 1, 3
    tolerance = 1e-12 * float(linear.abs().max())
    while True:
        solution = torch.zeros_like(linear)
        inside = free.nonzero().flatten()
        solution[inside] = torch.linalg.solve(hessian[inside][:, inside], linear[inside])
        slope = hessian @ solution - linear
        infeasible = torch.where(free, solution < -tolerance, slope < -tolerance)
        count = int(infeasible.sum())
        if count == 0:
            return solution.clamp_min(0.0)
        if count < fewest:
            fewest, patience = count, 3
            free = free ^ infeasible
        elif patience > 0:
            patience -= 1
            free = free ^ infeasible
        else:
            last = infeasible.nonzero().flatten()[-1]
            free[last] = ~free[last]
