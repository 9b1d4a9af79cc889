"""Replay on the device: the gradients of ordinary checkpointing, bit by bit, also from host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.architecture import find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.patch import eval_mode
from colm_ds.probe.replay import ReplayStore
from colm_ds.probe.tail import run_trunk
from colm_ds.types import Example
from tests.gpu.device import DEVICE, HAS_GPU, on_gpu
from tests.tiny_models import tiny_model

pytestmark = on_gpu

PLAN = [[0, 1], [2, 3]]


def examples() -> list[Example]:
    """Four examples of different lengths."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for index, length in enumerate([40, 37, 23, 22]):
        ids = torch.randint(3, 90, (length,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        found.append(Example(ids, labels, 0, index))
    return found


def recorded(model: nn.Module, *, offload: bool = False) -> ReplayStore:
    """Pass the examples through the trunk and keep what training starts from."""
    architecture = find_architecture(model)
    store = ReplayStore(architecture, offload=offload)
    store.begin(step=1)
    with eval_mode(model), torch.no_grad():
        for group in PLAN:
            batch = make_micro_batch([examples()[position] for position in group]).to(DEVICE)
            with store.recording(group, batch.lengths):
                run_trunk(model, architecture, batch)
    if HAS_GPU:
        torch.cuda.synchronize()  # a step waits for its choice
    return store


def gradients(model: nn.Module, store: ReplayStore | None = None) -> list[Tensor]:
    """Gradients of one step over the plan."""
    model.zero_grad()
    head = find_loss_head(model)
    for group in PLAN:
        batch = make_micro_batch([examples()[position] for position in group]).to(DEVICE)
        if store is None:
            example_loss_sums(model, head, batch).sum().backward()
        else:
            with store.replaying(group):
                example_loss_sums(model, head, batch).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest absolute difference."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def checkpointed(family: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model that recomputes its activations."""
    model: Any = tiny_model(family, lora=True, dtype=dtype, num_hidden_layers=3, **options).to(DEVICE)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model.train()  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_gradients_are_those_of_checkpointing(family: str, dtype: torch.dtype, attention: str) -> None:
    """No difference at all; where kernels add up in any order, none beyond that between two ordinary passes."""
    model = checkpointed(family, dtype, attn_implementation=attention)
    wanted, again = gradients(model), gradients(model)
    assert len(wanted) > 0
    assert difference(gradients(model, recorded(model)), wanted) <= difference(again, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_host_memory_gives_the_same(dtype: torch.dtype) -> None:
    model = checkpointed("llama", dtype, attn_implementation="eager")
    wanted = gradients(model, recorded(model))
    store = recorded(model, offload=True)
    assert (store.bytes_on(DEVICE) == 0) == HAS_GPU
    store.keep([0, 1, 2, 3])
    assert difference(gradients(model, store), wanted) == 0.0
