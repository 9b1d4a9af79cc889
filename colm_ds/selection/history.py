"""Adam geometry of per-example gradients, streamed over coordinates (CoLM, section 4.2, equation 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.exchange import Exchange
from colm_ds.selection.fused import COORDINATES, can_fuse, compiled_sum
from colm_ds.selection.gradients import Gradients, LowRankGradients
from colm_ds.selection.transfer import to_device

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Elements of one [rows, coordinates] chunk: 1 MB in float32 stays in a core's cache, 16 MB keeps a GPU busy."""


def normalise(gradients: Tensor, m: Tensor, v: Tensor, count: int, betas: tuple[float, float], eps: float) -> Tensor:
    """Normalise gradients as Adam does, against a history; overwrite and return `gradients`.

    u = mhat / (sqrt(vhat) + eps) with mhat = (beta1 m + (1 - beta1) g) / (1 - beta1^t), vhat likewise from g^2 and
    t = count + 1.

    Args:
        gradients: `[n, w]`.
        m: first moment at these coordinates, `[w]`.
        v: second moment at these coordinates, `[w]`.
        count: updates of the history so far.
        betas: beta1 and beta2 of the optimizer.
        eps: eps of the optimizer.
    """
    of_gradient, of_m, of_square, of_v, eps = moment_factors(count, betas, eps)
    root = torch.addcmul(v * of_v, gradients, gradients, value=of_square)
    root.sqrt_().add_(eps)
    return gradients.mul_(of_gradient).add_(m * of_m).div_(root)


def moment_factors(count: int, betas: tuple[float, float], eps: float) -> tuple[float, float, float, float, float]:
    """Return the factors of g and m in mhat, of g^2 and v in vhat, and eps, after `count` updates."""
    beta1, beta2 = betas
    first, second = 1.0 - beta1 ** (count + 1), 1.0 - beta2 ** (count + 1)
    return (1.0 - beta1) / first, beta1 / first, (1.0 - beta2) / second, beta2 / second, eps


