"""Losses, signals and gradients of classification examples are those of autograd over every candidate alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.architecture import find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.probe.factors import example_gradients, gradient_factors
from colm_ds.probe.scores import confidences, el2n, gradient_norms, last_hidden, margins
from colm_ds.probe.tail import run_trunk, tail_losses
from colm_ds.types import Example
from tests.choices import plain_choice_loss, plain_scores, random_choices
from tests.probe.oracles import make_estimator, make_examples, probe_step, relative_error, signal_rows, target_weight
from tests.tiny_models import tiny_model

EXAMPLES = list(random_choices(8))
MODELS = [("llama", False), ("phi3", True), ("phi", True), ("stablelm", False)]


def plain_gradients(model: Any, examples: Sequence[Example]) -> Tensor:
    """Gradient of every example's loss for the last V projection, float64 `[n, out, in]`."""
    model = copy.deepcopy(model).eval().double()
    weight, rows = target_weight(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    return torch.stack([torch.autograd.grad(plain_choice_loss(model, one), weight)[0][rows] for one in examples])


@pytest.mark.parametrize(("family", "lora"), MODELS)
def test_losses_and_gradients(family: str, lora: bool) -> None:
    model = tiny_model(family, lora, torch.float64)
    architecture = find_architecture(model)
    batch = make_micro_batch(EXAMPLES)
    assert len(batch.input_ids) < batch.groups.sizes.numel()  # type: ignore[union-attr]  # some share a row
    expected = torch.stack([plain_choice_loss(model, one).detach() for one in EXAMPLES])
    tail = run_trunk(model, architecture, batch)
    assert torch.allclose(tail_losses(architecture, tail), expected, atol=1e-12)
    assert torch.allclose(example_loss_sums(model, find_loss_head(model), batch), expected, atol=1e-12)
    assert torch.allclose(example_loss_sums(model, None, batch), expected, atol=1e-6)
    factors = gradient_factors(architecture, tail)
    found = [example_gradients(factors, row, length) for row, length in enumerate(batch.example_lengths)]
    wanted = plain_gradients(model, EXAMPLES)
    assert relative_error(torch.stack(found), wanted) < 1e-6  # the product is taken in float32
    assert torch.allclose(gradient_norms(architecture, tail).double(), wanted.flatten(1).norm(dim=1), rtol=1e-5)


def test_gradient_of_all_parameters() -> None:
    model = tiny_model("llama", False, torch.float64)
    example_loss_sums(model, find_loss_head(model), make_micro_batch(EXAMPLES)).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for one in EXAMPLES:
        plain_choice_loss(model, one).backward()
    for name, parameter in model.named_parameters():
        assert relative_error(found[name][None], parameter.grad[None]) < 1e-6, name  # norms compute in float32


@pytest.mark.parametrize("layer", ["qkv", "fc"])
def test_other_layers(layer: str) -> None:
    """Positions that several candidates share count once in the factors of the MLP too."""
    model = tiny_model("llama", False, torch.float64)
    architecture = find_architecture(model, layer)
    batch = make_micro_batch(EXAMPLES)
    factors = gradient_factors(architecture, run_trunk(model, architecture, batch))
    found = torch.stack([example_gradients(factors, row, length) for row, length in enumerate(batch.example_lengths)])
    weights = [target.module.weight for target in architecture.targets]
    wanted = [torch.autograd.grad(plain_choice_loss(model, one), weights) for one in EXAMPLES]
    assert relative_error(found, torch.stack([torch.cat([part.flatten() for part in row]) for row in wanted])) < 1e-6


@pytest.mark.parametrize("name", ["spsa", "exact", "sketch", "projection"])
def test_signals_do_not_depend_on_micro_batches(name: str) -> None:
    model = tiny_model("llama")
    architecture = find_architecture(model)
    rows = []
    for groups in ([list(range(8))], [[5, 2], [0], [7, 1, 3], [4, 6]]):
        estimator = make_estimator(name, architecture, num_probes=8)
        rows.append(signal_rows(probe_step(estimator, model, EXAMPLES, groups)))
    assert relative_error(rows[0], rows[1]) < (1e-3 if name == "spsa" else 1e-4)  # a difference carries round-off
    if name == "exact":
        assert relative_error(rows[0], plain_gradients(model, EXAMPLES)) < 1e-4
    if name == "spsa":  # the finite difference is the gradient's product with the directions
        estimator.begin(1, torch.arange(8), 8)
        directions = estimator._directions_now()
        size = architecture.num_coordinates
        z = torch.stack([directions.direction(k).flatten()[:size] for k in range(8)]).double()
        assert relative_error(rows[0], plain_gradients(model, EXAMPLES).flatten(1) @ z.T) < 1e-2


def test_scores() -> None:
    model = tiny_model("llama", False, torch.float64)
    architecture = find_architecture(model)
    tail = run_trunk(model, architecture, make_micro_batch(EXAMPLES))
    expected = torch.stack([plain_scores(model, one).softmax(0).max().detach() for one in EXAMPLES])
    assert torch.allclose(confidences(architecture, tail).double(), expected, atol=1e-6)
    margin, error = margins(architecture, tail).detach(), el2n(architecture, tail).detach()
    for place, one in enumerate(EXAMPLES):
        chances, gold = plain_scores(model, one).softmax(0).detach().double(), one.candidates.gold  # type: ignore[union-attr]
        others = torch.cat([chances[:gold], chances[gold + 1 :]])
        one_hot = torch.eye(len(chances), dtype=torch.float64)[gold]
        assert float(margin[place]) == pytest.approx(float(chances[gold] - others.max()), abs=1e-6)
        assert float(error[place]) == pytest.approx(float((one_hot - chances).norm()), abs=1e-6)
    hidden = last_hidden(architecture, tail)
    for row, one in enumerate(EXAMPLES):
        prompt = one.input_ids[: int((one.labels != -100).nonzero()[0])]
        states = model.model(input_ids=prompt[None]).last_hidden_state[0, -1]
        assert torch.allclose(hidden[row], states.float(), atol=1e-5)


def test_ordinary_examples_are_as_they_were() -> None:
    """The sums of ordinary examples are those of their tokens, bit by bit."""
    model, batch = tiny_model("llama"), make_micro_batch(make_examples())
    assert batch.groups is None
    assert batch.by_row([4, 2]) == [4, 2]
    head = find_loss_head(model)
    losses = example_loss_sums(model, head, batch)
    logits = model(input_ids=batch.input_ids).logits[batch.rows, batch.positions]
    plain = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert torch.equal(losses, torch.zeros(5).index_add(0, batch.rows, plain))
