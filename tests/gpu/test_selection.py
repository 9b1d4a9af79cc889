"""Signals, losses and choices on the device are those of the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colm_ds.batching.loader import LargeBatchLoader, RecordDataset, source_counts
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.engine.coreset_selector import CoresetSelector, Selection
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.probe import directions
from colm_ds.selection import SINGLE_PROCESS, AdamHistory, LowRankGradients
from colm_ds.selection.fused import compiled_sum, normalised_sum
from colm_ds.selection.history import fused_sum, mean_gradient
from tests.engine.training import BETAS, CORESET, EPS, LARGE, records
from tests.gpu.device import DEVICE, on_gpu, only_on_gpu
from tests.probe.oracles import make_examples
from tests.selection.oracles import FixedDirections
from tests.tiny_models import tiny_model

SOURCES = {"algebra": 44, "biology": 37, "code": 30, "drama": 7, "essays": 5}
WHOLE = {"per_source": False, "small_sources": "none"}

SECTIONS: dict[str, dict[str, Any]] = {
    "exact": {"probe": {"estimator": "exact"}},
    "exact, matched, joint": {"probe": {"estimator": "exact"}, "weights": "matched", **WHOLE},
    "sketch": {"probe": {"estimator": "sketch", "num_probes": 64}, "weights": "matched", **WHOLE},
    "projection": {"probe": {"estimator": "projection", "num_probes": 16}},
    "spsa": {"probe": {"estimator": "spsa", "num_probes": 4, "precision": "float64"}, "geometry": "plain"},
    "big loss": {"selector": "big_loss"},
    "keep_random": {"selector": "keep_random"},
    "hidden states": {"selector": "hidden_medoids"},
}


@pytest.fixture(autouse=True)
def directions_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw directions on the CPU wherever they are used, as every kind of device has its own numbers."""

    def drawn(size: int, seed: int, *parts: int | str, device: torch.device) -> Tensor:
        return normals(size, seed, *parts, device=torch.device("cpu")).to(device)

    normals = directions.normals
    monkeypatch.setattr(directions, "normals", drawn)


def choices(model: nn.Module, section: dict[str, Any], steps: int = 3) -> list[Selection]:
    """Return what a selector chooses of the first large batches, with weights that stay as they are."""
    dataset = RecordDataset(records(SOURCES))
    colm = {"large_batch_size": LARGE, "coreset_size": CORESET, "seed": 3, **section}
    selector = CoresetSelector(
        model, colm, source_counts(dataset), exchange=SINGLE_PROCESS, betas=BETAS, eps=EPS, rank=0, mean_length=20.0
    )
    loader = LargeBatchLoader(dataset, LARGE, seed=3, rank=0, world_size=1)
    return [selector(loader.batch(step)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.gpu
@on_gpu[1]
def test_choice_is_that_of_the_cpu(name: str, lora: bool) -> None:
    model = tiny_model("llama", lora)
    wanted = choices(model, SECTIONS[name])
    found = choices(copy.deepcopy(model).to(DEVICE), SECTIONS[name])
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.positions.device.type == "cpu"
        assert sorted(ours.positions.tolist()) == sorted(theirs.positions.tolist())
        torch.testing.assert_close(weights_by_position(ours), weights_by_position(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["exact", "exact, matched, joint", "sketch", "projection"])
@pytest.mark.gpu
@on_gpu[1]
def test_choice_in_bf16_is_nearly_that_of_the_cpu(name: str) -> None:
    """Kernels round otherwise, and near ties turn over; weights are the same on both sides."""
    model = tiny_model("llama", True, torch.bfloat16)
    wanted = choices(model, SECTIONS[name])
    found = choices(copy.deepcopy(model).to(DEVICE), SECTIONS[name])
    common = [
        len(set(one.positions.tolist()) & set(other.positions.tolist()))
        for one, other in zip(found, wanted, strict=True)
    ]
    assert sum(common) >= 0.8 * len(common) * CORESET


def weights_by_position(selection: Selection) -> Tensor:
    """Loss weights in the order of the positions."""
    return selection.weights[selection.positions.argsort()]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "stablelm"])
@pytest.mark.gpu
@on_gpu[1]
def test_losses_and_gradients_are_those_of_the_cpu(family: str, dtype: torch.dtype, rtol: float) -> None:
    model = tiny_model(family, dtype=dtype)
    batch = make_micro_batch(make_examples())
    found = []
    for device in (torch.device("cpu"), DEVICE):
        here = copy.deepcopy(model).to(device)
        sums = example_loss_sums(here, find_loss_head(here), batch.to(device))
        sums.sum().backward()
        gradient = torch.cat([p.grad.flatten().float().cpu() for p in here.parameters() if p.grad is not None])
        found.append((sums.detach().cpu(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=rtol, atol=rtol)
    distance = (found[1][1] - found[0][1]).norm() / found[0][1].norm()
    assert float(distance) <= rtol


def rank_one(num_rows: int, size: int, device: torch.device) -> tuple[LowRankGradients, Tensor, AdamHistory]:
    """Return rank-one gradients with a history that has seen some."""
    generator = torch.Generator().manual_seed(size)
    coefficients = torch.randn(num_rows, 1, generator=generator).to(device)
    direction = torch.randn(1, size, generator=generator).to(device)
    history = AdamHistory(size, (0.9, 0.999), 1e-8, device)
    gradients = LowRankGradients(coefficients, FixedDirections(direction))
    rows = torch.arange(0, num_rows, 2, device=device)
    history.update(gradients, rows, len(rows), SINGLE_PROCESS)
    return gradients, rows, history


@pytest.mark.parametrize("size", [40, 1 << 16, (1 << 22) + 1000])
@pytest.mark.gpu
@only_on_gpu[1]
def test_fused_geometry_is_the_plain_one(size: int) -> None:
    """The kernel that `torch.compile` makes against the chunks on the CPU."""
    gradients, rows, history = rank_one(24, size, DEVICE)
    fused = fused_sum(gradients, rows, history, compiled_sum()) / len(rows)
    plain = mean_gradient(
        *rank_one(24, size, torch.device("cpu"))[:2],
        len(rows),
        SINGLE_PROCESS,
        rank_one(24, size, torch.device("cpu"))[2],
    )
    torch.testing.assert_close(fused.cpu(), plain, rtol=1e-4, atol=1e-5)
    taken = mean_gradient(gradients, rows, len(rows), SINGLE_PROCESS, history)
    torch.testing.assert_close(taken, fused, rtol=0, atol=0)


def test_sum_to_be_fused_is_the_plain_one() -> None:
    gradients, rows, history = rank_one(24, 1000, torch.device("cpu"))
    fused = fused_sum(gradients, rows, history, normalised_sum) / len(rows)
    plain = mean_gradient(gradients, rows, len(rows), SINGLE_PROCESS, history)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
