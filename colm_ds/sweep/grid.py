"""Grids: arms, seeds, and the runs that they define."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from colm_ds.config.section import Section, validate_section
from colm_ds.errors import ConfigError, Problems
from colm_ds.recipes.recipe import change_of, expanded, no_such_file
from colm_ds.untrusted.yaml_text import read_yaml


class LaunchConfig(Section):
    """Settings for starting runs."""

    num_gpus: int | None = Field(None, ge=1, description="ranks of a run; default: one per GPU, two without any")
    parallel: int = Field(1, ge=1, description="runs at a time, each with its share of the processor's cores")
    device_groups: list[str] | None = Field(
        None, description='instead: runs at a time, each on its own GPUs, for example ["0,1", "2,3"]'
    )
    master_port: int = Field(29640, ge=1, le=65000, description="port of the first run; each group takes the next one")


class Grid(Section):
    """A sweep."""

    recipe: str = Field(description="recipe that all arms start from; relative to the grid file or to here")
    out: str = Field(description="folder of the tables; relative to the working folder")
    runs: str | None = Field(None, description="folder of the runs, which grids may share; default: out")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of every arm")
    baseline: str = Field(description="the arm that the others are compared with")
    controls: list[str] = Field(
        [], description="further arms that all are compared with, in a separate table of paired differences"
    )
    prepare: dict[str, str] = Field(
        {}, description="before the arms, in order: a path that must exist, and the Python command that makes it"
    )
    common: list[str] = Field([], description="key=value changes to the recipe for all arms")
    arms: dict[str, list[str]] = Field(min_length=1, description="key=value changes to the recipe, by arm")
    launch: LaunchConfig = LaunchConfig()
    script: str | None = Field(None, description="a training script of your own; default: colm-ds train")
    evaluate: str | None = Field(None, description="after each run: options of colm-ds evaluate, e.g. --tasks math")


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep.

    Attributes:
        arm: its arm.
        seed: its seed.
        folder: folder of the run.
        arguments: arguments of the script.
    """

    arm: str
    seed: int
    folder: Path
    arguments: list[str]

    @property
    def log(self) -> Path:
        """File of the run's output."""
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def record(self) -> Path:
        """File with the definition of the run in the folder."""
        return self.folder.parent / f"{self.folder.name}.asked.json"

    @property
    def evaluation_record(self) -> Path:
        """File with the options of the evaluation in the folder, and whether it came to its end."""
        return self.folder.parent / f"{self.folder.name}.evaluated.json"


def load_grid(
    path: str | Path, changes: Sequence[str] = (), seeds: Sequence[int] = (), parallel: int | None = None
) -> Grid:
    """Read and check a grid.

    Args:
        path: the YAML file.
        changes: further key=value changes to the recipe, for all arms.
        seeds: seeds to use instead of the grid's.
        parallel: runs at a time, instead of the grid's.

    Raises:
        ConfigError: listing every problem found.
    """
    path = Path(path)
    try:
        loaded = read_yaml(path)
    except FileNotFoundError:
        raise no_such_file(path, "grid") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as a grid: {error}. Write a YAML file.") from None
    problems = Problems(str(path))
    grid = validate_section(Grid, loaded if isinstance(loaded, dict) else {}, "", problems)
    problems.raise_if_any()
    assert isinstance(grid, Grid)
    if grid.baseline not in grid.arms:
        problems.add("baseline", grid.baseline, "not an arm", f"Choose one of {', '.join(map(repr, grid.arms))}.")
    for name in [name for name in grid.controls if name not in grid.arms]:
        problems.add("controls", name, "not an arm", f"Choose of {', '.join(map(repr, grid.arms))}.")
    by_folder: dict[str, str] = {}
    for name in grid.arms:
        first = by_folder.setdefault(_slug(name), name)
        if first != name:
            problems.add(
                "arms", name, f"its runs would be those of {first!r}", "Let them differ in letters or digits too."
            )
    recipe = next((place for place in (Path(grid.recipe), path.parent / grid.recipe) if place.exists()), None)
    if recipe is None:
        problems.add("recipe", grid.recipe, "no such file", f"Looked for in the working folder and in {path.parent}.")
    for change in [change for change in changes if "=" not in change]:
        problems.add("change", change, "not of the form key=value", "For example steps=20.")
    launch = grid.launch if parallel is None else grid.launch.model_copy(update={"parallel": parallel})
    if launch.parallel < 1:
        problems.add("launch.parallel", launch.parallel, "must be at least 1", "For example 2.")
    if launch.device_groups and launch.parallel > 1:
        problems.add("launch.parallel", launch.parallel, "there are device groups", "Remove one of the two.")
    problems.raise_if_any()
    out, runs = (value if value is None else expanded(value) for value in (grid.out, grid.runs))
    updates = {
        "recipe": str(recipe),
        "out": out,
        "runs": runs,
        "common": [*grid.common, *changes],
        "seeds": list(seeds) or grid.seeds,
    }
    return grid.model_copy(update={**updates, "launch": launch})


def jobs_of(grid: Grid) -> list[SweepJob]:
    """Return all runs, seed by seed, so that a stopped sweep has complete comparisons."""
    jobs = []
    for seed in grid.seeds:
        for arm, changes in grid.arms.items():
            folder = Path(grid.runs or grid.out) / _slug(arm) / f"seed_{seed}"
            own = [
                f"name={json.dumps(arm, ensure_ascii=False)}",
                change_of("output_dir", folder),
                f"seed={seed}",
                f"colm.seed={seed}",
            ]
            jobs.append(SweepJob(arm, seed, folder, [grid.recipe, *grid.common, *changes, *own, "overwrite=false"]))
    return jobs


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name).strip("_").lower()
