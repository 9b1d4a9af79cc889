"""A step waits for the GPU twice: for the choice and for the loss; without a probe once."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.engine.training import start
from tests.gpu.device import HAS_GPU, case_of
from tests.gpu.waits import Waits, counting_waits

ROOT = Path(__file__).resolve().parents[2]


def cases() -> dict[str, tuple[dict[str, Any], int]]:
    """The `"colm"` section, and how often a step may wait."""
    probes = {name: {"probe": {"estimator": name}} for name in ("spsa", "exact", "sketch", "projection")}
    return {
        **{name: (colm, 2) for name, colm in probes.items()},
        "exact, matched, joint": (
            {**probes["exact"], "weights": "matched", "per_source": False, "small_sources": "none"},
            2,
        ),
        "big_loss": ({"selector": "big_loss"}, 2),
        "tokens": ({"probe": {"estimator": "tokens"}}, 1),
        "keep_random": ({"selector": "keep_random"}, 1),
        "random": ({"selector": "random"}, 1),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", cases())
def test_waits_of_a_step(name: str, one_process: None) -> None:
    colm, most = cases()[name]
    engine = start(case_of(name, half=True, lora=True, stage=2, checkpointing=True, colm=colm))
    try:
        for _ in range(3):  # histories begin, kernels are compiled
            engine.train_batch()
        with counting_waits() as waits:
            engine.train_batch()
    finally:
        engine.destroy()
    assert len(waits.ours) <= most, "\n".join(waits.ours)


def test_whose_wait_it_is() -> None:
    """The rule of `Waits`, on stacks made up of files: torch's own frames pass the question up."""

    def frame(path: str, line: int) -> traceback.FrameSummary:
        return traceback.FrameSummary(path, line, "f", lookup_line=False, line="")

    ours, torchs = str(ROOT / "colm_ds/engine/engine.py"), "/site-packages/torch/_tensor.py"
    theirs = "/site-packages/deepspeed/runtime/engine.py"
    waits = Waits()
    waits.note([frame(ours, 1), frame(torchs, 2)])
    waits.note([frame(ours, 3), frame(theirs, 4), frame(torchs, 5)])
    waits.note([frame(theirs, 6), frame(ours, 7)])
    assert [place.rsplit(" ", 1)[0] for place in waits.ours] == [f"{ours}:1", f"{ours}:7"]
    assert [place.rsplit(" ", 1)[0] for place in waits.others] == [f"{theirs}:4"]
