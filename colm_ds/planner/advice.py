"""When memory runs out: where it was, what takes it, and which changes of the recipe would help most."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from colm_ds.errors import DeviceMemoryError
from colm_ds.memory.meter import GIB
from colm_ds.planner.job import job_of_engine
from colm_ds.planner.plan import Planner
from colm_ds.planner.suggestions import best_of_each_key, knobs
from colm_ds.types import LargeBatch

_MOST = 3


def memory_error(engine: Any, batch: LargeBatch, error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """What to tell the user.

    Args:
        engine: the `CoLMEngine` whose step failed.
        batch: the step's large batch.
        error: PyTorch's.
    """
    snapshot = engine.memory.write_snapshot("out_of_memory")
    phase = engine.memory.meter.failed_in or "between phases"
    of = getattr(error, "micro_batch", None)
    micro = "" if of is None else f", micro-batch of {of}"
    lines = [f"rank {dist.get_rank()}: out of memory in phase {phase!r} of step {batch.step}{micro}."]
    try:
        lines += _advice(engine, batch, phase)
    except Exception as failed:  # the plan must not hide what happened
        lines.append(f"(No advice: {type(failed).__name__}: {failed})")
    first = str(error).strip().split("\n")[0].partition(". GPU")[0]
    lines.append(f"PyTorch: {first or type(error).__name__}")
    if snapshot is not None:
        lines.append(f"Allocator snapshot: {snapshot}, for https://pytorch.org/memory_viz")
    return DeviceMemoryError("\n  ".join(lines))


def _advice(engine: Any, batch: LargeBatch, phase: str) -> list[str]:
    """The phase's largest terms, and the changes of different keys with the greatest predicted effect on it."""
    job, planner = job_of_engine(engine, batch), Planner()
    plan = planner.memory(job)
    where = phase if phase in plan.phases else plan.peak_phase
    terms = sorted(plan.phases[where].items(), key=lambda term: -term[1])[:_MOST]
    shown = ", ".join(f"{name} {_size(size)}" for name, size in terms if size > 0)
    lines = [f"Planned for it: {_size(plan.peaks[where])}, most of it {shown}."]
    helping = best_of_each_key(knobs(planner, job, where))[:_MOST]
    if helping:
        lines.append("Try, with the greatest predicted effect first:")
        lines += [f"  {knob.override}  ({_size(knob.saved)} less)" for knob in helping]
    return lines


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size * 1024 / GIB:.2f} MiB"
