"""`colm-ds memory-report`: plain b, CoLM b of r, tokens b of 4 b and plain r under both protocols, and batch sizes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.launch import add_num_gpus
from colm_ds.recipes.recipe import BaseRecipe, expanded, load_recipe
from colm_ds.report import compare, format_table, load_run
from colm_ds.run_folder.contents import CONFIG
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.read import is_finished
from colm_ds.sweep import Grid, LaunchConfig, check_arms, default_ranks, jobs_of, run_jobs
from colm_ds.training.start_or_resume import recipe_differences

_FREE = ("name", "output_dir", "overwrite", "resume", "verbose", "monitor", "keep_last", "save_every")

_OF_EVERY_CHOICE = {
    *("seed", "memory", "loss_normalization", "micro_batch_tokens", "packing"),
    *("num_workers", "max_skipped_steps", "phase_timeout_s"),
}
"""Keys of `colm` that mean the same whatever chooses."""

COUNTED_STEPS = [2, 3, 4]
"""Steps whose allocations are counted without a GPU: lengths vary by step, and peaks with them."""

SIZE_STEPS = 6
"""Steps of a run for memory only; some are not counted and give the seconds."""


@dataclass(frozen=True)
class ArmPlan:
    """One run of the comparison.

    Attributes:
        name: name to show.
        large: examples that a step inspects.
        coreset: examples that it trains on.
        micro_batch: examples per rank and pass.
        selects: whether the recipe's selector runs; else plain training, or `by_tokens`.
        is_sized: whether it only runs for the picture of memory against batch size.
        by_tokens: whether token embeddings choose, without a pass of the model.
    """

    name: str
    large: int
    coreset: int
    micro_batch: int
    selects: bool
    is_sized: bool
    by_tokens: bool = False

    def changes(self, recipe: BaseRecipe) -> list[str]:
        """Return `key=value` changes to the recipe."""
        changes = [f"micro_batch_size={self.micro_batch}"]
        sizes = {"large_batch_size": self.large, "coreset_size": self.coreset}
        if self.selects:
            changes += [f"colm.{key}={value}" for key, value in sizes.items()]
        else:  # what the recipe says of its own choice may have no meaning without it
            choice = {"probe": {"estimator": "tokens"}} if self.by_tokens else {"selector": "full"}
            replay = {"replay": "off"} if recipe.colm.replay == "off" else {}
            section: dict[str, Any] = {**recipe.colm.model_dump(include=_OF_EVERY_CHOICE), **sizes, **choice, **replay}
            changes.append(f"colm={json.dumps(section)}")
        if self.is_sized:  # without evaluation and checkpoints
            changes += ["evaluation.every=0", "save_every=0", "monitor=[]"]
            for part, key, value in (
                ("data", "heldout", "null"),
                ("data", "holdout_per_source", "0"),
                ("evaluation", "exact_match", "false"),
            ):
                if hasattr(getattr(recipe, part, None), key):
                    changes.append(f"{part}.{key}={value}")
        return changes


def plan_arms(recipe: BaseRecipe, num_ranks: int, sizes: Sequence[int] | None = None) -> list[ArmPlan]:
    """Plan the runs: three arms, the third under both protocols, b of 4 b by tokens, then those of further batch sizes.

    Under equal accumulation steps a batch of n has the micro-batch n / (ranks x steps), with the recipe's steps.

    Args:
        recipe: CoLM b of r.
        num_ranks: ranks of a run.
        sizes: large batch sizes of the picture of memory against batch size; default: r/2, r and 2r.

    Raises:
        ConfigError: if the recipe does not select, or a size is impossible.
    """
    large, micro = recipe.colm.large_batch_size, recipe.micro_batch_size
    coreset = recipe.colm.coreset_size
    if coreset is None or coreset >= large or recipe.colm.selector in ("full", "random"):
        raise ConfigError(
            f"colm: selector {recipe.colm.selector!r}, coreset_size {coreset}, large_batch_size {large}: nothing is "
            "chosen, so there is nothing to compare. Give a recipe that selects b of r examples, with b < r."
        )
    steps = math.ceil(coreset / (num_ranks * micro))
    plans: dict[tuple[int, int, int, bool], ArmPlan] = {}

    def add(n: int, b: int, selects: bool, is_sized: bool) -> None:
        equal = math.ceil(b / (num_ranks * steps))
        name = f"{recipe.colm.selector} {b} of {n}" if selects else f"plain {n}"
        if selects and recipe.colm.selector == "colm":
            name = f"CoLM {b} of {n}"
        for size in (equal, micro):
            suffix = "" if equal == micro else f" (micro-batch {size})"
            plans.setdefault((n, b, size, selects), ArmPlan(name + suffix, n, b, size, selects, is_sized))

    for n, b, selects in ((coreset, coreset, False), (large, coreset, True), (large, large, False)):
        add(n, b, selects, False)
    if recipe.colm.probes_model:
        plans[4 * coreset, coreset, micro, False] = ArmPlan(
            f"tokens {coreset} of {4 * coreset}", 4 * coreset, coreset, micro, False, False, by_tokens=True
        )
    for n in sizes if sizes is not None else (large // 2, large, 2 * large):
        b = n * coreset // large
        if b < num_ranks or b * large != n * coreset:
            if sizes is None:
                continue
            part, least = large // math.gcd(coreset, large), math.ceil(num_ranks * large / coreset)
            raise ConfigError(
                f"sizes: {n} cannot be had: CoLM would train on {n * coreset / large:g} of them on {num_ranks} ranks. "
                f"Choose multiples of {part}, at least {least}."
            )
        add(n, b, True, True)
        add(n, n, False, True)
    return list(plans.values())


def run_arms(
    recipe_path: str,
    overrides: Sequence[str],
    out: Path,
    *,
    launch: LaunchConfig,
    sizes: Sequence[int] | None = None,
    size_steps: int = SIZE_STEPS,
    script: str | None = None,
) -> int:
    """Run the arms that are not finished and write the report.

    Args:
        recipe_path: the recipe.
        overrides: changes to it for all arms.
        out: folder of runs and report.
        launch: settings for starting runs.
        sizes: see `plan_arms`.
        size_steps: steps of the runs for memory only.
        script: a training script; None: `colm-ds train`.

    Returns:
        Number of failed runs.

    Raises:
        ConfigError: if the recipe does not fit, or a finished run is of another recipe.
    """
    recipe, common = load_recipe(recipe_path, overrides), [*overrides]
    if not _has_gpu() and not recipe.colm.memory.count_steps:
        common.append(f"colm.memory.count_steps={COUNTED_STEPS}")  # resident memory is uninformative for small models
        recipe = load_recipe(recipe_path, common)
    num_ranks = launch.num_gpus or default_ranks()
    plans = plan_arms(recipe, num_ranks, sizes)
    grids: dict[bool, Grid] = {}
    for is_sized in (False, True):
        members = [plan for plan in plans if plan.is_sized == is_sized]
        if not members:
            continue
        grids[is_sized] = Grid(
            recipe=recipe_path,
            out=str(out / ("sizes" if is_sized else "arms")),
            seeds=[recipe.seed],
            baseline=members[0].name,
            common=[*common, *([f"steps={size_steps}"] if is_sized else [])],
            arms={plan.name: plan.changes(recipe) for plan in members},
            launch=launch.model_copy(update={"num_gpus": num_ranks}),
            script=script,
        )
        check_arms(grids[is_sized])
    failed, folders = 0, {}
    for is_sized, grid in grids.items():
        jobs = jobs_of(grid)
        for job in jobs:
            _check_same(job.folder, load_recipe(job.arguments[0], job.arguments[1:]))
        failed += len(run_jobs(grid, jobs, lambda text: print(f"memory_report: {text}", flush=True)))
        folders[is_sized] = [job.folder for job in jobs if is_finished(job.folder)]
    if not folders.get(False):
        raise ConfigError(f"{out}: no arm finished. The logs beside the runs' folders in {out / 'arms'} say why.")
    runs, sized = ([load_run(folder) for folder in folders.get(key, [])] for key in (False, True))
    compare(runs, out, sized=sized)
    print(format_table(runs))
    return failed


def _check_same(folder: Path, recipe: BaseRecipe) -> None:
    """Raise unless a finished run is the one that would be run."""
    if not is_finished(folder):
        return
    before = read_object(folder / CONFIG).get("recipe", {})
    differences = recipe_differences(before, recipe, _FREE)
    if differences:
        listed = "\n  ".join(differences)
        raise ConfigError(
            f"{folder}: holds a finished run of another recipe.\n  {listed}\n"
            "  Choose another OUT, remove that folder, or put the recipe back."
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, changes, and options for running its arms."""
    parser.add_argument("recipe", help="YAML file of CoLM b of r")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe, for all arms"
    )
    parser.add_argument("--out", type=Path, help="folder of runs and report (default: runs/memory_report/RECIPE)")
    add_num_gpus(parser, "one per GPU, two without any")
    parser.add_argument("--sizes", type=int, nargs="*", metavar="R", help="large batch sizes (default: r/2, r, 2r)")
    parser.add_argument(
        "--size-steps", type=int, default=SIZE_STEPS, help=f"steps of runs for the batch sizes ({SIZE_STEPS})"
    )
    parser.add_argument("--script", help="a training script of your own (default: colm-ds train)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the arms that are not finished and write the report.

    Returns:
        1 if a run failed, 3 if it was stopped, else 0.

    Raises:
        ConfigError: see `run_arms`.
    """
    out = Path(expanded(options.out)) if options.out else Path("runs/memory_report") / Path(options.recipe).stem
    try:
        failed = run_arms(
            options.recipe,
            options.overrides,
            out,
            launch=LaunchConfig(num_gpus=options.num_gpus, device_groups=None, master_port=options.port),
            sizes=options.sizes,
            size_steps=options.size_steps,
            script=options.script,
        )
    except KeyboardInterrupt:
        print("memory_report: stopped; the same command resumes", file=sys.stderr)
        return ExitCode.STOPPED
    print(f"memory_report: {out}/report.html")
    return ExitCode.FAILED if failed else ExitCode.DONE
