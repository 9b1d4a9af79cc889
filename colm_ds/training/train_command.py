"""`colm-ds train`: its arguments and exit code."""

from __future__ import annotations

import argparse

from colm_ds.process.launch import add_num_gpus


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
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and exit with an `ExitCode`."""
    from colm_ds.process.exit import exit_process
    from colm_ds.training.run import run as train

    try:
        train(options.recipe, options.overrides)
    except SystemExit as end:
        exit_process(end.code)
    exit_process(0)


def _keys() -> list[str]:
    """List the keys of the first kind of recipe, then those that other kinds add or change."""
    from colm_ds.recipes.recipe import RECIPES, describe_keys

    (_, kind), *others = RECIPES.items()
    shared = describe_keys(kind)
    lines = ["Keys of a recipe (default): what they do", *shared]
    for task, other in others:
        lines += ["", f"With task: {task} instead or besides", *(k for k in describe_keys(other) if k not in shared)]
    return lines
