"""A probe leaves the model and the process as they were, whatever the model, the mode, and also when it fails."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from colm_ds.models.architecture import find_architecture
from tests.probe.oracles import ESTIMATORS, make_estimator, make_examples, probe_step, signal_rows
from tests.tiny_models import add_lora, randomise, tiny_model

BACKENDS: Any = torch.backends
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert after the block, also if it raised, that nothing of the model and no global state has changed."""
    before = state_of(model)
    try:
        yield
    finally:
        after = state_of(model)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert is_same(value, after[name]), f"changed: {name}"


def state_of(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch RNG": torch.get_rng_state(),
        "numpy RNG": pickle.dumps(np.random.get_state()),
        "python RNG": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "matrix products": torch.get_float32_matmul_precision(),
        "CUDA matrix products": BACKENDS.cuda.matmul.fp32_precision,
        "CPU matrix products": BACKENDS.mkldnn.matmul.fp32_precision,
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"{name} value"] = parameter.detach().clone()
        state[f"{name} identity"] = (id(parameter), parameter.data_ptr(), parameter._version)
        state[f"{name} grad"] = parameter.grad
        state[f"{name} requires_grad"] = parameter.requires_grad
    for name, buffer in model.named_buffers():
        state[f"{name} buffer"] = buffer.clone()
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name} hooks"] = [tuple(getattr(module, hooks).items()) for hooks in _HOOKS]
        state[f"{name} own forward"] = module.__dict__.get("forward")
        state[f"{name} training"] = module.training
        state[f"{name} casts its input"] = getattr(module, "cast_input_dtype_enabled", None)
        state[f"{name} attributes"] = sorted(module.__dict__)
    return state


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def mix_modes(model: nn.Module) -> None:
    """Put some of the modules into train mode."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_step_changes_nothing(family: str, name: str, lora: bool, dtype: torch.dtype) -> None:
    model = tiny_model(family, lora, dtype)
    mix_modes(model)
    examples = make_examples()
    with untouched(model):
        estimator = make_estimator(name, find_architecture(model))
        probe_step(estimator, model, examples, [[0, 1], [3, 2, 4]])
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_being_accumulated_stay(name: str) -> None:
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with untouched(model):
        probe_step(make_estimator(name, find_architecture(model)), model, make_examples())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())


class BoomError(Exception):
    """What a broken module raises."""


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("model.layers.0.mlp", 1),
        ("model.layers.1", 2),
        ("model.layers.1.self_attn", 1),
        ("model.layers.1.mlp", 1),
        ("model.norm", 2),
        ("lm_head", 2),
    ],
    ids=["trunk", "last layer", "attention of the last layer", "MLP of the last layer", "norm", "head"],
)
def test_model_that_raises_is_put_back(where: str, call: int, dtype: torch.dtype, name: str) -> None:
    model = tiny_model("llama", True, dtype)
    mix_modes(model)
    calls = 0

    def fail(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:  # norm and head, replaced, are called by the trunk too
            raise BoomError

    model.get_base_model().get_submodule(where).register_forward_pre_hook(fail)
    estimator = make_estimator(name, find_architecture(model))
    with pytest.raises(BoomError), untouched(model):
        probe_step(estimator, model, make_examples())
    assert calls == call
    probe_step(estimator, model, make_examples())  # and works the next time


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_with_checkpointing_and_dropout_gives_the_same_signal(name: str, attention: str, lora: bool) -> None:
    examples = make_examples()
    quiet = tiny_model("phi", lora)
    expected = signal_rows(probe_step(make_estimator(name, find_architecture(quiet)), quiet, examples))
    model = tiny_model(
        "phi", lora, attention_dropout=0.3, resid_pdrop=0.3, embd_pdrop=0.3, attn_implementation=attention
    )
    model.gradient_checkpointing_enable()
    if lora:
        model.enable_input_require_grads()
    model.train()
    with untouched(model):
        found = signal_rows(probe_step(make_estimator(name, find_architecture(model)), model, examples))
    assert torch.allclose(found, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_dropout_of_the_adapter_is_off(name: str) -> None:
    examples = make_examples()
    signals = []
    for dropout in (0.0, 0.5):
        model = add_lora(tiny_model("llama"), "llama", lora_dropout=dropout)
        randomise(model)
        model.train()
        signals.append(signal_rows(probe_step(make_estimator(name, find_architecture(model)), model, examples)))
    assert torch.equal(*signals)


def test_spsa_works_in_inference_mode() -> None:
    model, examples = tiny_model("llama", dtype=torch.bfloat16), make_examples()
    expected = signal_rows(probe_step(make_estimator("spsa", find_architecture(model)), model, examples))
    with torch.inference_mode(), untouched(model):
        found = signal_rows(probe_step(make_estimator("spsa", find_architecture(model)), model, examples))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_in_the_same_autocast_gets_all_its_gradients(name: str) -> None:
    """Casts of weights that autocast keeps for later must not be those made without gradients."""
    model, examples = tiny_model("llama"), make_examples()
    with torch.autocast("cpu", torch.bfloat16):
        probe_step(make_estimator(name, find_architecture(model)), model, examples)
        model(input_ids=examples[0].input_ids[None]).logits.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
