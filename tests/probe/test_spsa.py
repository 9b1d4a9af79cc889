"""`spsa` is the directional derivative of every example's loss, also for models in bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.architecture import find_architecture
from colm_ds.models.families import FAMILIES
from colm_ds.probe.directions import Directions
from colm_ds.probe.spsa import shifted_output, spsa_coefficients
from colm_ds.probe.tail import tail_losses
from colm_ds.selection import SINGLE_PROCESS
from tests.probe.oracles import (
    correlation,
    make_estimator,
    make_examples,
    pad_further,
    plain_gradients,
    probe_step,
    probed_gradients,
    target_weight,
    trunk,
)
from tests.tiny_models import add_lora, randomise, tiny_model

EPSILON = 1e-3


def directional_derivatives(gradients: Tensor, directions: Directions) -> Tensor:
    """g_i . z_k, float64 `[n, K]`."""
    return gradients.flatten(1) @ directions.chunk(0, directions.num_coordinates).double().T


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_directional_derivative_in_float64(family: str, lora: bool) -> None:
    model, examples = tiny_model(family, lora), make_examples()
    architecture, tail = trunk(model, examples)
    directions = Directions(0, 1, 4, architecture.targets[0].num_coordinates)
    found = spsa_coefficients(architecture, tail, directions, EPSILON)
    assert found.shape == (5, 4)
    assert found.dtype == torch.float32
    expected = directional_derivatives(plain_gradients(model, examples), directions)
    assert correlation(found, expected) > 0.999
    assert relative_difference(found, expected) < 2e-3  # round-off of a loss over 2 epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float64_tail_leaves_the_round_off_of_the_trunk_only(family: str, lora: bool, dtype: torch.dtype) -> None:
    """So that the choice does not depend on how examples are batched over ranks."""
    model, examples = tiny_model(family, lora, dtype), make_examples()
    architecture, tail = trunk(model, examples)
    directions = Directions(0, 1, 2, architecture.targets[0].num_coordinates)
    found = spsa_coefficients(architecture, tail, directions, EPSILON, torch.float64)
    assert found.dtype == torch.float32
    alone = trunk(model, examples[:1])
    again = spsa_coefficients(*alone, directions, EPSILON, torch.float64)
    if dtype == torch.float32:
        assert relative_difference(again, found[:1]) < 1e-5
        expected = directional_derivatives(plain_gradients(model, examples), directions)
        assert relative_difference(found, expected) < 5e-5  # what is left is the third derivative times epsilon squared
    single = spsa_coefficients(architecture, tail, directions, EPSILON)
    assert relative_difference(single, found) < 5e-3


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_equals_a_precise_tail_behind_the_same_trunk(family: str, lora: bool) -> None:
    model, examples = tiny_model(family, lora, torch.bfloat16), make_examples()
    architecture, tail = trunk(model, examples)
    directions = Directions(0, 1, 4, architecture.targets[0].num_coordinates)
    found = spsa_coefficients(architecture, tail, directions, EPSILON)
    upcast = find_architecture(copy.deepcopy(model).float())
    expected = directional_derivatives(probed_gradients(upcast, tail.cast(torch.float32)), directions)
    assert correlation(found, expected) > 0.999
    assert relative_difference(found, expected) < 2e-3
    whole = directional_derivatives(plain_gradients(model, examples), directions)  # the trunk in float64 too
    assert correlation(found, whole) > 0.99


def test_tail_in_bf16_would_be_noise() -> None:
    """Why the tail runs in float32: the same difference of bf16 losses has little to do with the derivative."""
    model, examples = tiny_model("llama", dtype=torch.bfloat16), make_examples()
    architecture, tail = trunk(model, examples)
    directions = Directions(0, 1, 4, architecture.targets[0].num_coordinates)
    columns = []
    for probe in range(4):
        direction = directions.direction(probe).view(architecture.targets[0].out_features, -1)
        losses = []
        for step in (EPSILON, -EPSILON):
            with torch.no_grad(), shifted_output(architecture.targets[0], direction, step):
                losses.append(tail_losses(architecture, tail))
        columns.append((losses[0] - losses[1]) / (2 * EPSILON))
    expected = directional_derivatives(plain_gradients(model, examples), directions)
    assert relative_difference(torch.stack(columns, dim=1), expected) > 0.5


def test_adapter_in_float32_on_a_bf16_model() -> None:
    """What `get_peft_model` makes of a bf16 model by default."""
    model, examples = add_lora(tiny_model("phi", dtype=torch.bfloat16), "phi"), make_examples()
    randomise(model)
    architecture, tail = trunk(model, examples)
    directions = Directions(0, 1, 4, architecture.targets[0].num_coordinates)
    found = spsa_coefficients(architecture, tail, directions, EPSILON)
    assert correlation(found, directional_derivatives(plain_gradients(model, examples), directions)) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_epsilon_matters_little(dtype: torch.dtype) -> None:
    architecture, tail = trunk(tiny_model("llama", dtype=dtype), make_examples())
    directions = Directions(0, 1, 4, architecture.targets[0].num_coordinates)
    expected = spsa_coefficients(architecture, tail, directions, EPSILON)
    for epsilon in (3e-4, 1e-2):
        assert correlation(spsa_coefficients(architecture, tail, directions, epsilon), expected) > 0.999


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("epsilon", [0.25, -0.25])
def test_shifted_output_is_the_weight_perturbed(family: str, lora: bool, epsilon: float) -> None:
    model = tiny_model(family, lora)
    architecture, tail = trunk(model, make_examples())
    target = architecture.targets[0]
    direction = Directions(0, 1, 1, target.num_coordinates).direction(0).view(target.out_features, -1)
    with torch.no_grad(), shifted_output(target, direction, epsilon):
        found = tail_losses(architecture, tail)
    perturbed = copy.deepcopy(model)
    weight, rows = target_weight(perturbed)
    with torch.no_grad():
        weight[rows] += epsilon * direction
        expected = tail_losses(find_architecture(perturbed), tail)
        unmoved = tail_losses(architecture, tail)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(found, unmoved, rtol=1e-3)


def test_output_shared_by_others_is_not_overwritten() -> None:
    """A module that gives out a tensor of its own: the shift must not change it."""
    architecture = find_architecture(tiny_model("phi3"))
    target = architecture.targets[0]
    kept = torch.zeros(1, 64)

    class Constant(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return kept

    module = Constant()
    shifted = type(target)("constant", module, target.start, target.stop, 32)
    with shifted_output(shifted, torch.ones(16, 32), 1.0):
        output = module(torch.ones(1, 32))
    assert not kept.any()
    assert output[0, : target.start].eq(0).all()
    assert output[0, target.start :].eq(32).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_coefficients_in_any_company(family: str, dtype: torch.dtype) -> None:
    model, examples = tiny_model(family, dtype=dtype), make_examples()
    directions = Directions(0, 1, 4, find_architecture(model).targets[0].num_coordinates)

    def coefficients(batch: object) -> Tensor:
        architecture, tail = trunk(model, batch)  # type: ignore[arg-type]
        return spsa_coefficients(architecture, tail, directions, EPSILON)

    together = coefficients(examples)
    others = {
        "alone": torch.cat([coefficients([example]) for example in examples]),
        "backwards": coefficients(examples[::-1]).flip(0),
        "padded": coefficients(pad_further(make_micro_batch(examples), 7, 33)),
    }
    # A bf16 trunk rounds sums of another order differently; the tail behind it does not add to that.
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for name, other in others.items():
        assert relative_difference(other, together) < tolerance, name


@pytest.mark.parametrize("num_probes", [1, 3])
def test_signals_of_a_step(num_probes: int) -> None:
    model, examples = tiny_model("phi3", lora=True), make_examples()
    architecture = find_architecture(model)
    estimator = make_estimator("spsa", architecture, num_probes=num_probes)
    signals = probe_step(estimator, model, examples, [[4, 1], [0]], batch_size=6)
    assert signals.positions.tolist() == [0, 1, 4]
    assert signals.finite.tolist() == [True] * 6
    directions = Directions(0, 1, num_probes, architecture.targets[0].num_coordinates)
    tail = trunk(model, [examples[position] for position in (0, 1, 4)])[1]
    coefficients = spsa_coefficients(architecture, tail, directions, EPSILON)
    assert relative_difference(signals.vectors, coefficients) < 2e-3
    expected = signals.vectors @ directions.chunk(0, directions.num_coordinates) / num_probes
    rows, index = torch.arange(3), torch.tensor([0, 5, 60])
    assert torch.allclose(signals.gradients.chunk(rows, 0, directions.num_coordinates), expected, atol=1e-6)
    assert torch.allclose(signals.gradients.columns(rows, index), expected[:, index], atol=1e-6)


def test_parts_of_the_steps_mean() -> None:
    """Where the step's loss is a mean over tokens, an example's slope counts by its tokens."""
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("spsa", find_architecture(model), num_probes=3)
    plain = probe_step(estimator, model, examples).vectors
    parts = torch.tensor([3.0, 1.0, 0.5, 2.0, 7.0])
    found = probe_step(estimator, model, examples, parts=parts).vectors
    assert relative_difference(found, parts[:, None] * plain) < 1e-6


def test_micro_batches_in_any_order() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    expected = probe_step(make_estimator("spsa", architecture), model, examples)
    for micro_batches in ([[0, 1], [2, 3], [4]], [[4, 1], [0], [3, 2]]):
        signals = probe_step(make_estimator("spsa", architecture), model, examples, micro_batches)
        assert torch.equal(signals.positions, expected.positions)
        assert relative_difference(signals.vectors, expected.vectors) < 2e-3


def test_one_direction_a_step_or_one_for_the_run() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    every_step, fixed = make_estimator("spsa", architecture), make_estimator("spsa", architecture, every_step=False)
    fresh = [probe_step(every_step, model, examples, step=step).vectors for step in (1, 2, 1)]
    same = [probe_step(fixed, model, examples, step=step).vectors for step in (1, 2, 9)]
    assert torch.equal(fresh[0], fresh[2])  # a step has its own, whatever came before
    assert not torch.allclose(fresh[0], fresh[1], rtol=0.1)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])


def test_direction_of_the_gradients_follows_the_step() -> None:
    """Signals of an earlier step are not read with a later step's directions."""
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("spsa", find_architecture(model))
    first = probe_step(estimator, model, examples, step=1)
    before = first.gradients.chunk(torch.arange(5), 0, 20)
    probe_step(estimator, model, examples, step=2)
    assert torch.equal(first.gradients.chunk(torch.arange(5), 0, 20), before)


def test_rank_without_examples_and_place_holder() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("spsa", find_architecture(model))
    estimator.begin(1, torch.tensor([], dtype=torch.int64), 0)
    assert estimator.signals(2, SINGLE_PROCESS).vectors.shape == (0, 3)
    tail = trunk(model, [])[1]
    estimator.begin(1, torch.tensor([1]), 1)
    with torch.no_grad():
        estimator.observe(trunk(model, examples[:1])[1], torch.tensor([1]), [9])
        estimator.observe(tail, torch.tensor([], dtype=torch.int64), [])
    signals = estimator.signals(3, SINGLE_PROCESS)
    assert signals.positions.tolist() == [1]
    assert signals.vectors.shape == (1, 3)
    assert signals.vectors.all()


def test_has_no_state() -> None:
    estimator = make_estimator("spsa", find_architecture(tiny_model("llama")))
    assert estimator.state_dict() == {}
    estimator.load_state_dict({})
