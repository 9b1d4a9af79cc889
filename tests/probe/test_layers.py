"""QKV and the MLP's output instead of V: every signal is that of plain autograd for these matrices, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colm_ds.errors import ProbeError
from colm_ds.models.architecture import find_architecture
from colm_ds.models.families import FAMILIES
from colm_ds.probe.directions import Directions, LowRankDirections, sign_vectors
from colm_ds.probe.parameters import reading_parameters
from colm_ds.probe.scores import gradient_norms
from colm_ds.probe.spsa import spsa_coefficients
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.types import Coreset
from tests.probe.oracles import (
    CPU,
    layer_gradients,
    make_estimator,
    make_examples,
    probe_step,
    relative_error,
    signal_rows,
    trunk,
)
from tests.tiny_models import add_lora, randomise, tiny_model

LAYERS = ("qkv", "fc")


def model_of(family: str, lora: bool, layer: str) -> Any:
    """A tiny model, under LoRA with the probed modules among its targets."""
    if not lora or layer == "qkv":
        return tiny_model(family, lora)
    targets = sorted({*FAMILIES[family].lora_targets, FAMILIES[family].output_projection})
    model = add_lora(tiny_model(family), family, target_modules=targets)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_signals_are_those_of_autograd(layer: str, family: str, lora: bool) -> None:
    model, examples = model_of(family, lora, layer), make_examples()
    architecture = find_architecture(model, layer)
    expected = layer_gradients(model, examples, layer)
    assert architecture.num_coordinates == expected.shape[1]
    assert len(architecture.targets) == (3 if layer == "qkv" and family != "phi3" else 1)

    found = signal_rows(probe_step(make_estimator("exact", architecture), model, examples))
    assert relative_error(found, expected) < 1e-5

    norms = gradient_norms(architecture, trunk(model, examples)[1])
    assert torch.allclose(norms.double(), expected.norm(dim=1), rtol=1e-4)

    directions = Directions(0, 1, 2, architecture.num_coordinates)
    coefficients = spsa_coefficients(architecture, trunk(model, examples)[1], directions, 1e-3, torch.float64)
    assert relative_error(coefficients, expected @ directions.chunk(0, expected.shape[1]).T.double()) < 1e-3

    sketch = probe_step(make_estimator("sketch", architecture, num_probes=5), model, examples).vectors
    parts, offset = [], 0
    for place, target in enumerate(architecture.targets):
        suffix = str(place or "")
        rows = sign_vectors(0, f"rows{suffix}", 1, 5, target.out_features, CPU).double()
        columns = sign_vectors(0, f"columns{suffix}", 1, 5, target.in_features, CPU).double()
        block = expected[:, offset : offset + target.num_coordinates].view(-1, target.out_features, target.in_features)
        parts.append(torch.einsum("ko,boi,ki->bk", rows, block, columns) / 5**0.5)
        offset += target.num_coordinates
    assert relative_error(sketch, torch.stack(parts).sum(dim=0)) < 1e-4


def test_sketch_of_several_matrices_keeps_inner_products() -> None:
    """On average over many signs, also between matrices: nothing of one is mistaken for the other."""
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model, "qkv")
    gradients = layer_gradients(model, examples, "qkv")
    vectors = probe_step(make_estimator("sketch", architecture, num_probes=20000), model, examples).vectors.double()
    expected = gradients @ gradients.T
    scale = expected.diagonal().sqrt()
    assert float(((vectors @ vectors.T - expected) / scale[:, None] / scale).abs().max()) < 0.1


def test_sketch_history_has_a_part_for_every_matrix() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model, "qkv")
    estimator = make_estimator("sketch", architecture)
    probe_step(estimator, model, examples)
    estimator.update(Coreset(torch.tensor([0, 3]), torch.ones(2)), SINGLE_PROCESS)
    state = estimator.state_dict()
    assert len(state["row"]) == sum(target.out_features for target in architecture.targets)
    resumed = make_estimator("sketch", architecture)
    resumed.load_state_dict(state)
    found = [probe_step(one, model, examples, step=2).vectors for one in (estimator, resumed)]
    assert torch.equal(*found)
    fresh = probe_step(make_estimator("sketch", architecture), model, examples, step=2).vectors
    assert not torch.allclose(fresh, found[0], rtol=1e-2)
    with pytest.raises(ProbeError, match="probe layer"):
        make_estimator("sketch", find_architecture(model)).load_state_dict(state)


@pytest.mark.parametrize("layer", ["v_proj", *LAYERS])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_directions(rank: int, layer: str) -> None:
    """Each matrix of z has that rank, chunks and columns are parts of it, and c is the derivative along it."""
    model, examples = tiny_model("llama"), make_examples()
    architecture, tail = find_architecture(model, layer), trunk(model, examples)[1]
    shapes = [(target.out_features, target.in_features) for target in architecture.targets]
    directions = LowRankDirections(0, 1, 2, shapes, rank)
    d = architecture.num_coordinates
    assert directions.num_coordinates == d
    whole = torch.stack([directions.direction(probe) for probe in range(2)])
    for z in whole:
        for part, shape in zip(z.split([rows * columns for rows, columns in shapes]), shapes, strict=True):
            assert int(torch.linalg.matrix_rank(part.view(shape).double(), rtol=1e-5)) == rank
    assert 0.5 < float(whole.var()) < 2.0
    assert torch.allclose(directions.chunk(0, d), whole, atol=1e-6)
    assert torch.allclose(directions.chunk(7, d - 3), whole[:, 7 : d - 3], atol=1e-6)
    index = torch.arange(2, d, 5)
    assert torch.allclose(directions.columns(index), whole[:, index], atol=1e-6)
    assert not torch.allclose(LowRankDirections(0, 2, 2, shapes, rank).direction(0), whole[0], atol=0.1)
    found = spsa_coefficients(architecture, tail, directions, 1e-3, torch.float64)
    assert relative_error(found, layer_gradients(model, examples, layer) @ whole.T.double()) < 1e-3


@pytest.mark.parametrize(
    ("family", "targets", "layer", "said"),
    [
        ("llama", None, "fc", "down_proj of the last layer has no LoRA adapter"),
        (
            "stablelm",
            None,
            "fc",
            "Add down_proj to lora.targets (and the last layer to layers_",
        ),
        ("llama", ["q_proj", "v_proj"], "qkv", "k_proj of the last layer has no LoRA adapter"),
        ("phi3", ["o_proj"], "qkv", "qkv_proj of the last layer has no LoRA adapter"),
        ("phi", ["fc1"], "fc", "fc2 of the last layer has no LoRA adapter"),
    ],
)
def test_not_among_the_adapted_modules(family: str, targets: list[str] | None, layer: str, said: str) -> None:
    settings = {} if targets is None else {"target_modules": targets}
    model = add_lora(tiny_model(family), family, **settings)
    with pytest.raises(ProbeError) as caught:
        find_architecture(model, layer)
    assert said in str(caught.value)


def test_a_layer_without_the_module() -> None:
    model = tiny_model("llama")
    del model.model.layers[-1].mlp.down_proj
    with pytest.raises(ProbeError, match=r"has no mlp.down_proj; the probe of 'fc' reads it"):
        find_architecture(model, "fc")


@pytest.mark.parametrize("layer", ["v_proj", *LAYERS])
@pytest.mark.parametrize("forward", [False, True], ids=["nothing probed", "probed"])
def test_parameters_are_read(forward: bool, layer: str) -> None:
    model, examples = tiny_model("phi3"), make_examples()
    architecture = find_architecture(model, layer)
    with reading_parameters(architecture.targets) as parameters:
        if forward:
            probe_step(make_estimator("exact", architecture), model, examples)
    weight = architecture.targets[0].module.weight[architecture.targets[0].start :]
    assert torch.equal(parameters(), weight.detach().flatten())
    assert not any(target.module._forward_pre_hooks for target in architecture.targets)
