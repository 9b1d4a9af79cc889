"""Measure the error of the coreset's mean gradient, and that of a random subset's (CoLM, Fig. 3b)."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.selection import Exchange
from colm_ds.selection.transfer import to_device
from colm_ds.types import Coreset


def worth_of(kappa: float, size: int, large: int) -> float:
    """Return how many random examples have the same error: 1 / (kappa (1/b - 1/r) + 1/r).

    Args:
        kappa: the coreset's squared error over that of a random b of r.
        size: b.
        large: r.
    """
    return 1.0 / (kappa * (1.0 / size - 1.0 / large) + 1.0 / large)


class GradientVariance:
    """Accumulate the gradients of all examples of a large batch, or sketches of them, in three sums.

    With g the gradients, r and b the sizes: the coreset's error is |sum over S of w_i g_i / sum w_i - mean|^2, that of
    b random ones is on average (1 - b / r) / b times the variance of the g_i, sum |g_i - mean|^2 / (r - 1). Both are
    relative to |mean|^2, the mean is over M. In a mean over tokens T_i g_i over the sum of T_i replaces g_i, in the
    coreset over the sum of w_i T_i, and the mean error of random ones is that of this ratio to first order. Examples
    whose gradient is not finite are left out throughout.
    """

    def __init__(self, coreset: Coreset, size: int, width: int, device: torch.device, parts: Tensor | None) -> None:
        """Start with empty sums.

        Args:
            coreset: chosen positions and weights.
            size: r.
            width: entries of a gradient.
            device: device of the gradients.
            parts: T, labelled tokens of every example, `[r]` on the CPU, in a mean over tokens; None: over examples.
        """
        facts = torch.zeros(3, size, dtype=torch.float64)  # weight in the coreset, whether in it, part in the divisor
        facts[0, coreset.positions] = coreset.weights.double()
        facts[1, coreset.positions] = 1.0
        facts[2] = 1.0 if parts is None else parts.double()
        self._facts = to_device(facts, device)
        self._by_token = parts is not None
        # Of the coreset's w T g, of all T g, and of all T^2 g.
        self._sums = torch.zeros(3, width, dtype=torch.float64, device=device)
        # Of |T g|^2, T^2, T, w T of the coreset; examples, chosen ones.
        self._scalars = torch.zeros(6, dtype=torch.float64, device=device)

    def observe(self, gradients: Tensor, positions: Tensor) -> None:
        """Add the gradients of some examples.

        Args:
            gradients: gradients of their mean losses, `[n, width]`.
            positions: int64 `[n]`, on the CPU.
        """
        finite = torch.isfinite(gradients).all(dim=1)
        weight, chosen, part = self._facts[:, to_device(positions, self._facts.device)] * finite
        summand = torch.where(finite[:, None], gradients, 0.0).double() * part[:, None]
        self._sums += torch.stack([weight, torch.ones_like(weight), part]) @ summand
        scalars = [summand.square().sum(), part.square().sum(), part.sum(), weight @ part, finite.sum(), chosen.sum()]
        self._scalars += torch.stack([scalar.double() for scalar in scalars])

    def result(self, exchange: Exchange) -> dict[str, float] | None:
        """Return the relative errors, and ratios of them if b < r; all ranks call it together.

        Returns:
            `coreset` and `random`, relative squared errors; `kappa`, their ratio; `worth`, the number of random
            examples with the coreset's error. None if there is nothing to compare.
        """
        coreset, total, weighted = exchange.sum(self._sums)
        squares, parts_squared, parts, coreset_parts, count, chosen = exchange.sum(self._scalars).tolist()
        r, b = int(count), int(chosen)
        if r < 2 or b < 1 or coreset_parts <= 0.0:
            return None
        mean = total / parts
        scale = float(mean.square().sum())
        if scale == 0.0:
            return None
        error = float((coreset / coreset_parts - mean).square().sum())
        spread = squares - 2.0 * float(mean @ weighted) + parts_squared * scale
        variance = max(0.0, spread) / (r - 1) / (parts / r) ** 2
        random = (1.0 - b / r) / b * variance
        errors = {"coreset": error / scale, "random": random / scale}
        if b < r and random > 0.0:
            kappa = error / random
            errors |= {"kappa": kappa, "worth": worth_of(kappa, b, r)}
        return errors
