"""Sketched inner products are those of plain autograd's per-example gradients; nothing of the model is touched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.errors import ProbeError
from colm_ds.models import token_loss
from colm_ds.models.architecture import find_architecture
from colm_ds.models.example_loss import find_loss_head
from colm_ds.probe.gradient_sketch import (
    LEAST_SIDE,
    SIDE,
    GradientSketch,
    fitting_side,
    is_fresh_adapter,
    trained_linears,
)
from colm_ds.types import Example
from tests.choices import plain_choice_loss, random_choices
from tests.probe.oracles import layer_gradients, make_examples
from tests.tiny_models import VOCABULARY_SIZE, add_lora, tiny_model

WIDE = 200
"""A side beyond every dimension of the tiny models."""


def plain_loss(model: Any, example: Example) -> Tensor:
    """Mean loss of one example alone, or of one decision."""
    if example.candidates is not None:
        return plain_choice_loss(model, example)
    logits = model(input_ids=example.input_ids[None]).logits[0, :-1]
    return F.cross_entropy(logits, example.labels[1:], ignore_index=-100)


def plain_rows(model: Any, examples: Sequence[Example], names: Sequence[str]) -> Tensor:
    """Gradients of every example's loss for the weights of some modules, flattened, float64 `[n, d]`."""
    weights = [model.get_submodule(name).weight for name in names]
    rows = []
    for example in examples:
        found = torch.autograd.grad(plain_loss(model, example), weights, allow_unused=True)
        parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def names_of(model: nn.Module, kind: type[nn.Module] | str = nn.Linear) -> list[str]:
    """Linear modules that must be sketched, found by name and type: trained, and not the head."""
    return [
        name
        for name, module in model.named_modules()
        if (type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind))
        and module.weight.requires_grad
        and not name.endswith("lm_head")
    ]


def token_names(model: nn.Module) -> list[str]:
    """Input embeddings and head, if they are trained; one of them, if they are one weight."""
    base: Any = model
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        ends.pop()
    by_module = {module: name for name, module in model.named_modules()}
    return [by_module[end] for end in ends if end.weight.requires_grad]


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_wide_sketch_has_the_inner_products(family: str, lora: bool) -> None:
    if family == "gpt2" and lora:
        pytest.skip("no LoRA targets are known")
    model = tiny_model(family, lora).double()
    names = names_of(model, "Conv1D" if family == "gpt2" else nn.Linear)
    assert [linear.name for linear in trained_linears(model)] == names
    examples = make_examples()
    sketch = GradientSketch(model, 0, WIDE)
    rows = sketch.rows(make_micro_batch(examples))
    plain = plain_rows(model, examples, [*names, *token_names(model)])
    assert rows.shape == plain.shape
    assert torch.allclose(rows @ rows.T, plain @ plain.T, rtol=1e-9, atol=1e-12)
    layers = rows[:, : sketch.num_of_linears]
    plain_layers = plain_rows(model, examples, names)
    assert torch.allclose(layers @ layers.T, plain_layers @ plain_layers.T, rtol=1e-9, atol=1e-12)


def test_classification_sums_the_candidates() -> None:
    model = tiny_model("llama").double()
    choices = random_choices(5)
    examples = [choices[index] for index in range(5)]
    rows = GradientSketch(model, 0, WIDE).rows(make_micro_batch(examples))
    plain = plain_rows(model, examples, [*names_of(model), *token_names(model)])
    # Rotary embeddings are in float32, and those of another length differ in the last digit.
    assert float((rows @ rows.T - plain @ plain.T).abs().max() / (plain @ plain.T).abs().max()) < 1e-6


