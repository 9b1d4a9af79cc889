"""`projection`: what it hands out are random projections of the gradients, in Adam's geometry or plain."""

from __future__ import annotations

import torch
from torch import Tensor

from colm_ds.models.architecture import find_architecture
from colm_ds.probe.directions import Directions
from colm_ds.probe.projection import project
from colm_ds.selection import SINGLE_PROCESS, AdamHistory, DenseGradients
from colm_ds.types import Coreset
from tests.probe.oracles import make_estimator, make_examples, plain_gradients, probe_step, relative_error
from tests.selection.oracles import randn
from tests.tiny_models import tiny_model


def coreset_of(positions: list[int], num_kept: int = 0) -> Coreset:
    return Coreset(torch.tensor(positions), torch.ones(len(positions)), num_kept)


def normalised(gradients: Tensor, m: Tensor, v: Tensor, count: int) -> Tensor:
    """Adam's step of every row after `count` updates of m and v, in float64."""
    first, second = 1 - 0.9 ** (count + 1), 1 - 0.999 ** (count + 1)
    mhat = (0.9 * m + 0.1 * gradients) / first
    return mhat / (((0.999 * v + 0.001 * gradients.square()) / second).sqrt() + 1e-8)


def test_equals_the_projection_of_autograd() -> None:
    """Before and after the history has learnt from two selected examples, the first kept one left out."""
    model, examples = tiny_model("llama", lora=True), make_examples()
    architecture = find_architecture(model)
    d = architecture.num_coordinates
    gradients = plain_gradients(model, examples).flatten(1)
    z = {step: Directions(0, step, 7, d).chunk(0, d).T.double() / 7**0.5 for step in (1, 2)}

    plain = make_estimator("projection", architecture, num_probes=7, adam=False)
    assert relative_error(probe_step(plain, model, examples).vectors, gradients @ z[1]) < 1e-5
    plain.update(coreset_of([0]), SINGLE_PROCESS)
    assert relative_error(probe_step(plain, model, examples, step=2).vectors, gradients @ z[2]) < 1e-5
    assert plain.state_dict() == {}

    adam = make_estimator("projection", architecture, num_probes=7)
    zero = torch.zeros(d, dtype=torch.float64)
    # At t = 1 every |u| is 1 but for eps: signs of entries near 0 may differ, hence the loose bound.
    assert relative_error(probe_step(adam, model, examples).vectors, normalised(gradients, zero, zero, 0) @ z[1]) < 2e-2
    adam.update(coreset_of([4, 1, 3], num_kept=1), SINGLE_PROCESS)
    chosen = gradients[[1, 3]]
    m, v = 0.1 * chosen.mean(dim=0), 0.001 * chosen.square().mean(dim=0)
    found = probe_step(adam, model, examples, step=2).vectors
    assert relative_error(found, normalised(gradients, m, v, 1) @ z[2]) < 1e-3

    resumed = make_estimator("projection", architecture, num_probes=7)
    resumed.load_state_dict(adam.state_dict())
    assert torch.equal(probe_step(resumed, model, examples, step=2).vectors, found)


def test_one_direction_set_for_the_run() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("projection", find_architecture(model), every_step=False, adam=False)
    assert torch.equal(*(probe_step(estimator, model, examples, step=step).vectors for step in (1, 2)))


def test_distances_are_kept() -> None:
    """Johnson and Lindenstrauss: within a few times 1 / sqrt(K)."""
    matrix = randn(12, 20000, seed=0) * torch.linspace(0.5, 2, 12)[:, None]
    found = project(DenseGradients(matrix), Directions(0, 1, 400, 20000), None)
    ratio = torch.pdist(found) / torch.pdist(matrix)
    assert 0.8 < float(ratio.min()) < 1 < float(ratio.max()) < 1.2


def test_in_parts_as_in_one() -> None:
    matrix, history = randn(5, 40000, seed=1), AdamHistory(40000)
    history.update(DenseGradients(randn(3, 40000, seed=2)), torch.arange(3), 3, SINGLE_PROCESS)
    directions = Directions(0, 1, 6, 40000)
    whole = history.normalise(matrix.clone(), slice(None)) @ directions.chunk(0, 40000).T / 6**0.5
    assert torch.allclose(project(DenseGradients(matrix), directions, history), whole, rtol=1e-4, atol=1e-3)
    assert project(DenseGradients(matrix[:0]), directions, history).shape == (0, 6)


def test_ranks_learn_together() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    alone, part = (make_estimator("projection", architecture) for _ in range(2))
    probe_step(alone, model, examples)
    probe_step(part, model, examples, [[3, 4]])
    alone.update(coreset_of([4, 3]), SINGLE_PROCESS)
    part.update(coreset_of([4, 3]), SINGLE_PROCESS)  # all of the selected are this rank's
    for key in ("m", "v"):
        assert torch.allclose(part.state_dict()[key], alone.state_dict()[key], rtol=1e-4, atol=1e-6)
