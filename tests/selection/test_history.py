"""Streamed Adam geometry against dense float64 matrices."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.memory.counted import counted_allocations
from colm_ds.selection import SelectionSettings, Signals, select_coreset
from colm_ds.selection import history as module
from colm_ds.selection.exchange import SINGLE_PROCESS
from colm_ds.selection.fused import normalised_sum
from colm_ds.selection.gradients import DenseGradients, Gradients, LowRankGradients, finite_rows
from colm_ds.selection.history import AdamHistory, fused_sum, mean_gradient
from tests.selection.oracles import FixedDirections, Moments, low_rank_matrix, randn

KINDS = ("low_rank_1", "low_rank_4", "float32", "bfloat16", "float64")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small only wait for further threads, for long where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_gradients(kind: str, n: int, d: int, seed: int) -> tuple[Gradients, np.ndarray]:
    """Gradients of one kind and the same as a float64 matrix."""
    if kind.startswith("low_rank"):
        num_probes = int(kind.rsplit("_", 1)[1])
        coefficients, z = randn(n, num_probes, seed=seed), randn(num_probes, d, seed=seed + 1000)
        return LowRankGradients(coefficients, FixedDirections(z)), low_rank_matrix(coefficients, z)
    matrix = randn(n, d, seed=seed).to(getattr(torch, kind))
    return DenseGradients(matrix), matrix.double().numpy()


def close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few coordinates, so that small cases cross their borders."""
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", 64)


# Reading gradients


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_columns(kind: str) -> None:
    gradients, matrix = make_gradients(kind, 6, 23, seed=1)
    rows, index = torch.tensor([4, 0, 5]), torch.tensor([22, 3, 3, 0])
    assert gradients.num_coordinates == 23
    chunk, columns = gradients.chunk(rows, 5, 12), gradients.columns(rows, index)
    assert chunk.dtype == columns.dtype == torch.float32
    close(chunk, matrix[[4, 0, 5], 5:12])
    close(columns, matrix[[4, 0, 5]][:, [22, 3, 3, 0]])
    chunk.fill_(torch.nan)  # the caller may overwrite it
    close(gradients.chunk(rows, 0, 23), matrix[[4, 0, 5]])
    none = torch.empty(0, dtype=torch.int64)
    assert gradients.chunk(none, 0, 5).shape == (0, 5)
    assert gradients.columns(none, index).shape == (0, 4)


def test_finite_rows() -> None:
    matrix = torch.zeros(5, 3)
    matrix[1, 2], matrix[2, 0], matrix[4, 1] = torch.nan, torch.inf, -torch.inf
    assert finite_rows(matrix).tolist() == [True, False, False, True, False]
    assert finite_rows(matrix.bfloat16()).tolist() == [True, False, False, True, False]
    assert finite_rows(torch.zeros(0, 3)).tolist() == []
    assert finite_rows(torch.zeros(2, 0)).tolist() == [True, True]


# The geometry


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 200), (2, 63), (5, 97), (7, 128), (70, 13)])
def test_several_steps_against_dense_float64(kind: str, n: int, d: int) -> None:
    """u, its mean and the moments over several steps; d is hardly ever a multiple of the chunk."""
    history, moments = AdamHistory(d), Moments.zeros(d)
    for step in range(5):
        gradients, matrix = make_gradients(kind, n, d, seed=10 * step)
        rows = torch.arange(n)
        u = moments.geometry(matrix)
        close(history.normalise(gradients.chunk(rows, 0, d), slice(0, d)), u)
        index = torch.arange(0, d, 3)
        close(history.normalise(gradients.columns(rows, index), index), u[:, ::3])
        close(mean_gradient(gradients, rows, n, SINGLE_PROCESS, history), u.mean(axis=0))
        close(mean_gradient(gradients, rows, n, SINGLE_PROCESS), matrix.mean(axis=0))
        some = torch.arange(step % n, n, 2)
        close(
            mean_gradient(gradients, some, len(some), SINGLE_PROCESS, history),
            u[some.numpy()].mean(axis=0),
        )
        history.update(gradients, some, len(some), SINGLE_PROCESS)
        moments.update(matrix[some.numpy()])
        close(history.m, moments.m)
        close(history.v, moments.v)
        assert history.count == step + 1


@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.0, 0.5), 1e-3), ((0.95, 0.95), 0.1)])
def test_other_adam_settings(betas: tuple[float, float], eps: float) -> None:
    history, moments = AdamHistory(40, betas, eps), Moments.zeros(40, betas, eps)
    for step in range(4):
        gradients, matrix = make_gradients("float32", 6, 40, seed=step)
        close(history.normalise(gradients.chunk(torch.arange(6), 0, 40), slice(None)), moments.geometry(matrix))
        history.update(gradients, torch.arange(6), 6, SINGLE_PROCESS)
        moments.update(matrix)


def test_bias_correction_makes_the_first_step_a_sign() -> None:
    gradients = randn(5, 30, seed=2)
    u = AdamHistory(30).normalise(gradients.clone(), slice(0, 30))
    np.testing.assert_allclose(u.numpy(), gradients.sign().numpy(), rtol=1e-4)


def test_constant_gradients_stay_signs_however_long() -> None:
    """m = g and v = g^2 once corrected: what bias correction is for."""
    gradients = randn(1, 30, seed=3).expand(4, 30).clone()
    history = AdamHistory(30)
    for _ in range(50):
        history.update(DenseGradients(gradients), torch.arange(4), 4, SINGLE_PROCESS)
    u = history.normalise(gradients.clone(), slice(0, 30))
    np.testing.assert_allclose(u.numpy(), gradients.sign().numpy(), rtol=1e-4)


