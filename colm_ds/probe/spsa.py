"""`spsa`: the gradient along K random directions from losses at both ends of a small step (CoLM, equation 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.models.architecture import Architecture, ProbeTarget
from colm_ds.probe.directions import Directions, LowRankDirections
from colm_ds.probe.estimators import VectorRows, multiply_by_parts
from colm_ds.probe.tail import TailInput, precise_tail, tail_losses
from colm_ds.selection import Exchange, LowRankGradients, Signals
from colm_ds.types import Coreset


@contextmanager
def shifted_output(target: ProbeTarget, direction: Tensor, epsilon: float) -> Iterator[None]:
    """Make the target compute as if `epsilon` times `direction` were added to its weight, which stays untouched.

    Args:
        target: the probed linear map.
        direction: z, `[out, in]`.
        epsilon: signed step.
    """

    def shift(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        moved = F.linear(inputs[0], direction.to(inputs[0].dtype))
        if target.out_features == output.shape[-1]:
            return output.add(moved, alpha=epsilon)
        return target.with_rows(output, target.rows_of(output).add(moved, alpha=epsilon))

    with target.hooking(shift):
        yield


def spsa_coefficients(
    architecture: Architecture,
    tail: TailInput,
    directions: Directions | LowRankDirections,
    epsilon: float,
    dtype: torch.dtype = torch.float32,
    device_type: str | None = None,
) -> Tensor:
    """Compute c_ik = (L_i(theta + eps z_k) - L_i(theta - eps z_k)) / (2 eps), float32 `[batch, K]`.

    Args:
        architecture: the model's parts.
        tail: input of the last layer.
        directions: z.
        epsilon: eps.
        dtype: float32 or float64, the dtype in which the last layer, norm and head compute.
        device_type: see `precise_tail`.
    """
    sizes = [target.num_coordinates for target in architecture.targets]
    tail = tail.cast(dtype)
    columns = []
    with torch.no_grad(), precise_tail(architecture, dtype, device_type):
        for probe in range(directions.num_probes):
            parts = directions.direction(probe).split(sizes)
            losses = []
            for step in (epsilon, -epsilon):
                with ExitStack() as shifts:
                    for target, part in zip(architecture.targets, parts, strict=True):
                        direction = part.view(target.out_features, target.in_features)
                        shifts.enter_context(shifted_output(target, direction, step))
                    losses.append(tail_losses(architecture, tail))
            columns.append((losses[0] - losses[1]) / (2.0 * epsilon))
    return torch.stack(columns, dim=1).float()


class SpsaEstimator:
    """K finite differences per example; r x K floats are exchanged, and the choice is among all ranks' examples.

    Attributes:
        dtype: in which the last layer, norm and head compute.
    """

    is_local = False

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        *,
        num_probes: int,
        epsilon: float,
        every_step: bool,
        seed: int,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
    ) -> None:
        self._architecture = architecture
        self.dtype = dtype
        self._device = device
        self._num_probes = num_probes
        self._epsilon = epsilon
        self._every_step = every_step
        self._seed = seed
        self._rank = rank
        self._epoch: int | None = None
        self._directions: Directions | LowRankDirections | None = None
        self._rows = VectorRows()
        self._parts: Tensor | None = None
        with precise_tail(architecture, dtype):
            pass  # raise now, on every rank, what would fail in the first step

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`; the step's directions are drawn with the first examples."""
        self._rows.begin(probed)
        self._parts = parts
        epoch = step if self._every_step else 0
        if epoch != self._epoch:
            self._epoch, self._directions = epoch, None

    def observe(self, tail: TailInput, positions: Tensor, lengths: Sequence[int]) -> None:
        """See `Estimator.observe`."""
        coefficients = spsa_coefficients(self._architecture, tail, self._directions_now(), self._epsilon, self.dtype)
        self._rows.add(positions, multiply_by_parts(coefficients[: len(positions)], self._parts, positions))

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`: all ranks get all coefficients."""
        signals = self._rows.gather(batch_size, self._num_probes, self._device, exchange)
        assert signals.vectors is not None
        return replace(signals, gradients=LowRankGradients(signals.vectors, self._directions_now()))

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Do nothing: the selector keeps the history."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: directions follow from seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _directions_now(self) -> Directions | LowRankDirections:
        if self._directions is None:
            epoch, count = self._epoch or 0, self._num_probes
            if self._rank is None:
                size = self._architecture.num_coordinates
                self._directions = Directions(self._seed, epoch, count, size, self._device)
            else:
                shapes = [(target.out_features, target.in_features) for target in self._architecture.targets]
                self._directions = LowRankDirections(self._seed, epoch, count, shapes, self._rank, self._device)
        return self._directions