class AdamHistory:
    """Moments of the selected examples' gradients, and the geometry they define.

    The moments are those of *selected* examples of big sources: m becomes the mean over them of
    beta1 m + (1 - beta1) g_i, v likewise with g_i^2. Bias correction uses the number of updates plus one, which is the
    step number where every step selects. Extra memory beside m and v: one chunk of about 1 MB and one sum `[d]`.

    Attributes:
        m: first moment, float32 `[d]`.
        v: second moment, float32 `[d]`.
        count: updates so far.
    """

    def __init__(
        self,
        num_coordinates: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.m = torch.zeros(num_coordinates, device=device)
        self.v = torch.zeros(num_coordinates, device=device)
        self.count = 0
        self.betas = betas
        self.eps = eps

    def normalise(self, gradients: Tensor, where: slice | Tensor) -> Tensor:
        """Normalise g_i at some coordinates to u_i, `[n, w]`; overwrite and return `gradients`."""
        return normalise(gradients, self.m[where], self.v[where], self.count, self.betas, self.eps)

    def factors(self) -> tuple[float, float, float, float, float]:
        """See `moment_factors`."""
        return moment_factors(self.count, self.betas, self.eps)

    def update(self, gradients: Gradients, rows: Tensor, total: int, exchange: Exchange) -> None:
        """Update the moments with the selected rows of all processes; do nothing if there are none.

        Args:
            gradients: this process's gradients.
            rows: this process's selected rows, int64 `[n]`.
            total: selected rows of all processes.
            exchange: sums over processes.
        """
        if total == 0:
            return
        sums = torch.zeros(2, len(self.m), device=self.m.device)
        if gradients_of_rank_one(gradients):
            coefficients = gradients.coefficients[rows, 0].double()
            factors = coefficients.sum(), coefficients.square().sum()
            for start, stop in _chunks(len(self.m), rows[:1]):
                direction = gradients.direction(start, stop)
                sums[0, start:stop] = direction * factors[0].float()
                sums[1, start:stop] = direction.square() * factors[1].float()
        elif len(rows):
            for start, stop in _chunks(len(self.m), rows):
                chunk = gradients.chunk(rows, start, stop)
                sums[0, start:stop] = chunk.sum(dim=0)
                sums[1, start:stop] = chunk.square_().sum(dim=0)
        exchange.sum(sums)
        for moment, beta, increment in zip((self.m, self.v), self.betas, sums, strict=True):
            moment.mul_(beta).add_(increment, alpha=(1.0 - beta) / total)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and their count."""
        return {"m": self.m, "v": self.v, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments and count.

        Raises:
            SelectionError: if the moments have another length.
        """
        if state["m"].shape != self.m.shape:
            raise SelectionError(
                f"history of {len(state['m'])} coordinates does not fit a probe of {len(self.m)}. "
                "Resume with the model, LoRA rank and probe layer of the saved run."
            )
        self.m.copy_(state["m"])
        self.v.copy_(state["v"])
        self.count = int(state["count"])


def mean_gradient(
    gradients: Gradients, rows: Tensor, total: int, exchange: Exchange, history: AdamHistory | None = None
) -> Tensor:
    """Compute the mean over the rows of all processes, Adam-normalised first if there is a history; float64 `[d]`.

    Float64 sums of float32 numbers hardly depend on the order, so every world size finds the same largest coordinates,
    also in the first step, when |u| is 1 up to eps and coordinates differ by round-off.

    Args:
        gradients: this process's gradients.
        rows: this process's rows to average, int64 `[n]`.
        total: rows of all processes.
        exchange: sums over processes.
        history: normalises the rows.
    """
    mean = torch.zeros(gradients.num_coordinates, dtype=torch.float64, device=rows.device)
    if len(rows) and history is not None and gradients_of_rank_one(gradients) and can_fuse(rows.device):
        return exchange.sum(fused_sum(gradients, rows, history, compiled_sum())).div_(total)
    if len(rows):
        for start, stop in _chunks(gradients.num_coordinates, rows):
            chunk = gradients.chunk(rows, start, stop)
            chunk = history.normalise(chunk, slice(start, stop)) if history else chunk
            mean[start:stop] = chunk.sum(dim=0, dtype=torch.float64)
    return exchange.sum(mean).div_(total)


def gradients_of_rank_one(gradients: Gradients) -> TypeGuard[LowRankGradients]:
    """Return whether every gradient is a multiple of one shared direction."""
    return isinstance(gradients, LowRankGradients) and gradients.coefficients.shape[1] == 1


def fused_sum(gradients: LowRankGradients, rows: Tensor, history: AdamHistory, kernel: Callable[..., Tensor]) -> Tensor:
    """Sum the normalised rows of rank-one gradients by a kernel that never forms them; float64 `[d]`.

    Args:
        gradients: gradients with one direction.
        rows: rows to sum, int64 `[n]`.
        history: normalises the rows.
        kernel: `normalised_sum`, compiled or not.
    """
    d, device = gradients.num_coordinates, rows.device
    result = torch.empty(d, dtype=torch.float64, device=device)
    factors = to_device(torch.tensor(history.factors()), device)
    coefficients = gradients.coefficients[rows, 0]
    for start in range(0, d, COORDINATES):
        stop = min(start + COORDINATES, d)
        part = slice(start, stop)
        result[part] = kernel(coefficients, gradients.direction(start, stop), history.m[part], history.v[part], factors)
    return result


def _chunks(num_coordinates: int, rows: Tensor) -> list[tuple[int, int]]:
    width = max(1, _CHUNK_ELEMENTS.get(rows.device.type, 1 << 18) // max(1, len(rows)))
    return [(start, min(start + width, num_coordinates)) for start in range(0, num_coordinates, width)]
