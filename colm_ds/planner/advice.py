"""Advise from the plan when memory runs out: the largest parts, and the changes that would help most."""

from __future__ import annotations

from typing import Any

from colm_ds.errors import DeviceMemoryError
from colm_ds.memory.meter import GIB
from colm_ds.planner.job import job_of_engine
from colm_ds.planner.plan import Planner
from colm_ds.planner.suggestions import best_of_each_key, list_changes
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.types import LargeBatch

_MOST = 3


def planned_advice(engine: Any, error: DeviceMemoryError, recipe: BaseRecipe | None = None) -> list[str]:
    """Return the phase's largest terms, and the changes of different keys with the greatest predicted effect on it.

    Args:
        engine: the `CoLMEngine` whose step failed.
        error: the error that it raised.
        recipe: the recipe that the engine was made by, if there is one, for the names of its keys.
    """
    try:
        return _advice(engine, error, recipe)
    except Exception as failed:  # a failing plan must not hide the original error
        return [f"(No advice: {type(failed).__name__}: {failed})"]


def _advice(engine: Any, error: DeviceMemoryError, recipe: BaseRecipe | None) -> list[str]:
    batch, phase = error.large_batch, error.phase
    assert isinstance(batch, LargeBatch)
    job, planner = job_of_engine(engine, batch, recipe), Planner()
    plan = planner.memory(job)
    where = phase if phase in plan.phases else plan.peak_phase
    terms = sorted(plan.phases[where].items(), key=lambda term: -term[1])[:_MOST]
    shown = ", ".join(f"{name} {_size(size)}" for name, size in terms if size > 0)
    lines = [f"Planned for it: {_size(plan.peaks[where])}, most of it {shown}."]
    helping = best_of_each_key(list_changes(planner, job, where))[:_MOST]
    if helping:
        lines.append("Try, with the greatest predicted effect first:")
        lines += [f"  {change.override}  ({_size(change.saved)} less)" for change in helping]
    return lines


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size * 1024 / GIB:.2f} MiB"
