"""Peaks by phase: nested phases, hooks on a plain torch module, counted allocations, the parts of a peak."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from colm_ds.config.colm import MemoryConfig
from colm_ds.memory import breakdown, meter
from colm_ds.memory.breakdown import PARTS, held_bytes, peak_parts, storage_bytes
from colm_ds.memory.counted import CountedPhases
from colm_ds.memory.hooks import MemoryHooks
from colm_ds.memory.meter import Meter, PeakCounter
from colm_ds.memory.recorder import MemoryRecorder

CPU = torch.device("cpu")
MIB = 1 << 20


class FakeCounter:
    """A counter whose memory the test sets."""

    def __init__(self) -> None:
        self.kind = "resident"
        self.current = self.highest = 0

    def use(self, level: int) -> None:
        self.current, self.highest = level, max(self.highest, level)

    def reset(self) -> None:
        self.highest = self.current

    def peak(self) -> int:
        return self.highest

    def now(self) -> int:
        return self.current


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> FakeCounter:
    fake = FakeCounter()
    monkeypatch.setattr(meter, "PeakCounter", lambda device: fake)
    monkeypatch.setattr("colm_ds.memory.hooks.PeakCounter", lambda device: fake)
    return fake


def test_phases_know_their_own_peaks(counter: FakeCounter) -> None:
    """A phase counts what happens in the phases that it holds, but not what happened before or after it."""
    seen = Meter(CPU)
    counter.use(100)
    counter.use(10)
    with seen.phase("train"):
        counter.use(30)
        counter.use(10)
        for level in (20, 25):
            with seen.part("forward"):
                counter.use(level)
            with seen.part("backward"):
                counter.use(level + 20)
                counter.use(10)
        counter.use(15)
    counter.use(500)
    assert seen.peak_bytes == {"forward": 25, "backward": 45, "train": 45}
    assert seen.held_bytes == {"train": 10, "forward": 10, "backward": 20}
    assert set(seen.seconds) == {"train", "forward", "backward"}
    assert seen.failed_in is None


def test_seconds_alone_leave_the_peaks_of_others(counter: FakeCounter) -> None:
    """As of a script's own `torch.cuda.max_memory_allocated`, or of hooks around a selector."""
    outer, inner = Meter(CPU), Meter(CPU, peaks=False)
    with outer.phase("probe"):
        counter.use(50)
        counter.use(10)
        with inner.phase("probe"), inner.part("forward"):
            counter.use(20)
    assert outer.peak_bytes == {"probe": 50}
    assert set(inner.seconds) == {"probe", "forward"}
    assert inner.peak_bytes == inner.held_bytes == {}


