"""One step under PyTorch's profiler as a picture: kernels over time, and the longest ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = {
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "::mm", "addmm", "linear", "matmul", "bmm"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated_fort"),
    "copies": ("memcpy", "memset", "copy", "::cat", "catarray", "::to"),
    "random numbers": ("rand", "distribution", "dropout", "philox"),
    "sums and norms": ("reduce", "norm", "softmax", "::sum", "::mean", "nll_loss"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
}
"""Kinds of kernels by parts of their names, by the first match, else `pointwise and other`."""

OTHER = "pointwise and other"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e")
LONGEST = 12


@dataclass(frozen=True)
class Profile:
    """Kernels of a step, in microseconds.

    Attributes:
        spans: start, end, name of every kernel (on a CPU of every operation that calls no other), in order.
        wall_us: wall time of the step under the profiler.
    """

    spans: list[tuple[float, float, str]]
    wall_us: float

    @property
    def busy_us(self) -> float:
        """Time in which any kernel ran."""
        total, end = 0.0, float("-inf")
        for start, stop, _ in self.spans:
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total

    def by_name(self) -> list[tuple[str, float, int]]:
        """Return name, time and number of calls, the longest first."""
        totals: dict[str, tuple[float, int]] = {}
        for start, stop, name in self.spans:
            time_us, calls = totals.get(name, (0.0, 0))
            totals[name] = time_us + stop - start, calls + 1
        return sorted(((name, *values) for name, values in totals.items()), key=lambda one: -one[1])

    def by_kind(self) -> dict[str, float]:
        """Return the time by kind."""
        times = dict.fromkeys([*KINDS, OTHER], 0.0)
        for start, stop, name in self.spans:
            times[kind_of(name)] += stop - start
        return times

    def summary(self) -> dict[str, Any]:
        """Return shares and the longest kernels, for the result file."""
        return {
            "wall_s": self.wall_us / 1e6,
            "busy_share": self.busy_us / self.wall_us,
            "num_kernels": len(self.spans),
            "kind_s": {kind: time_us / 1e6 for kind, time_us in self.by_kind().items()},
            "longest": [
                {"name": name[:160], "s": time_us / 1e6, "calls": calls}
                for name, time_us, calls in self.by_name()[:LONGEST]
            ],
        }


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), OTHER)


def profiled(work: Callable[[], Any], device: torch.device) -> Profile:
    """Run a function under the profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as session:
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall_us = (time.perf_counter() - start) * 1e6
    events = list(session.events() or [])
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == wanted and (on_gpu or not event.cpu_children) and not event.is_user_annotation
    ]
    return Profile(sorted(spans), wall_us)


def picture(profile: Profile, title: str, file: Path) -> None:
    """Draw kernels over time by kind, and the longest by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [*KINDS, OTHER]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(12, 8), height_ratios=(1, 1.2), layout="constrained")
    first = profile.spans[0][0]
    share = profile.busy_us / profile.wall_us
    for place, kind in enumerate(kinds):
        bars = [
            ((start - first) / 1e3, (stop - start) / 1e3)
            for start, stop, name in profile.spans
            if kind_of(name) == kind
        ]
        above.broken_barh(_merged(bars), (place - 0.4, 0.8), color=COLOURS[place], linewidth=0)
    times = profile.by_kind()
    above.set_yticks(range(len(kinds)), [f"{kind} {times[kind] / profile.wall_us:.0%}" for kind in kinds])
    above.set_xlabel("ms")
    above.set_title(f"{title}: {profile.wall_us / 1e3:.0f} ms under the profiler, busy {share:.0%}", fontsize=10)
    longest = profile.by_name()[:LONGEST][::-1]
    below.barh(
        range(len(longest)),
        [time_us / 1e3 for _, time_us, _ in longest],
        color=[COLOURS[kinds.index(kind_of(name))] for name, _, _ in longest],
    )
    below.set_yticks(range(len(longest)), [f"{name[:70]} x{calls}" for name, _, calls in longest], fontsize=7)
    below.set_xlabel("ms in all")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _merged(bars: Sequence[tuple[float, float]], gap: float = 0.02) -> list[tuple[float, float]]:
    """Join bars that nearly touch: tens of thousands would make the picture slow to draw."""
    joined: list[tuple[float, float]] = []
    for start, width in bars:
        if joined and start - (joined[-1][0] + joined[-1][1]) < gap:
            begin = joined[-1][0]
            joined[-1] = begin, max(joined[-1][1], start + width - begin)
        else:
            joined.append((start, width))
    return joined
