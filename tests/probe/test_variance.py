"""The variance of random subsets is the average over all of them, and the coreset's its own."""

from __future__ import annotations

import itertools

import pytest
import torch

from colm_ds.probe.variance import GradientVariance
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.types import Coreset, LargeBatch
from tests.probe.oracles import CPU, make_examples, plain_gradients, trunk
from tests.tiny_models import tiny_model


def measure(coreset: Coreset, *, broken: bool = False) -> dict[str, float] | None:
    examples = make_examples()
    model = tiny_model("llama")
    if broken:
        with torch.no_grad():
            model.get_input_embeddings().weight[examples[4].input_ids[2]] = torch.nan
    architecture, tail = trunk(model, examples)
    size = torch.zeros(5, dtype=torch.int64)
    batch = LargeBatch(1, size, size, size, size, size, {})
    measured = GradientVariance(architecture, batch, coreset, CPU)
    measured.observe(tail, torch.arange(5), [len(example.input_ids) for example in examples])
    return measured.result(SINGLE_PROCESS)


def test_average_over_all_subsets() -> None:
    gradients = plain_gradients(tiny_model("llama"), make_examples()).flatten(1)
    mean = gradients.mean(dim=0)
    scale = float(mean.square().sum())

    def error(places: tuple[int, ...]) -> float:
        return float((gradients[list(places)].mean(dim=0) - mean).square().sum()) / scale

    for b in (1, 2, 4, 5):
        subsets = list(itertools.combinations(range(5), b))
        found = measure(Coreset(torch.arange(b), torch.ones(b)))
        assert found is not None
        assert found["random"] == pytest.approx(sum(map(error, subsets)) / len(subsets), rel=1e-4, abs=1e-9)
        assert found["coreset"] == pytest.approx(error(tuple(range(b))), rel=1e-4, abs=1e-9)


def test_weights_count() -> None:
    gradients = plain_gradients(tiny_model("llama"), make_examples()).flatten(1)
    mean = gradients.mean(dim=0)
    found = measure(Coreset(torch.tensor([3, 0]), torch.tensor([1.5, 0.5])))
    expected = (1.5 * gradients[3] + 0.5 * gradients[0]) / 2 - mean
    assert found is not None
    assert found["coreset"] == pytest.approx(float(expected.square().sum() / mean.square().sum()), rel=1e-4)


def test_gradients_that_are_not_finite_are_left_out() -> None:
    found = measure(Coreset(torch.arange(4), torch.ones(4)), broken=True)
    assert found is None or all(value >= 0 for value in found.values())
    assert measure(Coreset(torch.tensor([4]), torch.ones(1)), broken=True) is None  # nothing is left to compare
