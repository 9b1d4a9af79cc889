"""`colm-ds prepare`: the token store of a pretraining recipe."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from colm_ds.errors import ConfigError
from colm_ds.process.cores import usable_cores
from colm_ds.process.exit_codes import ExitCode
from colm_ds.untrusted.printable import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, changes, data and processes."""
    parser.epilog = (
        "The recipe's keys: data.store, data.weights, data.chunk_tokens and those of prepare (colm-ds train --help)."
    )
    parser.add_argument("recipe", help="YAML file, for example pretrain/recipes/cpu_pile5.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes, e.g. prepare.holdout=0.05"
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PLACE", help=".jsonl, .jsonl.gz, .jsonl.zst, folders"
    )
    parser.add_argument(
        "--processes", type=int, default=usable_cores(), help="processes that tokenise (default: one per core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what another preparation left in the folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prepare the store and print its table.

    Raises:
        ConfigError: if recipe, files and the store's folder contradict each other.
        DataError: for files that cannot be used.
    """
    from colm_ds.recipes.recipe import PretrainingRecipe, load_recipe

    places, changes = places_and_changes(options.data)
    if not places:
        raise ConfigError(f"--data: {' '.join(changes)} names no file or folder.")
    recipe = load_recipe(options.recipe, [*options.overrides, *changes])
    if not isinstance(recipe, PretrainingRecipe):
        raise ConfigError(f"{options.recipe}: not a recipe for pretraining (task: pretraining).")
    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be at least 1.")
    from colm_ds.data.pretraining.store_preparation import Preparation, prepare
    from colm_ds.data.pretraining.store_table import format_table

    asked, data = recipe.prepare, recipe.data
    wanted = Preparation(
        places,
        Path(data.store),
        tokenizer=asked.tokenizer,
        vocabulary_size=asked.vocabulary_size,
        weights=data.weights,
        skip_others=asked.skip_other_sources,
        holdout=asked.holdout,
        max_bad_fraction=asked.max_bad_fraction,
        sample_mb=asked.sample_mb,
        seed=asked.seed,
    )
    try:
        store = prepare(wanted, options.processes, overwrite=options.overwrite, say=_say)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return ExitCode.STOPPED
    print(visible(format_table(store, data.chunk_tokens, data.weights)))
    return ExitCode.DONE


def places_and_changes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words after --data into files and folders, and changes to the recipe that follow them."""
    changes = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word) and not Path(word).exists()]
    return [word for word in words if word not in changes], changes


def _say(message: str) -> None:
    print(visible(f"prepare: {message}"), file=sys.stderr, flush=True)
