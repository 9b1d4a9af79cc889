"""Whole selections by several processes that share one large batch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.selection import (
    SINGLE_PROCESS,
    AdamHistory,
    DenseGradients,
    SelectionSettings,
    Signals,
    finite_rows,
    select_coreset,
)
from colm_ds.types import Coreset
from tests.selection.batches import SMALL, SOURCES, B, D, R, all_finite
from tests.selection.oracles import randn

T = TypeVar("T")

# Two processes


Shared = Tensor | tuple[Tensor, Tensor] | None


class ThreadExchange:
    """Collectives between threads that play ranks; like real ones, they need equal shapes and calls on every rank."""

    def __init__(self, rank: int, slots: list[Shared], barrier: threading.Barrier) -> None:
        self.is_main = rank == 0
        self.num_processes = len(slots)
        self.calls: list[tuple[str, int]] = []  # name, elements sent
        self.rank, self._slots, self._barrier = rank, slots, barrier

    def _share(self, name: str, value: T, size: int) -> list[T]:
        self.calls.append((name, size))
        self._slots[self.rank] = value  # type: ignore[call-overload]
        self._barrier.wait(timeout=30)
        values = list(self._slots)
        self._barrier.wait(timeout=30)
        return values  # type: ignore[return-value]

    def sum(self, tensor: Tensor) -> Tensor:
        values = self._share("sum", tensor.clone(), tensor.numel())
        assert len({(value.shape, value.dtype) for value in values}) == 1
        return tensor.copy_(torch.stack(values).sum(dim=0))

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        gathered = torch.zeros(num_rows, rows.shape[1])
        for part, places in self._share("gather_rows", (rows.clone(), positions.clone()), rows.numel()):
            assert part.shape == (len(places), rows.shape[1])
            gathered[places] = part
        return gathered

    def broadcast(self, tensor: Tensor) -> Tensor:
        values = self._share("broadcast", tensor.clone(), tensor.numel())
        assert len({(value.shape, value.dtype) for value in values}) == 1
        return tensor.copy_(values[0])


def run_ranks(function: Callable[[ThreadExchange], T], num_ranks: int = 2) -> list[tuple[T, ThreadExchange]]:
    """Call a function on every rank at once; its results with the exchanges used."""
    barrier = threading.Barrier(num_ranks)
    slots: list[Shared] = [None] * num_ranks
    exchanges = [ThreadExchange(rank, slots, barrier) for rank in range(num_ranks)]
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(exchanges[rank])
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [(results[rank], exchanges[rank]) for rank in range(num_ranks)]


@pytest.mark.parametrize("weights", ["uniform", "cluster", "matched"])
@pytest.mark.parametrize("split", ["alternating", "one_rank_has_none", "three_ranks"])
def test_ranks_choose_what_one_process_chooses(weights: str, split: str) -> None:
    """Gradients stay on their ranks; sums, masked columns and picks are all that travels."""
    num_ranks = 3 if split == "three_ranks" else 2
    home = torch.zeros(R, dtype=torch.int64) if split == "one_rank_has_none" else torch.arange(R) % num_ranks
    for per_source, kept, h in itertools.product((True, False), (SMALL, ()), (11, None)):
        settings = SelectionSettings(weights=weights, per_source=per_source, mask_size=h)
        matrices = [randn(R, D, seed=step) for step in range(3)]

        def steps(
            exchange: ThreadExchange | None,
            settings: SelectionSettings = settings,
            kept: tuple[int, ...] = kept,
            matrices: list[Tensor] = matrices,
        ) -> tuple[list[Coreset], AdamHistory]:
            mine = torch.arange(R) if exchange is None else (home == exchange.rank).nonzero().flatten()
            history = AdamHistory(D, eps=0.05)
            chosen = [
                select_coreset(
                    SOURCES,
                    Signals(mine, all_finite(), DenseGradients(matrix[mine])),
                    B,
                    small=kept,
                    settings=settings,
                    history=history,
                    step=step,
                    exchange=exchange or SINGLE_PROCESS,
                )
                for step, matrix in enumerate(matrices, start=1)
            ]
            return chosen, history

        alone, alone_history = steps(None)
        ranks = run_ranks(steps, num_ranks)
        for (chosen, history), exchange in ranks:
            for coreset, expected in zip(chosen, alone, strict=True):
                assert coreset.positions.tolist() == expected.positions.tolist()
                np.testing.assert_allclose(coreset.weights.numpy(), expected.weights.numpy(), atol=1e-5)
                assert coreset.coherence == pytest.approx(expected.coherence, rel=1e-5)
            np.testing.assert_allclose(history.m.numpy(), alone_history.m.numpy(), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(history.v.numpy(), alone_history.v.numpy(), rtol=1e-5, atol=1e-8)
            assert torch.equal(history.m, ranks[0][0][1].m)
            assert [name for name, _ in exchange.calls] == [name for name, _ in ranks[0][1].calls]
            assert max(size for name, size in exchange.calls if name == "sum") == 2 * D
            assert max(size for name, size in exchange.calls if name == "gather_rows") <= R * (h or D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_steps_do_not_depend_on_the_ranks(dtype: torch.dtype) -> None:
    """With an empty history |u| is 1 up to eps: the order of float32 sums would choose the mask."""
    r, d = 64, 8000
    scale, shift = torch.exp(2 * randn(1, d, seed=99)), 0.3 * randn(1, d, seed=9)
    matrices = [(randn(r, d, seed=step) * scale + shift).to(dtype) for step in range(3)]

    def steps(exchange: ThreadExchange | None) -> list[list[int]]:
        mine = torch.arange(r) if exchange is None else torch.arange(exchange.rank, r, exchange.num_processes)
        history = AdamHistory(d)
        return [
            select_coreset(
                torch.zeros(r, dtype=torch.int64),
                Signals(mine, all_finite(r), DenseGradients(matrix[mine])),
                16,
                settings=SelectionSettings(mask_size=300),
                history=history,
                exchange=exchange or SINGLE_PROCESS,
            ).positions.tolist()
            for matrix in matrices
        ]

    alone = steps(None)
    for num_ranks in (2, 3):
        assert [chosen for chosen, _ in run_ranks(steps, num_ranks)] == [alone] * num_ranks


def test_ranks_share_spoilt_examples() -> None:
    matrix = randn(R, D, seed=7)
    matrix[3], matrix[8] = torch.nan, torch.inf
    finite = finite_rows(matrix)

    def select(exchange: ThreadExchange | None) -> Coreset:
        mine = torch.arange(R) if exchange is None else torch.arange(exchange.rank, R, 2)
        signals = Signals(mine, finite, DenseGradients(matrix[mine]))
        settings = SelectionSettings(mask_size=9)
        return select_coreset(SOURCES, signals, B, settings=settings, exchange=exchange or SINGLE_PROCESS)

    alone = select(None)
    assert alone.num_nonfinite == 2
    for coreset, _ in run_ranks(select):
        assert coreset.positions.tolist() == alone.positions.tolist()
        assert coreset.num_nonfinite == 2


def test_ranks_share_random_masks_and_vectors() -> None:
    matrix, parameters = randn(R, D, seed=8), randn(D, seed=9)

    def select(exchange: ThreadExchange | None) -> list[list[int]]:
        mine = torch.arange(R) if exchange is None else torch.arange(exchange.rank, R, 2)
        other = exchange or SINGLE_PROCESS
        chosen = []
        for criterion in ("random", "weight"):
            signals = Signals(mine, all_finite(), DenseGradients(matrix[mine]), parameters=parameters)
            settings = SelectionSettings(mask_size=5, mask_criterion=criterion)
            chosen.append(select_coreset(SOURCES, signals, B, settings=settings, exchange=other).positions.tolist())
        short = Signals(mine, all_finite(), vectors=matrix[mine, :6])
        chosen.append(select_coreset(SOURCES, short, B, exchange=other).positions.tolist())
        crowded = select_coreset(SOURCES, short, 3, small=SMALL, exchange=other)  # small examples in random order
        return [*chosen, crowded.positions.tolist()]

    alone = select(None)
    assert [chosen for chosen, _ in run_ranks(select)] == [alone, alone]


def test_single_process_exchange() -> None:
    tensor = torch.arange(3.0)
    assert SINGLE_PROCESS.sum(tensor) is tensor
    assert SINGLE_PROCESS.broadcast(tensor) is tensor
    gathered = SINGLE_PROCESS.gather_rows(torch.ones(2, 3), torch.tensor([3, 1]), 4)
    assert gathered.sum(dim=1).tolist() == [0, 3, 0, 3]
