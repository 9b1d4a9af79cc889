"""A recipe is validated where it is read; what a run, a plan or a preview is made from are its sections themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from colm_ds.config import colm
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.planner.job import job_of_recipe
from colm_ds.process.stop_request import StopRequest
from colm_ds.recipes.recipe import BaseRecipe, load_recipe
from colm_ds.training.preview import preview
from colm_ds.training.run import TrainingRun
from tests.ranks import Ranks
from tests.training.test_bad_input import recipe_of


@contextmanager
def validations_counted() -> Iterator[list[Any]]:
    """Note what every `CoLMSection` is validated from: each validation fills in the preset first."""
    seen: list[Any] = []
    fill_in = colm.with_preset

    def noted(values: Any) -> Any:
        seen.append(values)
        return fill_in(values)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(colm, "with_preset", noted)
        yield seen


def validations(path: Path, *overrides: str, use: Callable[[BaseRecipe], object]) -> int:
    """Read a recipe, use it, and return how often a `"colm"` section was validated meanwhile."""
    with validations_counted() as seen:
        use(load_recipe(path, overrides))
    return len(seen)


def set_up(recipe: BaseRecipe) -> None:
    """Everything that a run does before its first step."""
    run = TrainingRun(recipe, torch.device("cpu"), StopRequest())
    section = run.engine.config.colm
    run.engine.destroy()
    assert run.folder is not None
    run.folder.close()
    assert section == recipe.colm_of_run


def validations_of_a_run(path: Path, *overrides: str) -> int:
    """In a rank: those until the first step could be taken."""
    return validations(path, *overrides, use=set_up)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small recipe and its data."""
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tmp_path)), encoding="utf-8")
    return path


def test_counting_sees_a_section_that_is_dumped_and_read_again() -> None:
    with validations_counted() as seen:
        section = colm.CoLMSection.model_validate({"large_batch_size": 16, "coreset_size": 8})
        colm.CoLMSection.model_validate(section.model_dump())
    assert len(seen) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("overrides", [(), ("clusters.warmup_steps=1",)], ids=["plain", "clusters"])
def test_of_a_run(recipe: Path, overrides: tuple[str, ...], pools: dict[int, Ranks]) -> None:
    assert pools[1].run(validations_of_a_run, recipe, *overrides) == [1]


def test_of_a_plan(recipe: Path) -> None:
    assert validations(recipe, use=lambda read: job_of_recipe(read, 2, on_gpu=False)) == 1


@pytest.mark.parametrize("overrides", [(), ("colm.selector=full", "colm.coreset_size=null")], ids=["colm", "full"])
def test_of_a_preview(recipe: Path, overrides: tuple[str, ...]) -> None:
    assert validations(recipe, *overrides, use=lambda read: preview(read, num_examples=0)) == 1
