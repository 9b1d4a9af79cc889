"""Random directions and sign vectors shared by all examples and ranks, from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from colm_ds.randomness import private_generator
from colm_ds.selection.transfer import to_device

_BLOCK = 1 << 14
"""Coordinates drawn from one generator: the unit regenerated when a part of a direction is read."""

_CACHE_BYTES = 32 << 20
"""Directions up to this size are kept for the step; larger sets are drawn again at every read."""


class Directions:
    """K standard normal directions z of length d, drawn in blocks, so that only a part need exist at a time.

    Attributes:
        num_coordinates: d.
        num_probes: K.
    """

    def __init__(
        self, seed: int, epoch: int, num_probes: int, num_coordinates: int, device: torch.device | str = "cpu"
    ) -> None:
        """Prepare the directions of one refresh.

        Args:
            seed: seed of the run.
            epoch: the step for `refresh: step`, 0 for `refresh: run`.
            num_probes: K.
            num_coordinates: d.
            device: where they are drawn; each type of device gives different numbers.
        """
        self.num_coordinates = num_coordinates
        self.num_probes = num_probes
        self._seed = (seed, epoch)
        self._device = torch.device(device)
        self._cache: Tensor | None = None
        self._last: tuple[int, Tensor] | None = None
        if 4 * num_probes * num_coordinates <= _CACHE_BYTES:
            self._cache = torch.cat([block for _, block in self._blocks(0, num_coordinates)], dim=1)

    def direction(self, probe: int) -> Tensor:
        """Return direction number `probe`, float32 `[d]`."""
        if self._cache is not None:
            return self._cache[probe]
        return torch.cat([self._draw(block, probe) for block in range(self._num_blocks())])

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return coordinates start to stop of every direction, float32 `[K, stop - start]`."""
        if self._cache is not None:
            return self._cache[:, start:stop]
        parts = [
            values[:, max(start - offset, 0) : stop - offset] for offset, values in self._blocks(start // _BLOCK, stop)
        ]
        return torch.cat(parts, dim=1)

    def columns(self, index: Tensor) -> Tensor:
        """Return every direction at ascending coordinates, float32 `[K, len(index)]`."""
        if self._cache is not None:
            return self._cache[:, index]
        parts = []
        for block in torch.unique(index // _BLOCK).tolist():
            inside = index[(index // _BLOCK) == block] - block * _BLOCK
            parts.append(self._block(block)[:, inside])
        return torch.cat(parts, dim=1)

    def _num_blocks(self) -> int:
        return -(-self.num_coordinates // _BLOCK)

    def _blocks(self, first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        for block in range(first, -(-stop // _BLOCK)):
            yield block * _BLOCK, self._block(block)

    def _block(self, block: int) -> Tensor:
        if self._last is None or self._last[0] != block:
            self._last = block, torch.stack([self._draw(block, probe) for probe in range(self.num_probes)])
        return self._last[1]

    def _draw(self, block: int, probe: int) -> Tensor:
        size = min(_BLOCK, self.num_coordinates - block * _BLOCK)
        seed, epoch = self._seed
        return normals(size, seed, "direction", epoch, probe, block, device=self._device)


class LowRankDirections:
    """K directions z = A B / sqrt(rank) of the probed matrices, A and B standard normal (low-rank MeZO).

    Every entry of z has variance 1. Only the factors are kept.

    Attributes:
        num_coordinates: d.
        num_probes: K.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        num_probes: int,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare the directions of one refresh.

        Args:
            seed: seed of the run.
            epoch: the step for `refresh: step`, 0 for `refresh: run`.
            num_probes: K.
            shapes: rows and columns of every probed matrix, whose entries make the d coordinates.
            rank: maximum rank of z in each matrix.
            device: where they are drawn.
        """
        self.num_coordinates = sum(rows * columns for rows, columns in shapes)
        self.num_probes = num_probes
        self._device = torch.device(device)
        self._matrices: list[tuple[Tensor, Tensor]] = []  # A [K, rows, rank] and B [K, rank, columns]
        for place, (rows, columns) in enumerate(shapes):
            generator = private_generator(seed, "low rank", epoch, place, device=self._device)
            left = torch.randn(num_probes, rows, rank, generator=generator, device=self._device)
            right = torch.randn(num_probes, rank, columns, generator=generator, device=self._device)
            self._matrices.append((left / rank**0.5, right))

    def direction(self, probe: int) -> Tensor:
        """Return direction number `probe`, float32 `[d]`."""
        return torch.cat([(left[probe] @ right[probe]).flatten() for left, right in self._matrices])

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return coordinates start to stop of every direction, float32 `[K, stop - start]`."""
        return self.columns(torch.arange(start, stop, device=self._device))

    def columns(self, index: Tensor) -> Tensor:
        """Return every direction at ascending coordinates, float32 `[K, len(index)]`."""
        parts, offset = [], 0
        for left, right in self._matrices:
            width = right.shape[2]
            size = left.shape[1] * width
            inside = index[(index >= offset) & (index < offset + size)] - offset
            rows, columns = inside // width, inside % width
            parts.append((left[:, rows] * right[:, :, columns].transpose(1, 2)).sum(dim=2))
            offset += size
        return torch.cat(parts, dim=1)


def normals(size: int, seed: int, *parts: int | str, device: torch.device) -> Tensor:
    """Draw standard normal numbers on a device, float32 `[size]`: a GPU's are others than the CPU's."""
    return torch.randn(size, generator=private_generator(seed, *parts, device=device), device=device)


def sign_vectors(seed: int, purpose: str, epoch: int, count: int, size: int, device: torch.device) -> Tensor:
    """Draw `count` vectors of random signs, float32 `[count, size]`, on the CPU: the same for every device."""
    generator = private_generator(seed, purpose, epoch)
    signs = torch.randint(0, 2, (count, size), generator=generator, dtype=torch.int8) * 2 - 1
    return to_device(signs, device).float()
