"""Whole selections against a float64 transcription of the method, by one process and by two."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from colm_ds.errors import SelectionError
from colm_ds.selection import (
    SINGLE_PROCESS,
    AdamHistory,
    DenseGradients,
    LowRankGradients,
    SelectionSettings,
    Signals,
    select_coreset,
)
from tests.selection import oracles
from tests.selection.batches import SMALL, SOURCES, B, D, R, all_finite, check_same, make_signals, spoil
from tests.selection.oracles import FixedDirections, Moments, randn

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