def test_a_narrow_sketch_is_unbiased() -> None:
    """Over many draws the mean of the inner products is the true one, within four of its standard errors."""
    model, examples = tiny_model("llama").double(), make_examples()
    micro = make_micro_batch(examples)
    plain = plain_rows(model, examples, [*names_of(model), *token_names(model)])
    true = plain @ plain.T
    found = []
    for seed in range(60):
        rows = GradientSketch(model, seed, 12).rows(micro)
        found.append(rows @ rows.T)
    grams = torch.stack(found)
    error = (grams.mean(dim=0) - true).abs() / (grams.std(dim=0) / len(found) ** 0.5)
    assert float(error.max()) < 4.0
    assert float(grams.std(dim=0).max() / true.max()) > 0.01  # it is a sketch
    correlations = [float(torch.corrcoef(torch.stack([gram.flatten(), true.flatten()]))[0, 1]) for gram in grams]
    assert min(correlations) > 0.9


def test_whole_gradients_come_from_the_same_pass() -> None:
    examples = make_examples()
    for model in (tiny_model("llama"), tiny_model("phi3"), tiny_model("llama", lora=True)):
        expected = layer_gradients(model, examples, "v_proj")
        targets = find_architecture(model).targets
        sketch = GradientSketch(model.double(), 0, 12, exact=targets)
        rows, exact = sketch.with_exact(make_micro_batch(examples))
        assert torch.allclose(exact, expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(rows, GradientSketch(model, 0, 12).rows(make_micro_batch(examples)))


def test_micro_batches_do_not_matter() -> None:
    model, examples = tiny_model("mistral"), make_examples()
    sketch = GradientSketch(model, 0, 12)
    whole = sketch.rows(make_micro_batch(examples))
    alone = torch.cat([sketch.rows(make_micro_batch([example])) for example in examples])
    assert whole.dtype == torch.float32
    assert torch.allclose(whole, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Sketches are in float32; gradients of fp16 do not underflow where an example has many tokens."""
    model, examples = tiny_model("llama"), make_examples((120, 60))
    wanted = GradientSketch(model, 0, 12).rows(make_micro_batch(examples))
    rows = GradientSketch(model.to(dtype), 0, 12).rows(make_micro_batch(examples))
    assert rows.dtype == torch.float32
    assert float(F.cosine_similarity(rows, wanted).min()) > 0.99
    assert float((rows.norm(dim=1) / wanted.norm(dim=1) - 1.0).abs().max()) < 0.05


def test_fresh_lora_has_b_only() -> None:
    fresh = add_lora(tiny_model("llama"), "llama")
    assert is_fresh_adapter(fresh)
    names = [linear.name for linear in trained_linears(fresh)]
    assert names
    assert all("lora_B" in name for name in names)
    trained = tiny_model("llama", lora=True)
    assert not is_fresh_adapter(trained)
    later = [linear.name for linear in trained_linears(trained)]
    assert len(later) == 2 * len(names)
    assert set(names) < set(later)
    assert not is_fresh_adapter(tiny_model("llama"))


def snapshot(model: nn.Module) -> list[Any]:
    """What must be as before: hooks, forwards, modes, gradients, weights."""
    modules = [(len(m._forward_hooks), "forward" in m.__dict__, m.training) for m in model.modules()]
    return [modules, [p.grad for p in model.parameters()], [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("lora", [False, True])
def test_nothing_is_touched(lora: bool) -> None:
    """Not even where a module raises in the middle; dropout and checkpointing are off meanwhile and on again after."""
    model = tiny_model("llama", lora, attention_dropout=0.3).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    plain = copy.deepcopy(model).eval()
    seen: list[object] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(seen.append)
    before, random = snapshot(model), torch.get_rng_state()
    micro = make_micro_batch(make_examples())
    rows = GradientSketch(model, 0, 12).rows(micro)
    assert torch.equal(rows, GradientSketch(plain, 0, 12).rows(micro))
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    sketch, norm = GradientSketch(model, 0, 12), find_architecture(model).norm

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = norm.register_forward_hook(fail)
    during = snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        sketch.rows(micro)
    assert snapshot(model) == during
    handle.remove()
    assert not seen
    assert torch.equal(sketch.rows(micro), rows)


def test_frozen_layers_below() -> None:
    model = tiny_model("llama").double()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    examples = make_examples()
    rows = GradientSketch(model, 0, WIDE).rows(make_micro_batch(examples))
    plain = plain_rows(model, examples, names_of(model))
    assert all("layers.1." in name for name in names_of(model))
    assert torch.allclose(rows @ rows.T, plain @ plain.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", [("head",), ("embeddings",), ("embeddings", "head")], ids="+".join)
@pytest.mark.parametrize("kind", ["llama", "tied", "processed logits", "scaled embeddings", "padding", "long"])
def test_token_matrices_alone(trained: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied or not, with scaled logits or embeddings, with padding inside, and with logits in several chunks."""
    if kind == "processed logits":
        model = tiny_model("granite", logits_scaling=2.0).double()
        assert find_loss_head(model) is None
    elif kind == "scaled embeddings":
        model = tiny_model("gemma").double()
        assert type(model.get_input_embeddings()).forward is not nn.Embedding.forward
    elif kind == "padding":
        model = tiny_model("llama", tie_word_embeddings=len(trained) == 1).double()
        model.get_input_embeddings().padding_idx = int(make_examples()[0].input_ids[1])
    else:
        model = tiny_model("llama", tie_word_embeddings=kind == "tied").double()
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 7 * VOCABULARY_SIZE if kind == "long" else 1 << 23)
    model.requires_grad_(False)
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    for name in trained:
        ends[name].weight.requires_grad_(True)
    examples = make_examples()
    sketch = GradientSketch(model, 0, WIDE)
    assert len(sketch.tokens) == len({ends[name].weight for name in trained})
    rows = sketch.rows(make_micro_batch(examples))
    plain = plain_rows(model, examples, token_names(model))
    assert torch.allclose(rows @ rows.T, plain @ plain.T, rtol=1e-9, atol=1e-12)


def test_embeddings_that_are_more_than_rows_are_left_out() -> None:
    class Normed(nn.Embedding):
        def forward(self, input_ids: Tensor) -> Tensor:
            return F.layer_norm(super().forward(input_ids), (self.embedding_dim,))

    model = tiny_model("llama")
    normed = Normed(VOCABULARY_SIZE, 32)
    model.set_input_embeddings(normed)
    sketch = GradientSketch(model, 0)
    assert [matrix.name for matrix in sketch.tokens] == ["head"]
    assert sketch.left_out == ["model.embed_tokens.weight"]
    model.lm_head.weight = normed.weight
    assert GradientSketch(model, 0).tokens == []


def test_within_autocast() -> None:
    model, micro = tiny_model("llama"), make_micro_batch(make_examples())
    wanted = GradientSketch(model, 0, 12).rows(micro)
    with torch.autocast("cpu", torch.bfloat16):
        rows = GradientSketch(model, 0, 12).rows(micro)
    assert rows.dtype == torch.float32
    assert float(F.cosine_similarity(rows, wanted).min()) > 0.99


class _Experts(nn.Module):
    """A model whose linear module sees some tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, 8)
        self.expert = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY_SIZE)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embedding(input_ids)
        routed = input_ids % 2 == 0
        hidden = hidden.index_put((routed,), self.expert(hidden[routed]))
        return type("Output", (), {"logits": self.head(hidden)})


def test_what_can_not_be_sketched_is_named() -> None:
    with pytest.raises(ProbeError, match=r"expert: sees .* cannot be told apart by example"):
        GradientSketch(_Experts(), 0).rows(make_micro_batch(make_examples()))
    model = tiny_model("llama")
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ProbeError, match="no linear module, no input embeddings and no head have a trained weight"):
        GradientSketch(model, 0)
    cut = tiny_model("llama")
    cut.model.norm.weight.ds_id = 1
    with pytest.raises(ProbeError, match="ZeRO-3 partitions the weights"):
        GradientSketch(cut, 0)


def test_the_side_fits_the_table() -> None:
    model = tiny_model("llama")
    assert fitting_side(model, 100) == SIDE
    per_example = 4 * GradientSketch(model, 0, 20).width
    assert fitting_side(model, (1 << 30) // per_example) == 20
    assert fitting_side(model, 1 << 30) == LEAST_SIDE
