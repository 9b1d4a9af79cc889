"""Make the token store of a recipe: python pretrain/prepare.py RECIPE --data FILE_OR_FOLDER ... [key=value ...]"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for bad input."""
    parser = argparse.ArgumentParser(
        description="Tokenise files in the Pile's format (.jsonl, .jsonl.gz, .jsonl.zst) into the store of a recipe "
        "(data.store), with a held-out part and, unless one is named, a tokenizer of its own. A run that was stopped "
        "goes on with the same command; the store does not depend on the number of processes.",
        epilog="The recipe's keys: data.store, data.weights, data.chunk_tokens and those of prepare "
        "(python pretrain/train.py --help).",
    )
    parser.add_argument("recipe", help="YAML file, for example pretrain/recipes/cpu_pile5.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, e.g. prepare.holdout=0.05")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PLACE", help=".jsonl, .jsonl.gz, .jsonl.zst, folders"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="that tokenise (default: one per core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what another preparation left in the folder")
    options = parser.parse_intermixed_args(arguments)
    places, changes = _sorted_out(options.data)
    if not places:
        parser.error(f"--data: {' '.join(changes)} names no file or folder")

    from colm_ds.data.pretraining.store_preparation import Preparation, prepare
    from colm_ds.data.pretraining.store_table import format_table
    from colm_ds.errors import CoLMError, ConfigError
    from colm_ds.recipes.recipe import PretrainingRecipe, load_recipe

    try:
        recipe = load_recipe(options.recipe, [*options.overrides, *changes])
        if not isinstance(recipe, PretrainingRecipe):
            raise ConfigError(f"{options.recipe}: not a recipe for pretraining (task: pretraining).")
        if options.processes < 1:
            raise ConfigError(f"--processes {options.processes}: must be at least 1.")
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
        store = prepare(wanted, options.processes, overwrite=options.overwrite, say=_say)
        print(format_table(store, data.chunk_tokens, data.weights))
    except CoLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 3
    return 0


def _sorted_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and folders among the words behind --data, and changes to the recipe that were written after them."""
    changes = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word) and not Path(word).exists()]
    return [word for word in words if word not in changes], changes


def _say(message: str) -> None:
    print(f"prepare: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
