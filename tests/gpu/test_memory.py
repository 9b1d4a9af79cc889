"""Peaks by phase in `StepStats` are the allocator's, measured from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colm_ds.memory.meter import GIB, PeakCounter
from tests.engine.training import SOURCES, start
from tests.gpu.device import DEVICE, case_of, only_on_gpu

pytestmark = only_on_gpu

LENGTH = 96
"""Tokens of every example: then every step needs the same."""


def equal_records() -> list[dict[str, Any]]:
    """Examples of one length."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, count in SOURCES.items() for _ in range(count)]
    tokens = torch.randint(3, 97, (len(names), LENGTH), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids, "source": name} for ids, name in zip(tokens, names, strict=True)]


@pytest.mark.parametrize("estimator", ["spsa", "exact"])
def test_peaks(estimator: str, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    colm = {"probe": {"estimator": estimator}, "small_sources": "none", "per_source": False}
    model = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": LENGTH}
    case = case_of("peaks", half=True, stage=2, model=model, colm=colm)
    engine = start(case, training_data=equal_records())
    try:
        for _ in range(3):
            stats = engine.train_batch()
        torch.cuda.synchronize()
        monkeypatch.setattr(PeakCounter, "reset", lambda self: None)
        torch.cuda.reset_peak_memory_stats()
        engine.train_batch()
        outside = torch.cuda.max_memory_allocated() / GIB
        held = torch.cuda.memory_allocated() / GIB
    finally:
        engine.destroy()
    peaks = stats.memory_gib
    assert stats.memory_kind == "allocated"
    assert peaks["peak"] == pytest.approx(outside, rel=0.02)
    assert peaks["peak"] == max(peaks[phase] for phase in ("probe", "exchange", "select", "train", "step"))
    assert peaks["train"] == max(peaks["forward"], peaks["backward"])
    assert all(
        held * 0.9 < peaks[phase] <= peaks["peak"] for phase in ("probe", "select", "forward", "backward", "step")
    )
    assert sum(stats.memory_parts_gib.values()) == pytest.approx(peaks["peak"], rel=0.02)


def test_a_phase_of_known_size() -> None:
    """A tensor that comes and goes within a phase is its peak, and no other's."""
    from colm_ds.memory.meter import Meter

    meter = Meter(DEVICE)
    before = torch.cuda.memory_allocated()
    with meter.phase("train"):
        with meter.part("forward"):
            kept = torch.empty(1 << 20, device=DEVICE)
        with meter.part("backward"):
            gone = torch.empty(3 << 20, device=DEVICE)
            del gone
    assert meter.peak_bytes["forward"] - before == 4 << 20
    assert meter.peak_bytes["backward"] - before == 16 << 20
    assert meter.peak_bytes["train"] == meter.peak_bytes["backward"]
    assert meter.held_bytes["backward"] - before == kept.numel() * 4
    assert set(meter.seconds) == {"train", "forward", "backward"}
    assert meter.seconds["train"] >= meter.seconds["forward"] > 0
