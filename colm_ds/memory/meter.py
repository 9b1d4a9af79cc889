"""Seconds and peak memory of each phase of a step: CUDA by the allocator, Linux by the kernel's resettable peak."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

GIB = 2**30

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_peak_bytes() -> int:
    """Largest resident memory of this process since the last reset (since its start where resets do not work)."""
    try:
        for line in _STATUS.read_text().split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still use: of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().split("\n"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return resource.getpagesize() * 2**20


def reset_resident_peak() -> bool:
    """Let the kernel count the resident peak anew; False where it does not offer that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


class Meter:
    """Measures the phases of one step on this rank; phases may repeat, their seconds add up.

    On a GPU a phase begins and ends with a synchronisation: use few phases, none inside the accumulation loop.

    Attributes:
        seconds: by phase.
        peak_bytes: by phase: allocated on a GPU, resident memory of the process on a CPU.
    """

    def __init__(
        self, device: torch.device, around: Callable[[str], AbstractContextManager[None]] | None = None
    ) -> None:
        """Start with nothing measured.

        Args:
            device: whose memory counts.
            around: makes a context in which a phase of the given name runs.
        """
        self._device = device
        self._around = around or (lambda name: nullcontext())
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as (a part of) the named phase."""
        self._reset()
        start = time.perf_counter()
        try:
            with self._around(name):
                yield
        finally:
            peak = self._peak()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_resident_peak()

    def _peak(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return int(torch.cuda.max_memory_allocated(self._device))
        return resident_peak_bytes()