def test_failed_phase_is_the_innermost(counter: FakeCounter) -> None:
    seen = Meter(CPU)

    def fail() -> None:
        with seen.phase("train"), seen.part("backward"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen.failed_in == "backward"


def test_resident_peak_of_a_phase() -> None:
    """The kernel's peak starts anew with every phase, and sees what is gone again at its end."""
    seen = Meter(CPU)
    with seen.phase("large"):
        torch.ones(64 * MIB // 4)
    with seen.phase("small"):
        pass
    assert PeakCounter(CPU).kind == "resident"
    if meter.reset_resident_peak():
        assert seen.peak_bytes["large"] - seen.peak_bytes["small"] > 48 * MIB


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward and step of any torch module."""
    optimizer.zero_grad()
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()


def test_hooks_on_a_plain_module(counter: FakeCounter) -> None:
    """Every phase gets what its modules use: levels are set by hooks of the inner modules."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model[1].register_forward_hook(lambda *_: counter.use(200))
    model[1].register_full_backward_hook(lambda *_: counter.use(300))
    optimizer.register_step_pre_hook(lambda *_: counter.use(250))
    with MemoryHooks(model, optimizer) as memory:
        counter.use(50)
        plain_step(model, optimizer)
        with memory.phase("probe"):
            counter.use(400)
            counter.use(250)
    assert memory.kind == "resident"
    assert memory.peak_bytes["forward"] == 200
    assert memory.peak_bytes["backward"] == 300
    assert memory.peak_bytes["step"] == 250
    assert memory.peak_bytes["probe"] == 400
    assert memory.peak_gib["probe"] == 400 / 2**30
    assert set(memory.peak_bytes) == {"forward", "backward", "step", "probe", "other"}


def test_an_evaluation_is_a_phase_of_its_own(counter: FakeCounter) -> None:
    """With its forward passes and what follows them; DeepSpeed's optimizers hold the one that takes the step."""
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    model[0].register_forward_hook(lambda *_: counter.use(100 if torch.is_grad_enabled() else 500))
    with MemoryHooks(model, wrapper) as memory:  # type: ignore[arg-type]
        plain_step(model, optimizer)
        counter.use(10)
        with memory.phase("evaluation"):
            with torch.no_grad():
                model(torch.ones(4, 8))
            counter.use(900)
            counter.use(10)
            plain_step(model, optimizer)
            counter.use(950)
            counter.use(10)
    assert memory.peak_bytes["forward"] == 100
    assert memory.peak_bytes["evaluation"] == 950
    assert "step" in memory.peak_bytes
    assert memory.peak_bytes["other"] < 500


def test_what_a_selection_keeps_is_known_when_it_begins_later() -> None:
    """As under a schedule, or of clusters that are made after some steps."""
    recorder = MemoryRecorder(MemoryConfig(), CPU, rank=0)
    model = nn.Linear(4, 4)
    for step in range(1, 8):
        with recorder.step(step, lambda _: nullcontext(), model, torch.optim.SGD(model.parameters())) as seen:
            recorder.note_selected([torch.ones(MIB)] if step > 4 else [], None)
            with seen.phase("train"), seen.part("forward"):
                torch.ones(4 * MIB)
    assert recorder._selection == 4 * MIB


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, None), lambda x: {"logits": x, "list": [x]}])
def test_hooks_see_every_kind_of_output_and_leave_nothing(counter: FakeCounter, make: Callable[[Any], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            return make(self.inner(x))

    model = Wrapped()
    with MemoryHooks(model) as memory:
        output = model(torch.ones(2, 8))
        tensor = output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
        tensor.sum().backward()
        with torch.no_grad():
            model(torch.ones(2, 8))
    assert set(memory.peak_bytes) == {"forward", "backward", "other"}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_counted_phases() -> None:
    """Counts are those of the tensors, whatever the process has."""
    counted = CountedPhases()
    with counted.counting():
        with counted.mark("a"):
            torch.ones(MIB)  # 4 MiB, freed at once
        with counted.mark("b"):
            kept = torch.ones(2 * MIB)
            torch.ones(MIB)
        with counted.mark("a"):
            pass
    assert len(kept) == 2 * MIB
    assert counted.peaks["b"] == pytest.approx(12 * MIB, rel=0.01)
    assert counted.peaks["a"] == pytest.approx(8 * MIB, rel=0.01)  # what b left is there in the second a
    assert counted.peaks["total"] == counted.peaks["b"]


def test_held_bytes_of_a_plain_loop() -> None:
    """Weights, gradients and both moments of AdamW, each storage once."""
    model = nn.Linear(64, 64, bias=False)
    model.again = model.weight
    optimizer = torch.optim.AdamW(model.parameters())
    plain = 64 * 64 * 4
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    found = held_bytes(model, optimizer, CPU)
    assert found["weights"] == found["gradients"] == plain
    assert found["optimizer"] - 2 * plain in (4, 8)  # and the step counter
    assert held_bytes(model, optimizer, torch.device("meta"))["weights"] == 0
    assert storage_bytes([model.weight, model.weight[1:]]) == plain


def test_parts_add_up() -> None:
    held = {"weights": 40, "gradients": 10, "optimizer": 20, "rest": 5}
    training = peak_parts("backward", 200, 100, held, replay=15, selection=7)
    assert training["activations"] == 100
    assert training["rest"] == 8
    probing = peak_parts("probe", 150, 90, held, replay=15, selection=7)
    assert (probing["probe"], probing["activations"]) == (45, 0)
    for parts in (training, probing):
        assert set(parts) == set(PARTS)
    assert (sum(training.values()), sum(probing.values())) == (200, 150)


def test_tensors_are_told_apart_by_name() -> None:
    """What DeepSpeed's optimizers keep is found through attributes, lists and dictionaries."""

    class Holder:
        def __init__(self) -> None:
            self.averaged_gradients = {0: [torch.ones(3)]}
            self.fp32_partition = [torch.ones(4)]
            self.bucket = torch.ones(5)
            self.model = nn.Linear(9, 9)

    Holder.__module__ = "deepspeed.stand_in"
    found = held_bytes(nn.Linear(1, 1, bias=False), Holder(), CPU)
    assert found == {"weights": 4, "communication": 20, "gradients": 12, "optimizer": 16, "rest": 0}
    assert breakdown.PARTS[-1] == "rest"


def test_no_snapshot_on_a_cpu(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """It is said in one line, and nothing is written."""
    recorder = MemoryRecorder(MemoryConfig(snapshot=True, folder=str(tmp_path)), CPU, rank=0)
    assert recorder.write_snapshot("step_2") is None
    assert [record.message.split(":")[0] for record in caplog.records] == ["memory.snapshot"]
    assert not list(tmp_path.iterdir())
