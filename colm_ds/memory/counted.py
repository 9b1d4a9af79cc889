"""Peak of tensor allocations on a CPU, counted by PyTorch's profiler: what an allocator's statistics are on a GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """What a call allocated, in bytes, relative to what was there before it.

    Attributes:
        peak: highest running sum.
        held: sum at its end: what the call left behind (negative if it freed more than it allocated).
        largest: the largest single one.
    """

    peak: int
    held: int
    largest: int


def counted_allocations(function: Callable[[], Any]) -> Allocations:
    """Run a function and count its CPU tensor allocations; what it returns is freed before the count ends.

    Costs far more time than the function itself: for benchmarks and tests, never for a training step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    running = peak = largest = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        running += event["args"]["Bytes"]
        peak, largest = max(peak, running), max(largest, event["args"]["Bytes"])
    return Allocations(peak, running, largest)
