"""Sketches from training's own forward and backward are those of the probe, and of autograd one example at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.batching.packing import pack_micro_batch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.probe.directions import sign_vectors
from colm_ds.probe.training_sketch import TrainingSketch
from colm_ds.randomness import private_generator
from colm_ds.types import Example
from tests.choices import random_choices
from tests.probe.oracles import CPU, layer_gradients, make_estimator, make_examples, probe_step, relative_error
from tests.tiny_models import tiny_model

K = 7
WEIGHTS = torch.tensor([0.3, 2.0, 1e-3, 0.7, 1.1]) * 1024
"""What the step multiplies summed losses with: loss weights, the mean over examples, the loss scale of fp16."""


def train(
    sketch: TrainingSketch, model: Any, examples: Sequence[Example], groups: Sequence[Sequence[int]], rows: Any = None
) -> Tensor:
    """Sketches of examples whose losses go forward and backward in micro-batches, in the order of the examples."""
    model.train()
    sketch.begin()
    head = find_loss_head(model)
    for number, group in enumerate(groups):
        micro = make_micro_batch([examples[place] for place in group])
        if rows is not None:
            micro = pack_micro_batch(micro, rows[number])
        passed = sketch.of(micro, len(group))
        weights = WEIGHTS[list(group)] if group else torch.zeros(1)
        with passed.hooked():
            sums = example_loss_sums(model, head, micro)
            passed.watch_losses(sums)
            (sums * weights).sum().backward()
        passed.finish()
    order = torch.tensor([place for group in groups for place in group]).argsort()
    return sketch.sketches()[order]


def expected(model: Any, examples: Sequence[Example], layer: str) -> Tensor:
    """Sum over matrices of a_k^T G_i b_k / sqrt(K) with autograd's G_i in float64."""
    gradients = layer_gradients(model, examples, layer)
    total, start = torch.zeros(len(examples), K, dtype=torch.float64), 0
    for place, target in enumerate(find_architecture(model, layer).targets):
        out, width = target.out_features, target.in_features
        part = gradients[:, start : start + out * width].reshape(-1, out, width)
        start += out * width
        name = str(place) if place else ""
        rows = sign_vectors(0, f"rows{name}", 0, K, out, CPU).double()
        columns = sign_vectors(0, f"columns{name}", 0, K, width, CPU).double()
        total += torch.einsum("ko,boi,ki->bk", rows, part, columns) / K**0.5
    return total


@pytest.mark.parametrize(
    ("family", "lora", "layer", "checkpointing", "groups"),
    [
        ("llama", False, "v_proj", None, [[0, 1, 2, 3, 4]]),
        ("llama", False, "qkv", False, [[3], [], [4, 0, 1], [2]]),
        ("llama", True, "v_proj", True, [[2, 1], [0, 4], [3]]),
        ("phi3", False, "v_proj", True, [[4, 1], [0, 3], [2]]),
        ("phi3", True, "v_proj", False, [[0, 1, 2, 3, 4]]),
        ("phi", False, "fc", False, [[0, 1], [4, 3, 2]]),
    ],
)
def test_equals_autograd_and_the_probe(
    family: str, lora: bool, layer: str, checkpointing: bool | None, groups: list[list[int]]
) -> None:
    """Also where layers are recomputed: by reentrant checkpointing (True) or the other kind (False)."""
    model, examples = tiny_model(family, lora), make_examples()
    wanted = expected(model, examples, layer)
    architecture = find_architecture(model, layer)
    estimator = make_estimator("sketch", architecture, num_probes=K, every_step=False, adam=False)
    probed = probe_step(estimator, model, examples).vectors
    if checkpointing is not None:
        if checkpointing:
            model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing})
    found = train(TrainingSketch(architecture, K, 0, CPU), model, examples, groups)
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) < 2e-5
    assert relative_error(found, probed) < 2e-5


def test_packed_rows_are_told_apart() -> None:
    model, examples = tiny_model("llama"), make_examples()
    wanted = expected(model, examples, "v_proj")
    sketch = TrainingSketch(find_architecture(model), K, 0, CPU)
    found = train(sketch, model, examples, [[1, 0, 4], [3, 2]], rows=[[2, 1], [2]])
    assert relative_error(found, wanted) < 2e-5


@pytest.mark.parametrize("packed", [False, True])
def test_classification_examples(packed: bool) -> None:
    model, examples = tiny_model("llama"), list(random_choices(5))
    architecture = find_architecture(model)
    estimator = make_estimator("sketch", architecture, num_probes=K, every_step=False, adam=False)
    probed = probe_step(estimator, model, examples).vectors
    sketch = TrainingSketch(architecture, K, 0, CPU)
    found = train(sketch, model, examples, [[0, 1, 2, 3, 4]], [[2, 3]] if packed else None)
    assert relative_error(found, probed) < 2e-5


def test_the_loss_weight_makes_no_difference_but_for_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_model("llama"), make_examples()
    sketch = TrainingSketch(find_architecture(model), K, 0, CPU)
    first = train(sketch, model, examples, [[0, 1, 2, 3, 4]])
    weights = 3 * torch.rand(5, generator=private_generator(0, "weights"))
    weights[2] = 0.0
    monkeypatch.setattr("tests.probe.test_training_sketch.WEIGHTS", weights)
    second = train(sketch, model, examples, [[0, 1, 2, 3, 4]])
    others = [0, 1, 3, 4]
    assert relative_error(second[others], first[others]) < 1e-5
    assert not torch.isfinite(second[2]).any()


def test_a_matrix_that_is_not_trained() -> None:
    model = tiny_model("llama")
    architecture = find_architecture(model)
    architecture.targets[0].module.weight.requires_grad_(False)
    with pytest.raises(ProbeError, match=r"'store': .*v_proj is not trained.* write \"pass\""):
        TrainingSketch(architecture, K, 0, CPU)


def test_passes_without_a_backward_are_noticed_and_leave_nothing() -> None:
    model, examples = tiny_model("llama"), make_examples()
    sketch = TrainingSketch(find_architecture(model), K, 0, CPU)
    micro = make_micro_batch(examples)
    passed = sketch.of(micro, 5)
    with passed.hooked():
        passed.watch_losses(example_loss_sums(model.train(), find_loss_head(model), micro))
    with pytest.raises(ProbeError, match=r"0 gradients passed .* where 1 should"):
        passed.finish()
    assert sketch.sketches().shape == (0, K)
    assert not any(module._forward_hooks for module in model.modules())
