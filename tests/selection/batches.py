"""Large batches and signals that the tests of whole selections share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.selection import (
    DenseGradients,
    Gradients,
    LowRankGradients,
    Signals,
    finite_rows,
)
from colm_ds.types import Coreset
from tests.selection import oracles
from tests.selection.oracles import FixedDirections, low_rank_matrix, randn

R, D, B = 26, 40, 13
SOURCES = torch.tensor([2, 0, 1, 3, 1, 2, 0, 1, 2, 1, 3, 2, 1, 1, 2, 0, 1, 2, 2, 1, 3, 2, 1, 2, 1, 2])
SMALL = (0, 3)
T = TypeVar("T")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small only wait for further threads, for long where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_finite(r: int = R) -> Tensor:
    return torch.ones(r, dtype=torch.bool)


def make_signals(kind: str, step: int) -> tuple[Signals, np.ndarray | None, np.ndarray | None]:
    """Signals of one step with their gradients and their vectors as float64 matrices; rows in shuffled order."""
    order = torch.randperm(R, generator=torch.Generator().manual_seed(step))
    seed = 100 * step
    if kind == "vectors":
        vectors = randn(R, 9, seed=seed)
        return Signals(order, all_finite(), vectors=vectors[order]), None, vectors.double().numpy()
    if kind == "dense":
        matrix = randn(R, D, seed=seed)
        return Signals(order, all_finite(), DenseGradients(matrix[order])), matrix.double().numpy(), None
    num_probes = int(kind[-1])
    coefficients, z = randn(R, num_probes, seed=seed), randn(num_probes, D, seed=seed + 1)
    gradients = LowRankGradients(coefficients[order], FixedDirections(z))
    signals = Signals(order, all_finite(), gradients, coefficients[order])
    return signals, low_rank_matrix(coefficients, z), coefficients.double().numpy()


def check_same(coreset: Coreset, expected: oracles.Choice) -> None:
    assert coreset.positions.tolist() == expected.positions
    assert coreset.positions.dtype == torch.int64
    assert coreset.weights.dtype == torch.float32
    np.testing.assert_allclose(coreset.weights.numpy(), expected.weights, rtol=1e-4, atol=1e-5)
    assert coreset.num_kept == expected.num_kept
    assert coreset.coherence.keys() == expected.coherence.keys()
    for source, value in expected.coherence.items():
        assert coreset.coherence[source] == pytest.approx(value, rel=1e-5, abs=1e-7)


def spoil(signals_of: str, bad: list[int]) -> tuple[Signals, Signals, Tensor]:
    """Signals with spoilt rows, the same without these rows, and the positions that remain."""
    value = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(len(bad)) % 3]
    good = torch.tensor([i for i in range(R) if i not in bad], dtype=torch.int64)
    num_left = len(good)

    def both(make: Callable[[Tensor], tuple[Gradients | None, Tensor | None]], rows: Tensor) -> tuple[Signals, Signals]:
        spoilt = rows.clone()
        spoilt[bad, torch.arange(len(bad)) % rows.shape[1]] = value.to(rows.dtype)
        return (
            Signals(torch.arange(R), finite_rows(spoilt), *make(spoilt)),
            Signals(torch.arange(num_left), all_finite(num_left), *make(rows[good])),
        )

    if signals_of == "probes":
        directions = FixedDirections(randn(2, D, seed=1))
        return *both(lambda c: (LowRankGradients(c, directions), c), randn(R, 2, seed=2)), good
    if signals_of == "dense":
        return *both(lambda rows: (DenseGradients(rows), None), randn(R, D, seed=3)), good
    return *both(lambda rows: (None, rows), randn(R, 7, seed=4)), good
