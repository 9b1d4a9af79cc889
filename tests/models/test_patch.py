"""Forwards and modes are put back, whatever happens in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colm_ds.models.patch import eval_mode, patched_forwards
from tests.tiny_models import tiny_model


def double(hidden: Tensor) -> Tensor:
    return 2 * hidden


def triple(hidden: Tensor) -> Tensor:
    return 3 * hidden


def test_replaces_the_forward_and_keeps_hooks() -> None:
    module, calls = nn.Linear(3, 3), []
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    with patched_forwards({module: double}):
        assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))
    assert calls == ["before", "after"]
    assert "forward" not in module.__dict__
    assert torch.equal(module(torch.ones(3)), nn.Linear.forward(module, torch.ones(3)))


def test_nests_and_restores_a_forward_of_the_module_itself() -> None:
    module = nn.Linear(3, 3)
    module.__dict__["forward"] = triple
    with patched_forwards({module: double}):
        with patched_forwards({module: lambda hidden: hidden}):
            assert torch.equal(module(torch.ones(3)), torch.ones(3))
        assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))
    assert module.__dict__["forward"] is triple


def test_restores_when_the_block_raises() -> None:
    modules = [nn.Linear(3, 3), nn.Linear(3, 3)]
    with pytest.raises(RuntimeError, match="stop"), patched_forwards(dict.fromkeys(modules, double)):
        raise RuntimeError("stop")
    assert all("forward" not in module.__dict__ for module in modules)


def mixed_model() -> Any:
    """A model whose modules are partly in train mode, as with frozen layers kept in eval mode."""
    model = tiny_model("llama", lora=True)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode_gives_every_module_its_own_mode_back(fails: bool) -> None:
    model = mixed_model()
    before = [module.training for module in model.modules()]
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise RuntimeError("stop")
    except RuntimeError:
        assert fails
    assert [module.training for module in model.modules()] == before
