"""Count tensor allocations on a CPU by PyTorch's profiler: what an allocator's statistics are on a GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "colm_ds phase "


@dataclass(frozen=True)
class Allocations:
    """Allocations of a call, in bytes, relative to the memory before it.

    Attributes:
        peak: highest running sum.
        held: sum at its end (negative if the call freed more than it allocated).
        largest: the largest single allocation.
    """

    peak: int
    held: int
    largest: int


def counted_allocations(function: Callable[[], Any]) -> Allocations:
    """Run a function and count its CPU tensor allocations; its result is freed before the count ends.

    Costs far more time than the function itself: for benchmarks and tests, never for a training step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    running = peak = largest = 0
    for event in _memory_events(_trace(profiled)):
        running += event["args"]["Bytes"]
        peak, largest = max(peak, running), max(largest, event["args"]["Bytes"])
    return Allocations(peak, running, largest)


class CountedPhases:
    """Count the CPU tensor allocations of a block and of the phases marked in it; several times slower than the block.

    Attributes:
        peaks: by phase and as `total`, highest running sum in bytes, relative to the memory before the block.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in this block; `peaks` is available after it."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            yield
        events = _trace(profiled)
        marks = [event for event in events if event.get("name", "").startswith(_MARK) and "dur" in event]
        running = 0
        changes = []  # time, running sum
        for event in _memory_events(events):
            running += event["args"]["Bytes"]
            changes.append((event["ts"], running))
        self.peaks = {"total": max((value for _, value in changes), default=0)}
        for mark in marks:
            start, stop = mark["ts"], mark["ts"] + mark["dur"]
            before = [value for when, value in changes if when < start][-1:]
            peak = max([*before, *(value for when, value in changes if start <= when <= stop)], default=0)
            name = mark["name"].removeprefix(_MARK)
            self.peaks[name] = max(self.peaks.get(name, peak), peak)

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Count the block as (a part of) a phase."""
        with record_function(_MARK + name):
            yield


def _trace(profiled: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def _memory_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return allocations and releases in order."""
    events = [event for event in events if event.get("name") == "[memory]"]
    return sorted(events, key=lambda event: event["args"]["Ev Idx"])
