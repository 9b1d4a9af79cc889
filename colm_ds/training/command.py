"""The command line of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from colm_ds.recipes.recipe import BaseRecipe, describe_keys


def train_command(arguments: Sequence[str] | None, kind: type[BaseRecipe], description: str, example: str) -> None:
    """Parse, run and end this process; the recipe's `task` says what is trained on.

    Args:
        arguments: the command line; None: this process's.
        kind: of the recipes whose keys the help shows.
        description: of the program.
        example: a recipe to name.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Keys of a recipe (default): what they do\n" + "\n".join(describe_keys(kind)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help=f"YAML file, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, e.g. steps=20 colm.coreset_size=8")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    options = parser.parse_args(arguments)

    from colm_ds.process.exit import leave
    from colm_ds.training.run import run

    try:
        run(options.recipe, options.overrides)
    except SystemExit as end:
        leave(end.code)
    leave(0)
