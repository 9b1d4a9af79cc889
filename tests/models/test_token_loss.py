"""Losses at labelled positions, whole or in chunks, with the same gradients and without all logits in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models import token_loss
from colm_ds.models.token_loss import sums_by_row, token_losses
from colm_ds.randomness import private_generator
from colm_ds.types import Example

VOCABULARY = 50


def inputs(count: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = private_generator(0, "token losses")
    head = nn.Linear(8, VOCABULARY, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, 8, generator=generator))
    hidden = torch.randn(count, 8, generator=generator).to(dtype)
    return head, hidden, torch.randint(0, VOCABULARY, (count,), generator=generator)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 20, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_give_the_same_losses(monkeypatch: pytest.MonkeyPatch, count: int, dtype: torch.dtype) -> None:
    head, hidden, targets = inputs(count, dtype)
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    whole = token_losses(head, hidden, targets, VOCABULARY)
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 7 * VOCABULARY)
    for losses in (whole, token_losses(head, hidden, targets, VOCABULARY)):
        assert losses.dtype == torch.float32
        assert losses.shape == (count,)
        assert torch.allclose(losses, expected, rtol=1e-6, atol=1e-6)


def test_chunks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = inputs(20)
    hidden.requires_grad_(True)
    weights = torch.linspace(0.5, 2.0, 20)

    def gradients() -> tuple[Tensor, ...]:
        loss = (weights * token_losses(head, hidden, targets, VOCABULARY)).sum()
        return torch.autograd.grad(loss, [hidden, head.weight])

    whole = gradients()
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 7 * VOCABULARY)
    for found, expected in zip(gradients(), whole, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [1 << 23, 7 * VOCABULARY, VOCABULARY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_frozen_heads_gradients_are_autograds(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, smoothing: float
) -> None:
    """Against the plain loss in one piece; in bf16 against the same head in float64."""
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", chunk)
    head, hidden, targets = inputs(20, dtype)
    head.requires_grad_(False)
    hidden.requires_grad_(True)
    weights = torch.linspace(-0.5, 2.0, 20, dtype=torch.float64)
    losses = token_losses(head, hidden, targets, VOCABULARY, smoothing, frozen=True)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (found,) = torch.autograd.grad((weights * losses).sum(), hidden)
    assert found.dtype == dtype
    exact = hidden.detach().double().requires_grad_()
    logits = F.linear(exact, head.weight.double(), head.bias.double() if head.bias is not None else None)
    plain = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    (expected,) = torch.autograd.grad((weights * plain).sum(), exact)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float((found - expected).norm() / expected.norm()) < bound
    assert torch.allclose(losses.double(), plain, rtol=bound, atol=bound)


def test_a_frozen_head_runs_once_for_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the losses are differentiated twice; nothing of the vocabulary's size is kept."""
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 4 * VOCABULARY)
    head, hidden, targets = inputs(40)
    head.requires_grad_(False)
    hidden.requires_grad_(True)
    logits: list[Any] = []

    def watched_head(part: Tensor) -> Tensor:
        output = head(part)
        logits.append(weakref.ref(output))
        return output

    gc.disable()
    try:
        losses = token_losses(watched_head, hidden, targets, VOCABULARY, frozen=True)
        assert len(logits) == 10
        assert not any(reference() is not None for reference in logits)
    finally:
        gc.enable()
    first, second = (torch.autograd.grad(losses[:3].sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first[:3].abs().sum() > 0
    assert not first[3:].any()
    assert len(logits) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_scaled_or_needs_no_gradient_is_recomputed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Small slopes are lost in fp16 unless they come scaled; a frozen model has no gradients."""
    monkeypatch.setattr(token_loss, "_FrozenHeadLosses", None)
    head, hidden, targets = inputs(8, dtype)
    head.requires_grad_(False)
    hidden.requires_grad_(dtype == torch.float16)
    assert token_losses(head, hidden, targets, VOCABULARY, frozen=True).shape == (8,)


def test_logits_of_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 4 * VOCABULARY)
    head, hidden, targets = inputs(40)
    hidden.requires_grad_(True)
    logits: list[Any] = []
    most = 0

    def watched_head(part: Tensor) -> Tensor:
        nonlocal most
        output = head(part)
        logits.append(weakref.ref(output))
        most = max(most, sum(reference() is not None for reference in logits))
        return output

    gc.disable()  # what is freed must be freed without the collector's help
    try:
        losses = token_losses(watched_head, hidden, targets, VOCABULARY)
        assert len(logits) == 10
        assert not any(reference() is not None for reference in logits)
        losses.sum().backward()
    finally:
        gc.enable()
    assert len(logits) == 20  # each computed again once
    assert most <= 2


def test_nothing_is_recomputed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 4 * VOCABULARY)
    monkeypatch.setattr(token_loss, "checkpoint", None)
    head, hidden, targets = inputs(40)
    with torch.no_grad():
        assert token_losses(head, hidden, targets, VOCABULARY).shape == (40,)


def test_recomputing_leaves_the_rng_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 4 * VOCABULARY)
    head, hidden, targets = inputs(40)
    before = torch.get_rng_state()
    token_losses(head, hidden, targets, VOCABULARY).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_vocabulary_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 10)
    head, hidden, targets = inputs(3)
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(token_losses(head, hidden, targets, VOCABULARY), expected)


def test_a_label_is_predicted_one_place_before() -> None:
    examples = [
        Example(torch.tensor([5, 6, 7, 8]), torch.tensor([-100, -100, 7, 8]), 0, 0),
        Example(torch.tensor([9, 4]), torch.tensor([9, 4]), 0, 1),  # nothing predicts the first token
        Example(torch.tensor([3, 3, 3]), torch.tensor([-100, -100, -100]), 0, 2),
    ]
    batch = make_micro_batch(examples)
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.positions.tolist() == [1, 2, 0]
    assert batch.targets.tolist() == [7, 8, 4]
    assert batch.counts.tolist() == [2.0, 1.0, 0.0]


def test_sums_by_row() -> None:
    sums = sums_by_row(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert sums.tolist() == [1.0, 0.0, 6.0, 0.0]
