"""Whole selections against a float64 transcription of the method, by one process and by two."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection import (
    SINGLE_PROCESS,
    AdamHistory,
    DenseGradients,
    Gradients,
    LowRankGradients,
    SelectionSettings,
    Signals,
    finite_rows,
    select_coreset,
)
from colm_ds.types import Coreset
from tests.selection import oracles
from tests.selection.oracles import FixedDirections, Moments, low_rank_matrix, randn

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


# One process against the transcription


@pytest.mark.parametrize("kept", [SMALL, ()], ids=["keep_small", "keep_none"])
@pytest.mark.parametrize("per_source", [True, False], ids=["per_source", "joint"])
@pytest.mark.parametrize("weights", ["uniform", "cluster", "matched"])
@pytest.mark.parametrize("metric", ["l1", "euclidean", "cosine"])
def test_several_steps_against_the_transcription(
    metric: str, weights: str, per_source: bool, kept: tuple[int, ...]
) -> None:
    """With history from an empty one on; eps is large, as else every |u| of the first step is 1 up to round-off."""
    for kind, h in itertools.product(("probes_1", "probes_4", "dense"), (11, 3 * D)):
        settings = SelectionSettings(metric=metric, weights=weights, per_source=per_source, mask_size=h)
        history, moments = AdamHistory(D, eps=0.05), Moments.zeros(D, eps=0.05)
        for step in range(1, 4):
            signals, gradients, vectors = make_signals(kind, step)
            coreset = select_coreset(SOURCES, signals, B, small=kept, settings=settings, history=history, step=step)
            expected = oracles.select(
                SOURCES.tolist(),
                B,
                gradients=gradients,
                vectors=vectors,
                small=kept,
                metric=metric,
                weights=weights,
                per_source=per_source,
                h=h,
                moments=moments,
            )
            check_same(coreset, expected)
            np.testing.assert_allclose(history.m.numpy(), moments.m, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(history.v.numpy(), moments.v, rtol=1e-5, atol=1e-7)
            assert history.count == moments.t - 1 == step


def test_first_step_of_one_probe_compares_signs() -> None:
    """Every |u| is 1: the lowest example of the commoner sign, then of the other, then what is left in order."""
    c = torch.tensor([0.3, -2.0, -0.1, 5.0, -0.4, -7.0, 0.2, -1.0])[:, None]
    gradients = LowRankGradients(c, FixedDirections(randn(1, D, seed=1)))
    signals = Signals(torch.arange(8), all_finite(8), gradients, c)
    for mask_size in (None, 5):
        settings = SelectionSettings(mask_size=mask_size, weights="cluster")
        history = AdamHistory(D)
        coreset = select_coreset(torch.zeros(8, dtype=torch.int64), signals, 4, settings=settings, history=history)
        assert coreset.positions.tolist() == [1, 0, 2, 3]
        np.testing.assert_allclose(coreset.weights.numpy(), [2, 1, 0.5, 0.5])
        assert history.count == 1


@pytest.mark.parametrize("metric", ["l1", "euclidean", "cosine"])
@pytest.mark.parametrize("weights", ["uniform", "cluster", "matched"])
def test_vectors_alone_are_compared_as_they_are(metric: str, weights: str) -> None:
    for per_source, kept in itertools.product((True, False), (SMALL, ())):
        signals, _, vectors = make_signals("vectors", 1)
        settings = SelectionSettings(metric=metric, weights=weights, per_source=per_source, mask_size=3)
        history = AdamHistory(9)
        coreset = select_coreset(SOURCES, signals, B, small=kept, settings=settings, history=history)
        expected = oracles.select(
            SOURCES.tolist(), B, vectors=vectors, small=kept, metric=metric, weights=weights, per_source=per_source
        )
        check_same(coreset, expected)
        assert history.count == 0


def test_without_history_plain_gradients_are_compared() -> None:
    for h in (None, 7, D, D + 1):
        signals, gradients, _ = make_signals("dense", 2)
        coreset = select_coreset(SOURCES, signals, B, small=SMALL, settings=SelectionSettings(mask_size=h))
        check_same(coreset, oracles.select(SOURCES.tolist(), B, gradients=gradients, small=SMALL, h=h))


def test_adam_eps_of_the_optimizer_with_a_long_history() -> None:
    history, moments = AdamHistory(D), Moments.zeros(D)
    for step in range(1, 9):
        signals, gradients, vectors = make_signals("probes_1", step)
        if step > 4:  # before, near-equal |u| are too common for a comparison of sets
            settings = SelectionSettings(mask_size=15)
            before = Moments(moments.m, moments.v, moments.t)
            coreset = select_coreset(SOURCES, signals, B, small=SMALL, settings=settings, history=history)
            check_same(
                coreset,
                oracles.select(
                    SOURCES.tolist(), B, gradients=gradients, vectors=vectors, small=SMALL, h=15, moments=before
                ),
            )
            moments = before
        else:
            assert signals.gradients is not None
            history.update(signals.gradients, torch.arange(R), R, SINGLE_PROCESS)
            assert gradients is not None
            moments.update(gradients)


def test_weights_have_mean_one_in_every_pool() -> None:
    for weights, per_source in itertools.product(("cluster", "matched"), (True, False)):
        signals, _, _ = make_signals("dense", 3)
        settings = SelectionSettings(weights=weights, per_source=per_source)
        coreset = select_coreset(SOURCES, signals, B, small=SMALL, settings=settings)
        of_source = SOURCES[coreset.positions]
        assert (coreset.weights[: coreset.num_kept] == 1).all()
        assert float(coreset.weights.mean()) == pytest.approx(1, abs=1e-5)
        if per_source:
            for source in (1, 2):
                assert float(coreset.weights[of_source == source].mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("criterion", ["weight", "weight_grad"])
def test_weight_criteria_read_the_parameters(criterion: str) -> None:
    signals, gradients, _ = make_signals("dense", 4)
    assert gradients is not None
    parameters = randn(D, seed=9)
    signals = Signals(signals.positions, signals.finite, signals.gradients, parameters=parameters)
    settings = SelectionSettings(mask_size=8, mask_criterion=criterion, per_source=False)
    score = parameters.double().numpy() * (gradients.mean(axis=0) if criterion == "weight_grad" else 1.0)
    expected = oracles.select(SOURCES.tolist(), B, gradients=gradients[:, oracles.mask(score, 8)], per_source=False)
    check_same(select_coreset(SOURCES, signals, B, settings=settings), expected)


def test_random_masks_depend_on_seed_and_step_only() -> None:
    def positions(seed: int, step: int) -> list[int]:
        signals, _, _ = make_signals("dense", 5)
        settings = SelectionSettings(mask_size=2, mask_criterion="random", seed=seed)
        return select_coreset(SOURCES, signals, B, settings=settings, step=step).positions.tolist()

    assert positions(0, 1) == positions(0, 1)
    assert len({tuple(positions(0, step)) for step in range(8)}) > 1
    assert len({tuple(positions(seed, 1)) for seed in range(8)}) > 1


def test_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    signals, _, _ = make_signals("dense", 5)
    settings = SelectionSettings(mask_size=2, mask_criterion="random")
    select_coreset(SOURCES, signals, 2, small=SMALL, settings=settings)
    select_coreset(SOURCES, signals, B, settings=settings)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["probes_1", "dense", "vectors"])
def test_inputs_are_left_alone(kind: str) -> None:
    signals, _, _ = make_signals(kind, 6)
    tensors = [signals.positions, signals.finite, signals.vectors]
    if isinstance(signals.gradients, DenseGradients):
        tensors.append(signals.gradients.matrix)
    copies = [None if tensor is None else tensor.clone() for tensor in tensors]
    for h, weights in itertools.product((None, 5), ("matched", "cluster")):
        settings = SelectionSettings(mask_size=h, weights=weights)
        select_coreset(SOURCES, signals, B, settings=settings, history=AdamHistory(D))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert tensor is None or (copy is not None and torch.equal(tensor, copy))


# Sizes at the edges


def test_any_size_is_filled() -> None:
    for size, kept in itertools.product((1, 2, 5, 12, R - 1, R, R + 9), (SMALL, (), (0, 1, 2, 3))):
        signals, _, _ = make_signals("dense", 1)
        coreset = select_coreset(SOURCES, signals, size, small=kept, history=AdamHistory(D))
        positions = coreset.positions.tolist()
        assert coreset.size == len(set(positions)) == len(coreset.weights) == min(size, R)
        assert positions[: coreset.num_kept] == sorted(positions[: coreset.num_kept])


def test_too_many_small_examples_select_none_and_leave_the_history() -> None:
    history = AdamHistory(D)
    signals, _, _ = make_signals("dense", 1)
    num_small = int(torch.isin(SOURCES, torch.tensor(SMALL)).sum())
    coreset = select_coreset(SOURCES, signals, num_small - 2, small=SMALL, history=history)
    assert coreset.num_kept == coreset.size == num_small - 2
    assert coreset.num_dropped_small == 2
    assert coreset.coherence == {}
    assert history.count == 0
    exact = select_coreset(SOURCES, signals, num_small, small=SMALL, history=history)
    assert exact.num_kept == exact.size == num_small
    assert exact.num_dropped_small == 0
    assert history.count == 0


def test_one_example() -> None:
    signals = Signals(torch.tensor([0]), all_finite(1), DenseGradients(randn(1, D, seed=1)))
    for weights in ("uniform", "cluster", "matched"):
        settings = SelectionSettings(weights=weights, mask_size=3)
        coreset = select_coreset(torch.tensor([5]), signals, 4, settings=settings, history=AdamHistory(D))
        assert coreset.positions.tolist() == [0]
        assert coreset.weights.tolist() == [1]
        assert coreset.coherence[5] == pytest.approx(1)


def test_small_examples_need_no_signal() -> None:
    rest = (~torch.isin(SOURCES, torch.tensor(SMALL))).nonzero().flatten()
    matrix = randn(R, D, seed=2)
    whole = Signals(torch.arange(R), all_finite(), DenseGradients(matrix))
    part = Signals(rest, all_finite(), DenseGradients(matrix[rest]))
    settings = SelectionSettings(mask_size=6, weights="matched")
    both = [select_coreset(SOURCES, each, B, small=SMALL, settings=settings) for each in (whole, part)]
    assert both[0].positions.tolist() == both[1].positions.tolist()
    assert torch.equal(both[0].weights, both[1].weights)


def test_equal_examples_go_from_the_lowest_on() -> None:
    equal = Signals(torch.arange(8), all_finite(8), DenseGradients(randn(1, D, seed=3).expand(8, D)))
    for metric in ("l1", "euclidean", "cosine"):
        settings = SelectionSettings(metric=metric, weights="cluster", mask_size=6)
        coreset = select_coreset(torch.zeros(8, dtype=torch.int64), equal, 4, settings=settings, history=AdamHistory(D))
        assert coreset.positions.tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(coreset.weights.numpy(), [2.5, 0.5, 0.5, 0.5])
        assert coreset.coherence[0] == pytest.approx(1)


def test_pairs_of_equal_examples() -> None:
    """Half of the examples from pairs: one of each pair, the lower of the two, standing for both."""
    distinct = 10 * randn(6, D, seed=4)
    signals = Signals(torch.arange(12), all_finite(12), DenseGradients(distinct.repeat(2, 1)))
    for metric in ("l1", "euclidean", "cosine"):
        settings = SelectionSettings(metric=metric, weights="cluster")
        coreset = select_coreset(torch.zeros(12, dtype=torch.int64), signals, 6, settings=settings)
        assert sorted(coreset.positions.tolist()) == list(range(6))
        assert coreset.weights.tolist() == [1] * 6


# Coherence


def test_coherence_by_hand() -> None:
    """1 where examples agree, 0 where they cancel, 1/sqrt(n) where they are orthogonal, 0 where all are zero."""
    vectors = torch.cat(
        [torch.ones(4, 5), torch.tensor([[1.0], [-1.0]]).repeat(2, 5), torch.eye(4, 5), torch.zeros(4, 5)]
    )
    sources = torch.arange(4).repeat_interleave(4)
    coreset = select_coreset(sources, Signals(torch.arange(16), all_finite(16), vectors=vectors), 8)
    assert [coreset.coherence[source] for source in range(4)] == pytest.approx([1, 0, 0.5, 0])
    joint = select_coreset(
        sources,
        Signals(torch.arange(16), all_finite(16), vectors=vectors),
        8,
        settings=SelectionSettings(per_source=False),
    )
    assert joint.coherence == {-1: pytest.approx(oracles.coherence(vectors.double().numpy()))}


# Signals that are not finite


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


@pytest.mark.parametrize("kind", ["probes", "dense", "vectors"])
@pytest.mark.parametrize("weights", ["uniform", "cluster", "matched"])
def test_examples_without_finite_signal_are_as_if_absent(kind: str, weights: str) -> None:
    for per_source, metric, h in itertools.product((True, False), ("l1", "cosine"), (9, None)):
        bad = [0, 1, 2, 9, 24, 25]  # of small and big sources
        spoilt, clean, good = spoil(kind, bad)
        settings = SelectionSettings(metric=metric, weights=weights, per_source=per_source, mask_size=h)
        histories = [AdamHistory(D, eps=0.05), AdamHistory(D, eps=0.05)]
        for step in (1, 2):
            coreset = select_coreset(
                SOURCES, spoilt, B, small=SMALL, settings=settings, history=histories[0], step=step
            )
            without = select_coreset(
                SOURCES[good], clean, B, small=SMALL, settings=settings, history=histories[1], step=step
            )
            assert coreset.num_nonfinite == len(bad)
            assert without.num_nonfinite == 0
            assert coreset.size == B
            assert coreset.positions.tolist() == good[without.positions].tolist()
            assert torch.equal(coreset.weights, without.weights)
            assert coreset.coherence == without.coherence
        assert torch.equal(histories[0].m, histories[1].m)
        assert torch.equal(histories[0].v, histories[1].v)
        assert torch.isfinite(histories[0].m).all()
        assert torch.isfinite(histories[0].v).all()


def test_fewer_finite_examples_than_asked_for() -> None:
    spoilt, _, good = spoil("dense", list(range(R - 4)))
    coreset = select_coreset(SOURCES, spoilt, B, history=AdamHistory(D))
    assert sorted(coreset.positions.tolist()) == good.tolist()
    assert coreset.num_nonfinite == R - 4


def test_no_finite_example_at_all() -> None:
    spoilt, _, _ = spoil("dense", list(range(R)))
    history = AdamHistory(D)
    coreset = select_coreset(SOURCES, spoilt, B, small=SMALL, history=history)
    assert coreset.size == 0
    assert coreset.num_nonfinite == R
    assert history.count == 0


# Errors


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"metric": "l2"}, "metric 'l2' is unknown. Choose one of l1"),
        ({"weights": "sizes"}, "weights 'sizes' is unknown"),
        ({"mask_criterion": "gradient"}, "mask_criterion 'gradient' is unknown"),
        ({"mask_size": 0}, "mask_size 0"),
    ],
)
def test_settings_errors(field: dict[str, str | int], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        SelectionSettings(**field)  # type: ignore[arg-type]


def test_errors() -> None:
    signals, _, _ = make_signals("dense", 1)
    with pytest.raises(SelectionError, match="coreset size 0"):
        select_coreset(SOURCES, signals, 0)
    with pytest.raises(SelectionError, match="no signals"):
        select_coreset(SOURCES, Signals(torch.arange(R), all_finite()), B)
    with pytest.raises(SelectionError, match="25 finite flags for 26 examples"):
        select_coreset(SOURCES, Signals(torch.arange(R), all_finite(R - 1), signals.gradients), B)
    with pytest.raises(SelectionError, match="needs the probed parameters"):
        select_coreset(SOURCES, signals, B, settings=SelectionSettings(mask_size=3, mask_criterion="weight"))
    part = Signals(torch.arange(R - 2), all_finite(), DenseGradients(randn(R - 2, D, seed=1)))
    with pytest.raises(SelectionError, match=r"no signal for positions \[\d"):
        select_coreset(SOURCES, part, B)


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
