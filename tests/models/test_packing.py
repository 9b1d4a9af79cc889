"""Packed rows have every document's own losses and gradients, or the check at start says that a model has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.batching.packing import Packing, pack_micro_batch
from colm_ds.errors import ConfigError
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.families import FAMILIES
from colm_ds.models.packing import check_packing
from colm_ds.types import Example
from tests.attention import attention_by_documents
from tests.every_model import tiny_causal_lm
from tests.models.test_every_architecture import measured
from tests.probe.oracles import make_examples
from tests.tiny_models import tiny_model

BY_DEFAULT = ("gpt2", "gemma3_text", "mixtral", "falcon", "bloom", "opt", "bamba", "deepseek_v3")
"""Learned positions, windows, experts, ALiBi, positions from a mask, states that run on, latent values."""

WEIGHTS = torch.tensor([0.5, 1.5, 0.25, 2.0, 1.0])


def plain_losses_and_gradients(model: Any, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Loss of every example alone, and the gradient of their weighted sum."""
    losses = []
    model.zero_grad()
    for example, weight in zip(examples, WEIGHTS, strict=True):
        logits = model(input_ids=example.input_ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, example.labels[1:], ignore_index=-100, reduction="sum")
        (weight.to(loss.dtype) * loss).backward()
        losses.append(loss.detach())
    return torch.stack(losses), gradients(model)


def packed_losses_and_gradients(model: Any, examples: list[Example], row_sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The same in packed rows."""
    model.zero_grad()
    batch = pack_micro_batch(make_micro_batch(examples), row_sizes)
    losses = example_loss_sums(model, find_loss_head(model), batch)
    (losses * WEIGHTS.to(losses.dtype)).sum().backward()
    return losses.detach(), gradients(model)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def largest_error(model: Any, *layouts: list[int]) -> float:
    """The largest relative error of a loss, or of the gradient relative to its norm, in any layout of the rows."""
    examples = make_examples((7, 9, 5, 8, 6))
    losses, wanted = plain_losses_and_gradients(model, examples)
    found = []
    for row_sizes in layouts:
        sums, gradient = packed_losses_and_gradients(model, examples, row_sizes)
        found += [float(((sums - losses) / losses).abs().max()), float((gradient - wanted).norm() / wanted.norm())]
    return max(found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_float32(family: str, lora: bool, checkpointing: bool) -> None:
    model = tiny_model(family, lora).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_error(without_dropout(model), [2, 3], [5], [1, 1, 3]) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_attention_implementations(family: str, attention: str) -> None:
    model = (
        tiny_model(family, attn_implementation=attention, sliding_window=4) if family == "phi3" else tiny_model(family)
    )
    model.set_attn_implementation(attention)
    assert largest_error(model.double(), [2, 3]) < (1e-6 if attention == "eager" else 1e-12)  # softmax in float32


@pytest.mark.parametrize(
    "model_type", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in measured()]
)
def test_the_check_is_right(model_type: str) -> None:
    """A model is accepted if its packed gradients in float64 are those of the examples alone, and only then."""
    exact = without_dropout(tiny_causal_lm(model_type, torch.float64))
    try:
        is_right = largest_error(exact, [3, 2]) < 1e-6
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        is_right = False
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_causal_lm(model_type, dtype)
        if is_right:
            assert check_packing(model, "on", 24, 2) == Packing(24)
        else:
            with pytest.raises(ConfigError, match=f"colm.packing = 'on': model of type '{model.config.model_type}'"):
                check_packing(model, "on", 24, 2)


def test_chunks_begin_with_documents() -> None:
    """In Llama 4 a token sees its chunk of 4 alone, counted from the document's start."""
    model = tiny_causal_lm("llama4_text", attention_chunk_size=4, layer_types=["chunked_attention"] * 2)
    check_packing(model, "on", 48, 2)
    assert largest_error(without_dropout(model.double()), [2, 3]) < 1e-6


def test_attention_that_tells_documents_apart_in_one_row_only() -> None:
    model = tiny_model("llama", attn_implementation=attention_by_documents()).double()
    assert check_packing(model, "on", 24, 2) == Packing(24, one_row=True)
    assert check_packing(model, "on", 24, 1) == Packing(24)
    assert largest_error(model, [5]) < 1e-12
    assert largest_error(model, [2, 3]) > 1e-3


def test_reason_of_a_refusal() -> None:
    with pytest.raises(ConfigError, match=r"type 'bloom' with eager attention: a document of 8 tokens has .* behind"):
        check_packing(tiny_causal_lm("bloom"), 24, 24, 1)


class TestChecks:
    """What else it refuses, and how it leaves a model."""

    def test_a_leak_that_the_loss_in_16_bits_does_not_show(self) -> None:
        """Of a convolution over three tokens."""
        model = tiny_model("llama", dtype=torch.bfloat16)
        norm = model.model.norm

        class Mixing(nn.Module):
            def forward(self, hidden: Tensor) -> Tensor:
                hidden = norm(hidden)
                shifted = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
                return hidden + 0.3 * shifted

        check_packing(model, "on", 96, 2)
        model.model.norm = Mixing()
        with pytest.raises(ConfigError, match="other documents of a row change the loss of a token by"):
            check_packing(model, "on", 96, 2)

    def test_virtual_tokens(self) -> None:
        import peft

        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(tiny_model("llama"), config)
        with pytest.raises(ConfigError, match="PREFIX_TUNING puts virtual tokens before a row, not before each"):
            check_packing(model, "on", 24, 2)

    def test_attention_without_effect(self) -> None:
        """Nothing can be seen then, so nothing is allowed."""
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        with pytest.raises(ConfigError, match=r"its own document's earlier tokens by 0\.0e\+00"):
            check_packing(model, "on", 24, 2)

    def test_leaves_the_model_as_it_was(self) -> None:
        model = tiny_model("llama").train()
        state = torch.get_rng_state()
        check_packing(model, "on", 24, 2)
        assert model.training
        assert torch.equal(state, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_broken_model_is_for_training_to_report(self) -> None:
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(float("nan"))
        assert check_packing(model, "on", 24, 2) == Packing(24)
