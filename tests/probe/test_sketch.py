"""`sketch` is a_k^T G_i b_k / sqrt(K) of autograd's G_i, and keeps a factored second moment of what was selected."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_ds.errors import ProbeError
from colm_ds.models.architecture import find_architecture
from colm_ds.models.families import FAMILIES
from colm_ds.probe.directions import sign_vectors
from colm_ds.probe.sketch import FactoredHistory, SketchEstimator, second_moments, sketch_vectors
from colm_ds.randomness import private_generator
from colm_ds.selection import SINGLE_PROCESS, SingleProcess
from colm_ds.types import Coreset
from tests.probe.oracles import (
    CPU,
    make_estimator,
    make_examples,
    plain_gradients,
    probe_step,
    relative_error,
    trunk,
)
from tests.tiny_models import tiny_model


def signs_of(architecture: Any, num_probes: int, epoch: int = 1) -> tuple[Tensor, Tensor]:
    target = architecture.targets[0]
    rows = sign_vectors(0, "rows", epoch, num_probes, target.out_features, CPU)
    return rows, sign_vectors(0, "columns", epoch, num_probes, target.in_features, CPU)


def coreset_of(positions: list[int], num_kept: int = 0) -> Coreset:
    return Coreset(torch.tensor(positions, dtype=torch.int64), torch.ones(len(positions)), num_kept)


def random_factors(lengths: tuple[int, ...] = (5, 5, 5), out: int = 3, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """delta, x and the gradients that they make, `[n, out, in]`."""
    generator = private_generator(0, "factors")
    delta = torch.randn(len(lengths), max(lengths), out, generator=generator)
    inputs = torch.randn(len(lengths), max(lengths), width, generator=generator)
    return delta, inputs, torch.einsum("blo,bli->boi", delta.double(), inputs.double())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_sketch_of_autograd(family: str, lora: bool) -> None:
    model, examples = tiny_model(family, lora), make_examples()
    architecture = find_architecture(model)
    found = probe_step(make_estimator("sketch", architecture, num_probes=7), model, examples).vectors
    rows, columns = signs_of(architecture, 7)
    gradients = plain_gradients(model, examples)
    expected = torch.einsum("ko,boi,ki->bk", rows.double(), gradients, columns.double()) / 7**0.5
    assert found.shape == (5, 7)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_bf16_equals_autograd_in_bf16(family: str) -> None:
    model, examples = tiny_model(family, True, torch.bfloat16), make_examples()
    architecture = find_architecture(model)
    found = probe_step(make_estimator("sketch", architecture, num_probes=64), model, examples).vectors
    rows, columns = signs_of(architecture, 64)
    gradients = plain_gradients(model, examples, None)
    expected = torch.einsum("ko,boi,ki->bk", rows.double(), gradients, columns.double()) / 8
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 2e-2


@pytest.mark.parametrize("parts", [None, torch.tensor([3.0, 1.0, 0.5, 2.0, 7.0])], ids=["example", "token"])
def test_scaled_after_an_update(parts: Tensor | None) -> None:
    """In the second step delta and x are divided by roots of the factored second moment of the first.

    Where the step's loss is a mean over tokens, a gradient counts by its tokens, and its square by theirs.
    """
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    estimator = make_estimator("sketch", architecture, num_probes=6)
    probe_step(estimator, model, examples, parts=parts)
    estimator.update(coreset_of([3, 0, 2], num_kept=1), SINGLE_PROCESS)
    found = probe_step(estimator, model, examples, step=2, parts=parts).vectors

    gradients = plain_gradients(model, examples)
    gradients = gradients if parts is None else parts.double()[:, None, None] * gradients
    rows, columns = (signs.double() for signs in signs_of(architecture, 6, epoch=1))
    medoids = gradients[[0, 2]]  # 3 is kept, not chosen
    moment_of_rows = (medoids @ columns.T).square().mean(dim=(0, 2)) / 32
    moment_of_columns = (medoids.transpose(1, 2) @ rows.T).square().mean(dim=(0, 2)) / 16
    state = estimator.state_dict()
    assert torch.allclose(state["row"].double(), 0.001 * moment_of_rows, rtol=1e-4)  # a mean over the medoids
    assert torch.allclose(state["column"].double(), 0.001 * moment_of_columns, rtol=1e-4)
    row_scale = (moment_of_rows / moment_of_rows.mean() + 1e-4).rsqrt()
    column_scale = (moment_of_columns / moment_of_columns.mean() + 1e-4).rsqrt()
    rows, columns = (signs.double() for signs in signs_of(architecture, 6, epoch=2))
    scaled = row_scale[:, None] * gradients * column_scale
    expected = torch.einsum("ko,boi,ki->bk", rows, scaled, columns) / 6**0.5
    assert relative_error(found, expected) < 1e-4
    assert float(row_scale.max() / row_scale.min()) > 1.2  # the scales do something


def test_inner_products_are_kept_in_the_mean() -> None:
    """Over all signs: the sum over k of c_ik c_jk is the inner product of G_i and G_j."""
    delta, inputs, gradients = random_factors()
    rows, columns = all_signs(3, 4)
    sketches = sketch_vectors(delta, inputs, rows, columns).double()
    flat = gradients.flatten(1)
    assert torch.allclose(sketches @ sketches.T, flat @ flat.T, rtol=1e-5)


def all_signs(out: int, width: int) -> tuple[Tensor, Tensor]:
    """Every pair of a sign vector of rows and one of columns."""
    rows = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=out)))
    columns = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=width)))
    return rows.repeat_interleave(len(columns), dim=0), columns.repeat(len(rows), 1)


def test_second_moments_are_right_in_the_mean() -> None:
    """Over all signs, which is the expectation itself: the true row and column means of G^2."""
    delta, inputs, gradients = random_factors()
    row_means, column_means = second_moments(delta, inputs, *all_signs(3, 4))
    assert torch.allclose(row_means.double(), gradients.square().mean(dim=2), rtol=1e-5)
    assert torch.allclose(column_means.double(), gradients.square().mean(dim=1), rtol=1e-5)


def test_second_moments_converge_over_draws() -> None:
    delta, inputs, gradients = random_factors(out=16, width=32)
    num_draws, num_probes = 300, 8
    draws = [
        second_moments(
            delta,
            inputs,
            sign_vectors(0, "rows", draw, num_probes, 16, CPU),
            sign_vectors(0, "columns", draw, num_probes, 32, CPU),
        )
        for draw in range(num_draws)
    ]
    for part, expected in enumerate((gradients.square().mean(dim=2), gradients.square().mean(dim=1))):
        ratios = torch.stack([draw[part].double() for draw in draws]) / expected
        one_draw = (2 / num_probes) ** 0.5  # largest relative standard error of one draw
        assert ratios.std(dim=0).mean() < one_draw
        assert (ratios.mean(dim=0) - 1).abs().max() < 5 * one_draw / num_draws**0.5


def test_factored_history_against_a_plain_transcription() -> None:
    generator = private_generator(0, "moments")
    history = FactoredHistory(3, 5, 0.9, CPU)
    assert torch.equal(history.scales()[0], torch.ones(3))
    assert torch.equal(history.scales()[1], torch.ones(5))
    row, column = [0.0] * 3, [0.0] * 5
    for _ in range(4):
        new_row, new_column = torch.rand(3, generator=generator), torch.rand(5, generator=generator)
        history.update(new_row, new_column)
        row = [0.9 * old + 0.1 * float(new) for old, new in zip(row, new_row, strict=True)]
        column = [0.9 * old + 0.1 * float(new) for old, new in zip(column, new_column, strict=True)]
    assert history.count == 4
    for scales, moments in zip(history.scales(), (row, column), strict=True):
        mean = sum(moments) / len(moments)
        expected = [(moment / mean + 1e-4) ** -0.5 for moment in moments]
        assert torch.allclose(scales, torch.tensor(expected), rtol=1e-5)
    corrected = (sum(row) / 3 * sum(column) / 5) ** 0.5 / (1.0 - 0.9**4)
    assert float(history.size()) == pytest.approx(corrected**-0.5, rel=1e-5)


@pytest.mark.parametrize("size", [1e-12, 1e-30, 1e30])
def test_scales_do_not_depend_on_the_size_of_the_gradient(size: float) -> None:
    moments = torch.tensor([1.0, 4.0, 0.0])
    history, reference = FactoredHistory(3, 3, 0.9, CPU), FactoredHistory(3, 3, 0.9, CPU)
    history.update(size * moments, size * moments)
    reference.update(moments, moments)
    for found, expected in zip(history.scales(), reference.scales(), strict=True):
        assert torch.isfinite(found).all()
        assert torch.allclose(found, expected, rtol=1e-4)
    assert float(reference.scales()[0].max()) <= 100.0


def test_micro_batches_in_any_order() -> None:
    model, examples = tiny_model("phi3", lora=True), make_examples()
    architecture = find_architecture(model)
    expected = probe_step(make_estimator("sketch", architecture), model, examples)
    for micro_batches in ([[0, 1], [2, 3], [4]], [[4, 1], [0], [3, 2]]):
        signals = probe_step(make_estimator("sketch", architecture), model, examples, micro_batches)
        assert signals.positions.tolist() == [0, 1, 2, 3, 4]
        assert signals.gradients is None
        assert relative_error(signals.vectors, expected.vectors) < 1e-5


def test_not_all_are_probed() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("sketch", find_architecture(model))
    everyone = probe_step(estimator, model, examples).vectors
    signals = probe_step(estimator, model, examples, [[3], [1]], batch_size=7)
    assert signals.positions.tolist() == [1, 3]
    assert signals.finite.tolist() == [True] * 7
    assert relative_error(signals.vectors, everyone[[1, 3]]) < 1e-5


def test_fresh_signs_a_step_or_fixed_ones() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    every_step, fixed = make_estimator("sketch", architecture), make_estimator("sketch", architecture, every_step=False)
    fresh = [probe_step(every_step, model, examples, step=step).vectors for step in (1, 2, 1)]
    same = [probe_step(fixed, model, examples, step=step).vectors for step in (1, 2)]
    assert torch.equal(fresh[0], fresh[2])
    assert not torch.allclose(fresh[0], fresh[1], rtol=0.1)
    assert torch.equal(same[0], same[1])


def test_nothing_selected_nothing_learnt() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("sketch", find_architecture(model))
    probe_step(estimator, model, examples)
    estimator.update(coreset_of([0, 1], num_kept=2), SINGLE_PROCESS)
    assert estimator.state_dict()["count"] == 0
    assert not estimator.state_dict()["row"].any()


class OtherRank(SingleProcess):
    """An exchange with a rank whose contribution to sums is known."""

    def __init__(self, contribution: float | Tensor = 0.0) -> None:
        self.contribution = contribution
        self.seen = torch.empty(0)

    def sum(self, tensor: Tensor) -> Tensor:
        self.seen = tensor.clone()
        return tensor.add_(self.contribution)


def test_ranks_learn_together() -> None:
    """Two ranks with some examples each end up with the history of one that has all."""
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    alone, first, second = (make_estimator("sketch", architecture) for _ in range(3))
    probe_step(alone, model, examples)
    probe_step(first, model, examples, [[0, 1, 2]])
    probe_step(second, model, examples, [[3, 4]])
    coreset = coreset_of([4, 1, 2])
    alone.update(coreset, SINGLE_PROCESS)
    other = OtherRank()
    second.update(coreset, other)
    first.update(coreset, OtherRank(other.seen))
    for key in ("row", "column"):
        assert torch.allclose(first.state_dict()[key], alone.state_dict()[key], rtol=1e-5)
    assert first.state_dict()["count"] == 1


def test_resumed_estimator_goes_on_as_if_it_had_never_stopped() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    estimator = make_estimator("sketch", architecture)
    probe_step(estimator, model, examples)
    estimator.update(coreset_of([0, 2]), SINGLE_PROCESS)
    buffer = io.BytesIO()
    torch.save(estimator.state_dict(), buffer)
    resumed = make_estimator("sketch", architecture)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for step in (2, 3):
        signals = [probe_step(one, model, examples, step=step).vectors for one in (estimator, resumed)]
        assert torch.equal(*signals)
        for one in (estimator, resumed):
            one.update(coreset_of([1, 3]), SINGLE_PROCESS)
    assert resumed.state_dict()["count"] == 3
    fresh = probe_step(make_estimator("sketch", architecture), model, examples, step=3).vectors
    assert not torch.allclose(fresh, signals[0], rtol=1e-2)


def test_loading_does_not_tie_the_estimators_together() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator, resumed = (make_estimator("sketch", find_architecture(model)) for _ in range(2))
    probe_step(estimator, model, examples)
    resumed.load_state_dict(estimator.state_dict())
    estimator.update(coreset_of([0]), SINGLE_PROCESS)
    assert not resumed.state_dict()["row"].any()


def test_history_of_another_shape_is_an_error() -> None:
    estimator = make_estimator("sketch", find_architecture(tiny_model("llama", lora=True)))
    other = make_estimator("sketch", find_architecture(tiny_model("llama", lora=True, rank=8)))
    with pytest.raises(ProbeError, match="LoRA rank"):
        estimator.load_state_dict(other.state_dict())


def test_rank_without_examples_and_place_holder() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("sketch", find_architecture(model))
    estimator.begin(1, torch.tensor([], dtype=torch.int64), 0)
    assert estimator.signals(2, SINGLE_PROCESS).vectors.shape == (0, 3)
    estimator.begin(1, torch.tensor([1]), 1)
    with torch.no_grad():
        estimator.observe(trunk(model, examples[:1])[1], torch.tensor([1]), [9])
        estimator.observe(trunk(model, [])[1], torch.tensor([], dtype=torch.int64), [])
    signals = estimator.signals(3, SINGLE_PROCESS)
    assert signals.positions.tolist() == [1]
    assert signals.vectors.shape == (1, 3)


@pytest.mark.parametrize("absolute", [False, True])
def test_targets_are_sketched_as_they_are(absolute: bool) -> None:
    """Candidates are scaled by the history, targets not: products estimate those of D g_i with g_target."""
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    out, width = architecture.targets[0].out_features, architecture.targets[0].in_features
    estimator = SketchEstimator(
        architecture, CPU, num_probes=9, every_step=True, beta2=0.9, seed=0, targets_from=3, absolute=absolute
    )
    probe_step(estimator, model, examples)
    estimator.update(coreset_of([0, 2]), SINGLE_PROCESS)
    history = estimator._histories[0]
    found = probe_step(estimator, model, examples, [[0, 3], [1, 2, 4]], step=2).vectors
    rows, columns = signs_of(architecture, 9, epoch=2)
    gradients = plain_gradients(model, examples)
    row_scale, column_scale = history.scales()
    scale = torch.outer(row_scale, column_scale).double()
    moment = torch.outer(history.row, history.column).double() / (history.row.mean() * history.column.mean()).sqrt()
    moment /= 1.0 - 0.9  # corrected for the one update
    if absolute:  # D is 1 / sqrt(v) entry by entry, up to the floor of small moments, over the matrix's size
        scale = scale * float(history.size()) / (out * width) ** 0.5
        assert float((scale * (out * width * moment).sqrt()).median()) == pytest.approx(1.0, rel=0.01)
    scaled = torch.cat([gradients[:3] * scale, gradients[3:]])
    expected = torch.einsum("ko,boi,ki->bk", rows.double(), scaled, columns.double()) / 3.0
    assert relative_error(found, expected) < 1e-5
    assert float((scale - 1.0).abs().max()) > 0.1
