"""`colm-ds score`: write the table of reference losses for the selector `rho_loss`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from colm_ds.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, changes and options."""
    parser.add_argument("recipe", help="YAML file: the data to score")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument("--out", required=True, metavar="FILE", help="table to write, for colm.options.table")
    parser.add_argument("--model", metavar="PLACE", help="reference model: folder or hub name, of the same tokenizer")
    parser.add_argument("--at", metavar="CHECKPOINT", help="or a run or checkpoint of the recipe's own model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Score every training example and write the table.

    Raises:
        ConfigError, DataError, ProbeError: as training would, or unless one reference model is named.
    """
    if (options.model is None) == (options.at is None):
        raise ConfigError(
            "colm-ds score: name one reference model: --model FOLDER_OR_HUB_NAME, or --at RUN for this recipe's own."
        )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed does not train here
    from colm_ds.recipes.data_check import load_checked_recipe

    recipe = load_checked_recipe(  # first: a typo is said before torch is imported
        options.recipe, options.overrides, loads_model=options.model is None
    )
    import torch

    from colm_ds.choose.scored_model import load_reference_model, load_scored_model
    from colm_ds.engine.reference_losses import write_reference_losses
    from colm_ds.models.model_fit import check_model_fits
    from colm_ds.probe.of_examples import signals_of_examples
    from colm_ds.recipes.model import load_tokenizer, quiet_libraries
    from colm_ds.run_folder.files import check_can_write
    from colm_ds.training.tasks import data_digest, load_task

    quiet_libraries()
    check_can_write(Path(options.out))
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    task = load_task(recipe, tokenizer)
    if options.model is not None:
        model = load_reference_model(recipe, tokenizer, options.model)
    else:
        model = load_scored_model(recipe, tokenizer, options.at)
    check_model_fits(model, task.train)
    signals = signals_of_examples(model, task.train, task.train.lengths, recipe.colm.probe, "loss", progress=True)
    assert signals.vectors is not None
    losses = torch.where(signals.finite, signals.vectors[:, 0], torch.nan)
    made_by = {"reference": options.model or options.at, "recipe": str(options.recipe)}
    write_reference_losses(Path(options.out), losses, data_digest(task), made_by)
    known = losses[signals.finite]
    mean = f", mean {float(known.mean()):.4f} nats" if len(known) else ""
    print(f"{options.out}: losses of {len(known):,} of {len(losses):,} examples{mean}")