def test_gradients_of_zero() -> None:
    history = AdamHistory(8)
    zeros = DenseGradients(torch.zeros(3, 8))
    assert (history.normalise(torch.zeros(3, 8), slice(0, 8)) == 0).all()
    history.update(zeros, torch.arange(3), 3, SINGLE_PROCESS)
    assert torch.isfinite(history.normalise(torch.zeros(3, 8), slice(0, 8))).all()


def test_update_without_selected_is_none() -> None:
    history = AdamHistory(12)
    gradients = DenseGradients(randn(3, 12, seed=4))
    history.update(gradients, torch.arange(3), 3, SINGLE_PROCESS)
    before = copy.deepcopy(history.state_dict())
    history.update(gradients, torch.empty(0, dtype=torch.int64), 0, SINGLE_PROCESS)
    assert history.count == before["count"] == 1
    assert torch.equal(history.m, before["m"])
    assert torch.equal(history.v, before["v"])


def test_inputs_are_left_alone() -> None:
    matrix = randn(6, 50, seed=5)
    kept = matrix.clone()
    history = AdamHistory(50)
    gradients = DenseGradients(matrix)
    history.update(gradients, torch.arange(6), 6, SINGLE_PROCESS)
    m, v = history.m.clone(), history.v.clone()
    mean_gradient(gradients, torch.arange(6), 6, SINGLE_PROCESS, history)
    history.normalise(gradients.columns(torch.arange(6), torch.arange(50)), torch.arange(50))
    assert torch.equal(matrix, kept)
    assert torch.equal(history.m, m)
    assert torch.equal(history.v, v)


def test_state_round_trip() -> None:
    gradients = DenseGradients(randn(4, 20, seed=6))
    rows = torch.arange(4)
    history = AdamHistory(20)
    for _ in range(3):
        history.update(gradients, rows, 4, SINGLE_PROCESS)
    resumed = AdamHistory(20)
    resumed.load_state_dict(copy.deepcopy(history.state_dict()))
    for each in (history, resumed):
        each.update(gradients, rows[:2], 2, SINGLE_PROCESS)
    assert torch.equal(history.m, resumed.m)
    assert torch.equal(history.v, resumed.v)
    assert history.count == resumed.count == 4


def test_loading_copies() -> None:
    history, other = AdamHistory(5), AdamHistory(5)
    state = history.state_dict()
    other.load_state_dict(state)
    other.update(DenseGradients(torch.ones(1, 5)), torch.arange(1), 1, SINGLE_PROCESS)
    assert (history.m == 0).all()


def test_state_of_another_length_is_refused() -> None:
    with pytest.raises(SelectionError, match="history of 5 coordinates"):
        AdamHistory(6).load_state_dict(AdamHistory(5).state_dict())


# Memory


@pytest.mark.parametrize("kind", ["low_rank_1", "low_rank_4", "dense_bfloat16"])
def test_a_selection_is_streamed(kind: str) -> None:
    """Nothing of the size of the [r, d] matrix is allocated at the paper's sizes: 128 rows of 327,680 coordinates."""
    r, d, h, b = 128, 327_680, 2560, 64
    if kind == "dense_bfloat16":
        r, b = 32, 16  # a cheaper matrix to make; chunks are wider instead
        gradients: Gradients = DenseGradients(randn(r, d, seed=1).bfloat16())
    else:
        num_probes = int(kind[-1])
        gradients = LowRankGradients(randn(r, num_probes, seed=1), FixedDirections(randn(num_probes, d, seed=2)))
    signals = Signals(torch.arange(r), torch.ones(r, dtype=torch.bool), gradients)
    history = AdamHistory(d)
    history.v.fill_(1e-3)
    history.count = 3

    def select() -> None:
        settings = SelectionSettings(mask_size=h)
        coreset = select_coreset(torch.arange(r) % 4, signals, b, settings=settings, history=history)
        assert coreset.size == b

    counted = counted_allocations(select)
    peak, largest = counted.peak, counted.largest
    matrix_bytes = r * d * 4
    assert largest < matrix_bytes / 10
    assert largest < 8e6
    assert peak < 64e6
    assert peak > d * 4  # the count does count
    assert history.count == 4


def fused_case(n: int, d: int) -> tuple[LowRankGradients, AdamHistory]:
    """Rank-one gradients and a history of three updates."""
    gradients = LowRankGradients(randn(n, 1, seed=n), FixedDirections(randn(1, d, seed=d)))
    history = AdamHistory(d)
    for _ in range(3):
        history.update(gradients, torch.arange(0, n, 2), len(range(0, n, 2)), SINGLE_PROCESS)
    return gradients, history


def test_kernel_that_never_forms_the_rows() -> None:
    gradients, history = fused_case(23, 5000)
    rows = torch.arange(1, 23)
    close(
        fused_sum(gradients, rows, history, normalised_sum) / len(rows),
        mean_gradient(gradients, rows, len(rows), SINGLE_PROCESS, history).numpy(),
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs on a CPU")
@pytest.mark.slow
def test_compiled_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for all sizes and steps; on a CPU here, as Triton compiles the same function for a GPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    kernel = torch.compile(normalised_sum, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for n, d in ((23, 5000), (40, 3000)):
        gradients, history = fused_case(n, d)
        rows = torch.arange(n)
        for _ in range(2):
            close(
                fused_sum(gradients, rows, history, kernel),
                fused_sum(gradients, rows, history, normalised_sum).numpy(),
            )
            history.update(gradients, rows, n, SINGLE_PROCESS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
