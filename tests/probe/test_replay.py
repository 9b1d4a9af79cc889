"""Replay against ordinary checkpointing: the same gradients from stored hidden states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, Starcoder2Config

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.architecture import find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.patch import eval_mode, patched_forwards
from colm_ds.probe.replay import ReplayStore, why_not_replay
from colm_ds.probe.tail import run_trunk
from colm_ds.types import Example
from tests.tiny_models import add_lora, randomise, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "phi", "phi3", "stablelm")


def examples_of(lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 90, (length,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        examples.append(Example(ids, labels, 0, index))
    return examples


def checkpointed(family: str, *, lora_dropout: float = 0.0, **options: Any) -> nn.Module:
    model = tiny_model(family, **options)
    if lora_dropout:
        randomise(model := add_lora(tiny_model(family), family, lora_dropout=lora_dropout))
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model.train()


def record(model: nn.Module, examples: list[Example], groups: list[list[int]], seed: int = 0) -> ReplayStore:
    architecture = find_architecture(model)
    store = ReplayStore(architecture, seed=seed)
    store.begin(step=1)
    with eval_mode(model), torch.no_grad():
        for group in groups:
            chosen = [examples[position] for position in group]
            with store.recording(group, [len(example.input_ids) for example in chosen]):
                run_trunk(model, architecture, make_micro_batch(chosen))
    return store


def gradients(
    model: nn.Module, examples: list[Example], groups: list[list[int]], store: ReplayStore | None
) -> list[Tensor]:
    model.zero_grad()
    head = find_loss_head(model)
    for group in groups:
        with ExitStack() as stack:
            if store is not None:
                stack.enter_context(store.replaying(group))
            batch = make_micro_batch([examples[position] for position in group])
            (example_loss_sums(model, head, batch) / batch.counts).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_checkpointing(family: str, lora: bool, attention: str) -> None:
    model = checkpointed(family, lora=lora, attn_implementation=attention)
    examples = examples_of([14, 12, 9, 9, 7, 5])
    plan = [[0, 2, 4], [1, 5]]
    expected = gradients(model, examples, plan, None)
    store = record(model, examples, [[0, 1], [2, 3, 4], [5]])
    store.keep([0, 1, 2, 4, 5])
    actual = gradients(model, examples, plan, store)
    assert len(actual) == len(expected) > 0
    largest = max(float(b.abs().max()) for b in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * largest)  # other batches, other round-off


def test_difference_is_zero_when_the_micro_batches_are_the_same() -> None:
    model = checkpointed("llama", lora=True)
    examples = examples_of([12, 12, 9, 8])
    plan = [[0, 1], [2, 3]]
    expected = gradients(model, examples, plan, None)
    actual = gradients(model, examples, plan, record(model, examples, plan))
    assert max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)) == 0.0


def test_no_layer_but_the_last_runs_forward_before_the_backward_pass() -> None:
    model = checkpointed("llama")
    architecture = find_architecture(model)
    calls: list[int] = []
    for number, layer in enumerate(architecture.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))  # type: ignore[union-attr]
    examples = examples_of([9, 8])
    store = record(model, examples, [[0, 1]])
    calls.clear()
    batch = make_micro_batch(examples)
    with store.replaying([0, 1]):
        loss = example_loss_sums(model, find_loss_head(model), batch).sum()
        assert calls == [len(architecture.layers) - 1]
        loss.backward()
    assert sorted(calls) == list(range(len(architecture.layers)))  # each layer once in all


def test_dropout_is_drawn_again_in_the_recomputation() -> None:
    """Against autograd through a plain forward in which the same masks are applied."""
    model = checkpointed("llama", lora=True, lora_dropout=0.3)
    examples = examples_of([11, 9, 8, 6])
    store = record(model, examples, [[0, 3], [1, 2]], seed=5)
    plan = [[1, 3], [0, 2]]
    store.keep([0, 1, 2, 3])
    last = find_architecture(model).last_layer
    for module in last.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the last layer is not replayed: its dropout is torch's own
    actual = gradients(model, examples, plan, store)

    model.zero_grad()
    head = find_loss_head(model)
    for layer in find_architecture(model).layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    for group in plan:
        masked = {module: masked_by(store, group, module) for module in store._dropouts}
        batch = make_micro_batch([examples[position] for position in group])
        with patched_forwards(masked):
            (example_loss_sums(model, head, batch) / batch.counts).sum().backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def masked_by(store: ReplayStore, group: list[int], module: nn.Dropout) -> Callable[[Tensor], Tensor]:
    """Dropout by the masks of the probe, row by row; none at padding."""

    def drop(hidden: Tensor) -> Tensor:
        mask = torch.ones_like(hidden)
        for row, position in enumerate(group):
            place = store._places[position, 0]
            whole = store._mask(place.micro_batch, module, hidden)
            mask[row, : place.length] = whole[place.row, : place.length]
        return hidden * mask

    return drop


def test_masks_drop_the_asked_for_share_and_differ_between_steps() -> None:
    model = checkpointed("llama", lora=True, lora_dropout=0.25)
    store = record(model, examples_of([60, 60]), [[0, 1]])
    module = next(iter(store._dropouts))
    like = torch.zeros(2, 60, 32)
    first = store._mask(0, module, like)
    store._step = 2
    second = store._mask(0, module, like)
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.03
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.75]))


def test_memory_of_what_is_not_selected_is_freed() -> None:
    model = checkpointed("llama")
    store = record(model, examples_of([10] * 8), [[0, 1, 2, 3], [4, 5, 6, 7]])
    before = store.num_bytes
    store.keep([1, 6])
    assert store.num_bytes == before // 4
    assert store.has([1, 6])
    assert not store.has([0])
    assert not store.has([])


def test_everything_is_restored_when_a_forward_raises() -> None:
    model = checkpointed("llama", lora=True, lora_dropout=0.1)
    examples = examples_of([9, 8])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    store = record(model, examples, [[0, 1]])
    before = [set(module.__dict__) for module in model.modules()]
    functions = [layer._gradient_checkpointing_func for layer in find_architecture(model).layers]
    with pytest.raises(RuntimeError, match="boom"), store.replaying([0, 1]):
        raise RuntimeError("boom")
    assert [set(module.__dict__) for module in model.modules()] == before
    assert [layer._gradient_checkpointing_func for layer in find_architecture(model).layers] == functions
    assert all(layer.gradient_checkpointing for layer in find_architecture(model).layers)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_reasons_against_replay() -> None:
    model = tiny_model("llama")
    assert "activation checkpointing is off" in str(why_not_replay(find_architecture(model)))
    model = checkpointed("llama", attention_dropout=0.1)
    assert "attention_dropout" in str(why_not_replay(find_architecture(model)))
    model = checkpointed("phi", embd_pdrop=0.1)
    assert "outside the decoder layers" in str(why_not_replay(find_architecture(model)))
    assert why_not_replay(find_architecture(checkpointed("phi", resid_pdrop=0.1))) is None  # a module in the layer
    assert why_not_replay(find_architecture(checkpointed("llama"))) is None


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (OPTConfig, {"dropout": 0.1, "ffn_dim": 64}, "dropout is 0.1"),
        (OPTConfig, {"dropout": 0.0, "layerdrop": 0.2, "ffn_dim": 64}, "layerdrop is 0.2"),
        (OPTConfig, {"dropout": 0.0, "ffn_dim": 64}, None),
        (Starcoder2Config, {"residual_dropout": 0.3}, "residual_dropout is 0.3"),
        (Starcoder2Config, {"embedding_dropout": 0.3}, "embedding_dropout is 0.3"),
        (Starcoder2Config, {}, None),
        (GPT2Config, {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.1}, "attn_pdrop is 0.1"),
        (GPT2Config, {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}, None),
    ],
)
def test_dropout_that_is_no_module(kind: type, settings: dict[str, Any], said: str | None) -> None:
    """A forward that draws its own masks is refused, and one without is not: two replays say which agree."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **settings))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    reason = why_not_replay(find_architecture(model))
    assert reason is None if said is None else said in str(reason)
    if "layerdrop" in settings:
        return  # layers that are left out may be the same twice
    examples = examples_of([9, 8])
    twice = [gradients(model, examples, [[0, 1]], record(model, examples, [[0, 1]])) for _ in range(2)]
    same = all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*twice, strict=True))
    assert same == (said is None)
