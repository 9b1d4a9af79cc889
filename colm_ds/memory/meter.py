"""Measure seconds and peak memory of each phase of a step, without synchronising a GPU.

Peaks are the allocator's on a GPU, and the kernel's resettable peak of the process on a CPU; seconds are measured
between two CUDA events, or by the host's clock.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30

_STATUS = Path("/proc/self/status")
_RESIDENT_PAGES = Path("/proc/self/statm")
_CLEAR = Path("/proc/self/clear_refs")


def resident_peak_bytes() -> int:
    """Return the peak resident memory of this process since the last reset (since its start if resets do not work)."""
    try:
        for line in _STATUS.read_text().split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the resident memory of this process now (its peak if the kernel does not report it)."""
    try:
        return int(_RESIDENT_PAGES.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resident_peak_bytes()


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process could still use: of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().split("\n"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return resource.getpagesize() * 2**20


def reset_resident_peak() -> bool:
    """Reset the kernel's count of the resident peak; return False if the kernel cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


class PeakCounter:
    """The memory counter that is always on: it costs microseconds and never synchronises a GPU.

    Attributes:
        kind: what is counted: `allocated` by PyTorch on a GPU, `resident` memory of the process on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Count a device's memory."""
        self._device = device
        self.kind = "allocated" if device.type == "cuda" else "resident"

    def reset(self) -> None:
        """Start a new peak."""
        if self.kind == "allocated":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_resident_peak()

    def peak(self) -> int:
        """Return the maximum bytes since the last reset."""
        if self.kind == "allocated":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resident_peak_bytes()

    def now(self) -> int:
        """Return the bytes now."""
        return int(torch.cuda.memory_allocated(self._device)) if self.kind == "allocated" else resident_bytes()


@dataclass
class _Open:
    """A running phase."""

    name: str
    peak: int = 0


class Meter:
    """Measure the phases of one step on this rank; they may repeat (seconds add up) and contain other phases.

    Attributes:
        peak_bytes: by phase, see `PeakCounter.kind`.
        held_bytes: by phase, bytes in use at its first start.
        failed_in: innermost phase that an exception left, if any.
    """

    def __init__(
        self,
        device: torch.device,
        around: Callable[[str], AbstractContextManager[None]] | None = None,
        mark: Callable[[str], AbstractContextManager[None]] | None = None,
        *,
        peaks: bool = True,
    ) -> None:
        """Start with nothing measured.

        Args:
            device: device to measure.
            around: makes a context around each phase, by name.
            mark: makes a context around each phase and part, by name.
            peaks: False measures seconds alone, and leaves the peaks that others count as they are.
        """
        self._device = device
        self._around = around or nullcontext
        self._mark = mark or nullcontext
        self._open: list[_Open] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}
        self.counter = PeakCounter(device)
        self._peaks = peaks
        self.peak_bytes: dict[str, int] = {}
        self.held_bytes: dict[str, int] = {}
        self.failed_in: str | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase; a nested phase counts in both.

        On a GPU this synchronises with the end of the last phase: read it after the step's own synchronisation.
        """
        for name, start, stop in self._events:
            stop.synchronize()
            self._add(name, start.elapsed_time(stop) / 1000.0)
        self._events = []
        return self._seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as (a part of) the named phase."""
        with self._around(name), self.part(name):
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the block as part of the phase that it is in, under its own name."""
        with self._counting(name):
            start, event = time.perf_counter(), self._event()
            try:
                yield
            finally:
                stop = self._event()
                if event is None or stop is None:
                    self._add(name, time.perf_counter() - start)
                else:
                    self._events.append((name, event, stop))

    @contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        self._fold()
        if self._peaks:
            self.held_bytes.setdefault(name, self.counter.now())
        self._open.append(_Open(name))
        try:
            with self._mark(name):
                yield
        except BaseException:
            self.failed_in = self.failed_in or name
            raise
        finally:
            self._fold()
            done = self._open.pop()
            if self._peaks:
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), done.peak)
            if self._open:
                self._open[-1].peak = max(self._open[-1].peak, done.peak)

    def _fold(self) -> None:
        """Give the peak since the last reset to the innermost open phase, and start a new one."""
        if not self._peaks:
            return
        if self._open:
            self._open[-1].peak = max(self._open[-1].peak, self.counter.peak())
        self.counter.reset()

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
