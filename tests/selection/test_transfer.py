"""One copy for everything, and a choice that supposes finite signals until the copy says otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_ds.selection import SINGLE_PROCESS, AdamHistory, DenseGradients, Exchange, SelectionSettings, Signals, mask
from colm_ds.selection import coreset as coreset_module
from colm_ds.selection.coreset import select_coreset
from colm_ds.selection.transfer import pack, to_cpu, unpack
from colm_ds.types import Coreset
from tests.selection.batches import SMALL, SOURCES, B, D, R
from tests.selection.oracles import randn
from tests.selection.test_ranks import run_ranks


def test_tensors_of_any_type_come_back_as_they_were() -> None:
    flags = torch.tensor([True, False, True])
    tensors = [flags, randn(3, 5, seed=1), randn(2, 2, seed=2).double(), torch.arange(4), torch.tensor(7.5)]
    tensors += [torch.tensor([], dtype=torch.float32), randn(4, 6, seed=3).T, randn(3, 3, seed=4).bfloat16()]
    for before, after in zip(tensors, unpack(pack(tensors), tensors), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_what_is_on_the_cpu_is_not_copied() -> None:
    tensors = [randn(3, seed=1), torch.tensor([True])]
    assert [id(tensor) for tensor in to_cpu(tensors)] == [id(tensor) for tensor in tensors]


def choose(matrices: list[Tensor], settings: SelectionSettings, exchange: Exchange) -> list[Coreset]:
    """Several steps with a history; each process holds every second example."""
    history = AdamHistory(D, eps=0.05)
    mine = torch.arange(R)
    if exchange.num_processes > 1:
        mine = mine[int(not exchange.is_main) :: exchange.num_processes]
    found = []
    for step, matrix in enumerate(matrices, start=1):
        signals = Signals(mine, torch.isfinite(matrix).all(dim=1), DenseGradients(matrix[mine]))
        chosen = select_coreset(
            SOURCES, signals, B, small=SMALL, settings=settings, history=history, step=step, exchange=exchange
        )
        found.append(chosen)
    return found


@pytest.mark.parametrize("broken", [[], [4], [2, 11, 25]])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("settings", [{"mask_size": 11}, {"weights": "matched", "per_source": False}])
def test_flags_that_come_late_change_nothing(
    broken: list[int], num_ranks: int, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = [randn(R, D, seed=step) for step in range(3)]
    matrices[1][broken] = torch.nan
    settings_ = SelectionSettings(**settings)  # type: ignore[arg-type]
    wanted = choose(matrices, settings_, SINGLE_PROCESS)
    monkeypatch.setattr(coreset_module, "_known_finite", lambda signals: None)  # as on a GPU
    monkeypatch.setattr(mask, "top_coordinates", mask._top_by_sorting)
    if num_ranks == 1:
        runs = [choose(matrices, settings_, SINGLE_PROCESS)]
    else:
        runs = [found for found, _ in run_ranks(lambda exchange: choose(matrices, settings_, exchange))]
    for run in runs:
        for late, known in zip(run, wanted, strict=True):
            assert late.positions.tolist() == known.positions.tolist()
            torch.testing.assert_close(late.weights, known.weights)
            assert (late.num_nonfinite, late.nonfinite) == (known.num_nonfinite, known.nonfinite)
    assert wanted[1].num_nonfinite == len(broken)
