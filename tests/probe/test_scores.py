"""What the baselines look at is what a plain pass over every example alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from colm_ds.models import token_loss
from colm_ds.models.families import FAMILIES
from colm_ds.probe.scores import SCORES, ScoreEstimator, confidences, el2n, gradient_norms, last_hidden, margins
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.types import Example
from tests.probe.oracles import CPU, make_examples, trunk
from tests.tiny_models import tiny_model


def plain(model: Any, example: Example) -> dict[str, Any]:
    """All scores by one unpadded forward, and autograd for the norm."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = next(reversed(base.model.layers)).self_attn
    fused = hasattr(attention, "qkv_proj")
    projection = attention.qkv_proj if fused else attention.v_proj
    weight = projection.lora_B["default"].weight if hasattr(projection, "lora_B") else projection.weight
    rows = base.config.num_key_value_heads * (base.config.hidden_size // base.config.num_attention_heads)
    weight.requires_grad_(True)
    output = model(input_ids=example.input_ids[None], output_hidden_states=True)
    logits, labels = output.logits[0, :-1].float(), example.labels[1:]
    wanted = labels != -100
    loss = F.cross_entropy(logits[wanted], labels[wanted])
    chances, targets = logits[wanted].softmax(dim=-1).detach(), labels[wanted]
    one_hot = F.one_hot(targets, chances.shape[1])
    margin = [
        row[label] - torch.cat([row[:label], row[label + 1 :]]).max()
        for row, label in zip(chances, targets, strict=True)
    ]
    (gradient,) = torch.autograd.grad(loss, weight)
    hidden = output.hidden_states[-1][0, :-1][wanted][-1]  # transformers gives the last one after the norm
    return {
        "loss": loss.detach(),
        "confidence": logits[wanted].softmax(dim=-1).amax(dim=-1).mean().detach(),
        "gradient_norm": gradient[-rows:].norm() if fused else gradient.norm(),
        "hidden": hidden.detach(),
        "margin": torch.stack(margin).mean(),
        "el2n": (one_hot - chances).norm(dim=1).mean(),
    }


def all_plain(model: Any, examples: list[Example], kind: str) -> Tensor:
    """One row per example."""
    return torch.stack([plain(model, example)[kind] for example in examples])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SCORES)
def test_scores(kind: str, family: str, lora: bool) -> None:
    model, examples = tiny_model(family, lora), make_examples()
    architecture, tail = trunk(model, examples)
    estimator = ScoreEstimator(architecture, CPU, kind)
    estimator.begin(1, torch.arange(5), 5)
    estimator.observe(tail, torch.arange(5), [len(example.input_ids) for example in examples])
    found = estimator.signals(5, SINGLE_PROCESS)
    assert found.vectors is not None
    wanted = all_plain(model, examples, kind)
    assert torch.allclose(found.vectors, wanted.reshape(5, -1), rtol=2e-5, atol=1e-5)
    assert bool(found.finite.all())


def test_several_scores_of_one_pass() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture, tail = trunk(model, examples)
    kinds = ("hidden", "gradient_norm", "margin")
    estimator = ScoreEstimator(architecture, CPU, *kinds)
    estimator.begin(1, torch.arange(5), 5)
    estimator.observe(tail, torch.arange(5), [len(example.input_ids) for example in examples])
    signals = estimator.signals(5, SINGLE_PROCESS)
    assert signals.vectors is not None
    assert signals.widths == {"hidden": 32, "gradient_norm": 1, "margin": 1}
    wanted = torch.cat([all_plain(model, examples, kind).reshape(5, -1) for kind in kinds], dim=1)
    assert torch.allclose(signals.vectors, wanted, rtol=2e-5, atol=1e-5)


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where logits come a few positions at a time."""
    model, examples = tiny_model("llama"), make_examples()
    whole = confidences(*trunk(model, examples))
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 300)
    assert torch.allclose(confidences(*trunk(model, examples)), whole, rtol=1e-6)


def test_an_example_without_labels() -> None:
    """A place holder of a rank that has nothing left."""
    examples = [*make_examples(), Example(torch.tensor([4, 5, 6]), torch.full((3,), -100), 0, 9)]
    parts = trunk(tiny_model("llama"), examples)
    for score in (confidences, el2n, gradient_norms, last_hidden, margins):
        assert float(score(*parts)[-1].detach().abs().max()) == 0
