"""Price of choosing: the cost of a step over that of plain training on b, by the planner's cost model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colm_ds.check.ways_to_choose import WayToChoose
from colm_ds.errors import CoLMError
from colm_ds.planner.job import Job, job_of_data
from colm_ds.planner.plan import Planner
from colm_ds.planner.step_cost import step_cost
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.selection.price import step_forwards
from colm_ds.types import SourcedDataset

_PROBE = 1.03
"""Probe of an example in forwards, if the model's sizes are unknown, as measured."""


def price_of_ways(
    recipe: BaseRecipe, data: SourcedDataset, size: int, large: int, *, on_gpu: bool
) -> Callable[[WayToChoose], float]:
    """Return a function for the price of a way to choose: its step over plain training's on b, in matrix products.

    Ways that pass nothing through the model cost 1.

    Args:
        recipe: recipe with model, checkpointing and replay.
        data: data, for mean length and share of labelled tokens.
        size: b.
        large: r.
        on_gpu: whether the run trains on a GPU.
    """
    job = _job(recipe, data, on_gpu)
    parameters: Any = None
    if job is not None:
        try:
            parameters = Planner().tracer(job.spec).parameters
        except (CoLMError, AttributeError, RuntimeError, ValueError):
            job = None  # the planner cannot read the model's shapes

    def price(way: WayToChoose) -> float:
        if not way.passes_model:
            return 1.0
        if job is not None:
            with_it = job.with_colm(selector=way.selector, probe=way.probe)
            plain = job.with_colm(selector="random")
            return step_cost(with_it, parameters, None).forwards / step_cost(plain, parameters, None).forwards
        lora, checkpointing = recipe.lora is not None, recipe.model.activation_checkpointing
        plain_step = step_forwards(size, lora=lora, checkpointing=checkpointing)
        replay = checkpointing and recipe.colm.replay != "off"
        return (
            step_forwards(size, lora=lora, checkpointing=checkpointing, replay=replay, probe=_PROBE * large)
            / plain_step
        )

    return price


def break_even(price: float, size: int, large: int) -> float:
    """Return the kappa at which a coreset without bias is worth its price: worth / b = price; 0 or less: never.

    Args:
        price: cost of a step over plain training's on b.
        size: b.
        large: r.
    """
    return (1.0 / (size * price) - 1.0 / large) / (1.0 / size - 1.0 / large)


def _job(recipe: BaseRecipe, data: SourcedDataset, on_gpu: bool) -> Job | None:
    """Return the recipe's run as a job for the planner, or None if it does not know the model."""
    try:
        return job_of_data(recipe, data, 1, on_gpu=on_gpu)
    except CoLMError:
        return None
