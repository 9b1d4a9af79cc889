"""`colm-ds train`: its arguments and exit code."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress

from colm_ds.process.launch import accelerator_environment, add_num_gpus
from colm_ds.recipes.data_check import load_checked_recipe
from colm_ds.recipes.recipe import RECIPES, BaseRecipe, describe_keys
from colm_ds.run_folder.read import check_not_finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe and changes, and list every key of a recipe below the help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(_keys())
    parser.add_argument(
        "recipe", help="YAML file, for example finetune/recipes/demo.yaml or pretrain/recipes/demo.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes, e.g. steps=20 colm.coreset_size=8"
    )
    add_num_gpus(parser, "the ranks of the launcher that started this, else one")
    parser.set_defaults(run=run, check=_read)


def run(options: argparse.Namespace) -> None:
    """Train, and exit with an `ExitCode`. A process that is alone reads recipe and data before it imports torch."""
    is_rank = "RANK" in os.environ or "MASTER_ADDR" in os.environ  # ranks read it together, and one says the error
    recipe = options.recipe if is_rank else _read(options)
    os.environ.update(accelerator_environment())
    from colm_ds.process.exit import exit_process
    from colm_ds.training.run import run as train

    try:
        train(recipe, options.overrides)
    except SystemExit as end:
        exit_process(end.code)
    exit_process(0)


def _read(options: argparse.Namespace) -> BaseRecipe:
    recipe = load_checked_recipe(options.recipe, options.overrides)
    if not recipe.overwrite:
        with suppress(OSError):  # a name that cannot be read: said by who makes the folder
            check_not_finished(recipe.output_dir)
    return recipe


def _keys() -> list[str]:
    """List the keys of the first kind of recipe, then those that other kinds add or change."""
    (_, kind), *others = RECIPES.items()
    shared = describe_keys(kind)
    lines = ["Keys of a recipe (default): what they do", *shared]
    for task, other in others:
        lines += ["", f"With task: {task} instead or besides", *(k for k in describe_keys(other) if k not in shared)]
    return lines
