"""Record the memory of an engine's steps: peaks by phase, parts of the largest, counted allocations, snapshots."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.config.colm import MemoryConfig
from colm_ds.memory.breakdown import held_bytes, peak_parts, storage_bytes
from colm_ds.memory.counted import CountedPhases
from colm_ds.memory.live_blocks import blocks_at_peak, describe
from colm_ds.memory.meter import GIB, Meter

logger = logging.getLogger(__name__)

PHASES = ("probe", "exchange", "select", "train", "forward", "backward", "step", "save")
"""Phases of a step; `forward` and `backward` are within `train`. `save` is that of a checkpoint before the step."""

PEAKS = (*PHASES, "peak")
"""Keys of `StepStats.memory_gib`."""

_WITHIN = {"exchange": "probe", "select": "probe", "forward": "train", "backward": "train"}
"""Phases whose addition counts from the start of an earlier one."""

_SETTLED = 2  # steps after which the memory held by an engine no longer grows
_MAX_ENTRIES = 200_000  # of the allocator's history: tens of steps, tens of MB


class MemoryRecorder:
    """Measure every step of an engine on one rank.

    Attributes:
        kind: kind of the peaks: `allocated` on a GPU, `resident` on a CPU.
        folder: where snapshots are written.
        meter: meter of the running step, or of the last one.
        save: phase `save` of the checkpoint since the last step, if there was one.
    """

    def __init__(self, config: MemoryConfig, device: torch.device, rank: int) -> None:
        """Start recording the allocator's history if a snapshot is requested."""
        self._config = config
        self._device = device
        self._rank = rank
        self._steps = self._selecting = 0
        self._held: dict[str, int] = {}
        self._selection = self._replay_probed = self._replay_trained = 0
        self._counted: dict[str, int] | None = None
        self.folder = Path(config.folder)
        self.meter = Meter(device)
        self.kind = self.meter.counter.kind
        self.save: Meter | None = None
        self._is_recording = config.snapshot and device.type == "cuda"
        if self._is_recording:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MAX_ENTRIES)
        elif config.snapshot and rank == 0:
            logger.warning("memory.snapshot: there is no allocator snapshot on a CPU; memory.count_steps counts there")

    @contextmanager
    def step(
        self, number: int, around: Callable[[str], AbstractContextManager[None]], model: nn.Module, optimizer: Any
    ) -> Iterator[Meter]:
        """Measure the block as one step.

        Args:
            number: 1-based step.
            around: see `Meter`.
            model: the model in training.
            optimizer: its optimizer.
        """
        self._counted = None
        self._steps += 1
        if number in self._config.count_steps and self.kind == "resident":
            counted = CountedPhases()
            held = sum(held_bytes(model, optimizer, self._device).values()) + self._selection
            self.meter = Meter(self._device, around, counted.mark)
            with counted.counting():
                yield self.meter
            self._counted = {name: held + peak for name, peak in counted.peaks.items()}
        else:
            self.meter = Meter(self._device, around)
            yield self.meter
        if self._is_recording and self._steps == self._config.snapshot_step:
            self.write_snapshot(f"step_{number}")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the block as the phase `save`."""
        self.save = Meter(self._device)
        with self.save.phase("save"):
            yield

    def write_snapshot(self, what: str) -> Path | None:
        """Write PyTorch's allocator snapshot for https://pytorch.org/memory_viz; None if there is none.

        Beside it a text of the same name lists the largest blocks at the peak, with the lines that allocated them. What
        cannot be written is said and stops nothing.
        """
        if not self._is_recording:
            return None
        path = self.folder / f"memory_{what}_rank{self._rank}.pickle"
        snapshot = torch.cuda.memory._snapshot()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".txt").write_text(describe(*blocks_at_peak(snapshot, self._device.index or 0)))
            path.write_bytes(pickle.dumps(snapshot))
        except OSError as error:
            logger.warning("memory.snapshot: not written: %s. Training continues.", error)
            return None
        return path

    def note_selected(self, kept: list[Tensor], replay: Any) -> None:
        """Record what the selection keeps, before the step's training.

        Args:
            kept: tensors that selector and estimator keep.
            replay: the `ReplayStore` of this step, or None.
        """
        self._selecting += bool(kept)
        if self._steps <= _SETTLED or self._selecting <= _SETTLED:  # a schedule may begin to select later
            self._selection = storage_bytes(kept, self._device)
        self._replay_probed = self._replay_trained = replay.bytes_on(self._device) if replay is not None else 0

    def note_trained(self, model: nn.Module, optimizer: Any, replay: Any) -> None:
        """Record what training holds, before the optimizer's step, while gradients exist."""
        if self._steps <= _SETTLED:
            self._held = held_bytes(model, optimizer, self._device)
        if replay is not None:
            self._replay_trained = replay.bytes_on(self._device)

    def stats(self) -> dict[str, Any]:
        """Return the values of `StepStats` for the step measured last: memory_gib, memory_parts_gib, counted_gib."""
        meter = self.meter
        peaks = {**dict.fromkeys(PHASES, 0), **meter.peak_bytes, **(self.save.peak_bytes if self.save else {})}
        inner = {name: peak for name, peak in meter.peak_bytes.items() if name != "train"}
        phase = max(inner, key=lambda name: inner[name])
        is_choice = phase in ("probe", "exchange", "select")
        start = _WITHIN.get(phase, phase)
        parts = peak_parts(
            phase,
            inner[phase],
            meter.held_bytes[start if start in meter.held_bytes else phase],
            self._held,
            replay=self._replay_probed if is_choice else self._replay_trained,
            selection=self._selection,
        )
        counted = self._counted
        return {
            "memory_kind": self.kind,
            "memory_gib": {name: value / GIB for name, value in {**peaks, "peak": max(peaks.values())}.items()},
            "memory_parts_gib": {name: value / GIB for name, value in parts.items()},
            "counted_gib": None if counted is None else {name: value / GIB for name, value in counted.items()},
        }

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase; 0 for those that did not run."""
        save = self.save.seconds if self.save else {}
        return {**dict.fromkeys(PHASES, 0.0), **self.meter.seconds, **save}
