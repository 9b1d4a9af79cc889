"""What a snapshot of PyTorch's allocator held at its peak, on histories made by hand and at random."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.config.colm import MemoryConfig
from colm_ds.memory.live_blocks import LiveBlocks, blocks_at_peak, describe
from colm_ds.memory.recorder import MemoryRecorder


def frame(line: int, name: str = "forward", file: str = "/home/me/site-packages/model/layers.py") -> dict[str, Any]:
    return {"filename": file, "line": line, "name": name}


def event(action: str, address: int, size: int, *frames: dict[str, Any]) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": list(frames)}


def snapshot_of(history: list[dict[str, Any]], at_end: int, elsewhere: int = 7) -> dict[str, Any]:
    segments = [{"device": 0, "active_size": at_end}, {"device": 1, "active_size": elsewhere}]
    return {"segments": segments, "device_traces": [history, []]}


def test_the_peak_and_its_lines() -> None:
    torch_own = frame(9, "linear", "/usr/lib/site-packages/torch/nn/functional.py")
    native = frame(0, "at::empty", "??")
    history = [
        event("segment_alloc", 0, 9999),
        event("alloc", 1, 100, native, torch_own, frame(1), frame(2), frame(3), frame(4)),
        event("alloc", 2, 50, native, torch_own, frame(1), frame(2), frame(3), frame(4)),
        event("free_requested", 1, 100),
        event("alloc", 3, 30, torch_own),
        event("free_completed", 77, 20),  # from before the history
        event("alloc", 4, 60),
        event("free_completed", 1, 100),
        event("alloc", 5, 10, frame(5)),
    ]
    peak, blocks = blocks_at_peak(snapshot_of(history, at_end=1000 + 130))
    assert peak == 1000 + 100 + 50 + 30 - 20 + 60
    lines = tuple(f"site-packages/model/layers.py:{line} forward" for line in (1, 2, 3))
    assert blocks == [
        LiveBlocks(980, 0, ()),  # 1000 - 20
        LiveBlocks(150, 2, lines),
        LiveBlocks(60, 1, ()),
        LiveBlocks(30, 1, ("torch/nn/functional.py:9 linear",)),
    ]
    assert sum(each.size for each in blocks) == peak


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed: int) -> None:
    """Against the set of blocks kept from event to event."""
    draw = random.Random(seed)
    before = {10_000 + number: draw.randrange(1, 100) for number in range(draw.randrange(4))}
    live = {address: (size, "before") for address, size in before.items()}
    history, most = [], dict(live)
    for number in range(60):
        if live and draw.random() < 0.45:
            address = draw.choice(sorted(live))
            history += [event(action, address, live[address][0]) for action in ("free_requested", "free_completed")]
            del live[address]
        else:
            line = draw.randrange(5)
            history.append(event("alloc", number % 23 + 100 * number, size := draw.randrange(1, 100), frame(line)))
            live[number % 23 + 100 * number] = (size, str(line))
        if sum(size for size, _ in live.values()) > sum(size for size, _ in most.values()):
            most = dict(live)
    at_end = sum(size for size, _ in live.values())
    peak, blocks = blocks_at_peak(snapshot_of(history, at_end))
    assert peak == sum(size for size, _ in most.values())
    wanted: dict[str, int] = {}
    for size, line in most.values():
        wanted[line] = wanted.get(line, 0) + size
    found = {each.where[0].split(":")[1].split()[0] if each.where else "before": each.size for each in blocks}
    assert found == wanted


def test_an_empty_history() -> None:
    assert blocks_at_peak(snapshot_of([], 5)) == (5, [LiveBlocks(5, 0, ())])
    assert blocks_at_peak(snapshot_of([], 0)) == (0, [])


def test_description() -> None:
    blocks = [
        LiveBlocks(3 * 2**20, 2, ("a.py:1 f", "b.py:2 g")),
        LiveBlocks(2**20, 0, ()),
        LiveBlocks(2**19, 1, ("c.py:3 h",)),
    ]
    text = describe(2**30, blocks, most=2)
    assert text.splitlines() == [
        "1.000 GiB allocated at the peak. In MiB, with the lines that allocated it, innermost first:",
        "      3.0 2 blocks: a.py:1 f",
        "          b.py:2 g",
        "      1.0 allocated before the history began",
        "      0.5 elsewhere",
    ]


MADE = snapshot_of([event("alloc", 1, 2**21, frame(1))], 2**21)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryRecorder:
    """As on a GPU, with an allocator that is made up."""
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: MADE)
    recorder = MemoryRecorder(MemoryConfig(), torch.device("cpu"), rank=3)
    recorder.folder, recorder._is_recording = tmp_path / "run", True
    return recorder


def test_a_text_lies_beside_the_snapshot(recorder: MemoryRecorder, tmp_path: Path) -> None:
    path = recorder.write_snapshot("step_2")
    assert path == tmp_path / "run" / "memory_step_2_rank3.pickle"
    assert pickle.loads(path.read_bytes()) == MADE
    text = path.with_suffix(".txt").read_text()
    assert "2.0 site-packages/model/layers.py:1 forward" in text
    assert text == describe(*blocks_at_peak(MADE))


def test_a_snapshot_that_cannot_be_written_stops_nothing(
    recorder: MemoryRecorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file in the folder's place")
    assert recorder.write_snapshot("out_of_memory") is None
    assert "memory.snapshot: not written: " in caplog.text
