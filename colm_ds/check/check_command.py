"""`colm-ds check`: its arguments and output."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from colm_ds.errors import ConfigError
from colm_ds.untrusted.printable import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, changes and options."""
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="examples whose gradients are measured, at least 2 r (default: the larger of 256 and 4 r)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=30,
        metavar="K",
        help="minimum number of large batches drawn from them (default: 30); more give smaller standard errors",
    )
    parser.add_argument(
        "--at",
        metavar="CHECKPOINT",
        help="folder of a run of this recipe, or of one of its checkpoints (RUN/checkpoints/step_200): measure with "
        "the weights trained until then (default: as training begins)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder for check.json and check.svg (default: the recipe's output_dir with _check appended)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="padded tokens of one pass through the model: the lever on memory, as activations of all layers are "
        "kept (default: 1024)",
    )
    parser.add_argument(
        "--all-selectors",
        action="store_true",
        help="measure the baselines and the other systems of docs/SELECTORS.md too: two more passes over the examples",
    )
    parser.add_argument("--target", metavar="FILE", help="records for those of them that compare with a target")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Check a recipe, print the table and write the files.

    Raises:
        ConfigError: if an option or the recipe cannot work.
    """
    for name, least in (("examples", 2), ("batches", 2), ("max_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: less than {least}.")
    if options.target is not None and not options.all_selectors:
        raise ConfigError("--target is for the selectors of --all-selectors. Add that, or leave --target out.")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed does not train here
    from colm_ds.recipes.data_check import load_checked_recipe

    recipe = load_checked_recipe(options.recipe, options.overrides)  # first: a typo is said before torch is imported
    from colm_ds.check.measure import check_recipe
    from colm_ds.check.report_of_check import format_check, write_check
    from colm_ds.recipes.model import quiet_libraries
    from colm_ds.run_folder.files import check_can_write

    quiet_libraries()
    folder = Path(options.out) if options.out else Path(f"{recipe.output_dir.rstrip('/')}_check")
    check_can_write(folder / "check.json")
    result = check_recipe(
        recipe,
        num_examples=options.examples,
        num_batches=options.batches,
        at=options.at,
        max_tokens=options.max_tokens,
        all_selectors=options.all_selectors,
        target=options.target,
        progress=True,
    )
    print(visible(format_check(result)))
    write_check(result, folder)
    print(f"Numbers and picture: {folder}/check.json, {folder}/check.svg")
