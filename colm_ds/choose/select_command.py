"""`colm-ds select`: choose once from a recipe's data and write an index file for `data.subset`."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, changes and options."""
    parser.add_argument("recipe", help="YAML file, task: instructions")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument("--method", required=True, choices=("ccs", "simcore", "goracs", "vector_sum"), help="selector")
    parser.add_argument("--size", required=True, metavar="N", help="examples to choose, or a share such as 0.1")
    parser.add_argument("--out", required=True, metavar="FILE", help="index file to write, JSON")
    parser.add_argument("--target", metavar="FILE", help="records to be near to (simcore, goracs)")
    parser.add_argument(
        "--shares",
        default="whole",
        choices=("whole", "proportional", "fair", "target"),
        help="among sources: not at all, by size, between that and alike, or as in the target (default: whole)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="name=value",
        help="option of the selector, see its page in docs/selectors; may be repeated",
    )
    parser.add_argument(
        "--at", metavar="CHECKPOINT", help="folder of a run or checkpoint: use the weights trained there"
    )
    parser.add_argument("--no-cache", action="store_true", help="do not keep the signals in data.cache_dir")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Choose, write the index file, and print counts by source.

    Raises:
        ConfigError, DataError, ProbeError: as training would, or if an option cannot work.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed does not train here
    from colm_ds.recipes.data_check import load_checked_recipe
    from colm_ds.recipes.recipe import Recipe

    recipe = load_checked_recipe(options.recipe, options.overrides)  # first: a typo is said before torch is imported
    import torch
    import yaml

    from colm_ds.choose.features import cached_signals
    from colm_ds.choose.one_shot import choose_once
    from colm_ds.choose.scored_model import load_scored_model
    from colm_ds.data.subset import write_subset
    from colm_ds.models.model_fit import check_model_fits
    from colm_ds.recipes.model import load_tokenizer, quiet_libraries
    from colm_ds.run_folder.files import check_can_write
    from colm_ds.selection import needs_of, wrong_options
    from colm_ds.training.tasks.instructions import load_data, load_target

    quiet_libraries()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{options.recipe}: colm-ds select chooses from instruction data. Give such a recipe.")
    if recipe.data.subset is not None:
        raise ConfigError(f"data.subset = {recipe.data.subset}: choose from all of the data. Remove it.")
    chosen_options: dict[str, Any] = {}
    for text in options.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: not of the form name=value.")
        try:
            chosen_options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--option {text}: {value!r} is no YAML value.") from None
    wrong = wrong_options(options.method, chosen_options)
    if wrong:
        lines = [f"--option {one.name} = {one.value!r}: {one.why}. {one.fix}" for one in wrong]
        raise ConfigError("\n  ".join([f"--method {options.method}", *lines]))
    needs = needs_of(options.method, chosen_options)
    if needs.target != (options.target is not None):
        fix = "Give --target FILE" if needs.target else "Leave it out"
        raise ConfigError(
            f"--target {options.target}: --method {options.method} needs {'one' if needs.target else 'none'}. {fix}."
        )
    if options.shares == "target" and options.target is None:
        raise ConfigError("--shares target: there is no target. Choose another.")
    check_can_write(Path(options.out))
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    train, heldout = load_data(recipe, tokenizer)
    size = _size(options.size, len(train))
    probe = recipe.colm.probe
    if needs.signal == "gradient":
        probe = probe.model_copy(update={"estimator": "sketch", "refresh": "run", "num_probes": "auto"})
    model = load_scored_model(recipe, tokenizer, options.at)
    check_model_fits(model, train)
    cache = None if options.no_cache or recipe.data.cache_dir is None else Path(recipe.data.cache_dir).expanduser()
    arguments: dict[str, Any] = {"folder": cache, "seed": recipe.colm.seed, "progress": True}
    signals = cached_signals(model, train, train.digest(), probe, needs.signal or "loss", needs.also, **arguments)
    shares: list[float] = []
    if options.target is not None:
        named = recipe.colm.target.model_copy(update={"data": options.target})
        wanting = recipe.model_copy(update={"colm": recipe.colm.model_copy(update={"target": named})})
        target, _ = load_target(wanting, tokenizer, train, heldout)
        assert target is not None
        near = cached_signals(model, target, target.digest(), probe, needs.signal or "loss", needs.also, **arguments)
        signals = replace(signals, target=near.vectors, target_indices=range(len(target)))
        wanted = target.source_counts()
        shares = [wanted.get(name, 0) / len(target) for name in train.source_names]
        if options.shares == "target" and sum(shares) < 1.0 - 1e-9:
            missing = [name for name, count in wanted.items() if count and name not in train.source_names]
            raise ConfigError(f"--shares target: the data has no source {', '.join(missing)}. Choose another.")
    sources = torch.from_numpy(train.source_ids.astype("int64"))
    indices = choose_once(
        options.method,
        size,
        sources,
        signals,
        shares=options.shares,
        options=chosen_options,
        target_shares=shares,
        seed=recipe.colm.seed,
    )
    counts = torch.bincount(sources[indices], minlength=len(train.source_names)).tolist()
    by_source = dict(zip(train.source_names, counts, strict=True))
    facts = {
        "method": options.method,
        "options": chosen_options,
        "shares": options.shares,
        "target": options.target,
        "weights": options.at or "as training begins",
        "num_examples": len(train),
        "num_nonfinite": int((~signals.finite).sum()),
        "counts": by_source,
    }
    write_subset(Path(options.out), indices, train.digest(), facts)
    for name, total in train.source_counts().items():
        print(f"{name}: {by_source[name]:,} of {total:,}")
    print(f"{options.out}: {len(indices):,} of {len(train):,} examples. Train with data.subset={options.out}")


def _size(text: str, num_examples: int) -> int:
    """Return how many examples a number, or a share below 1, asks for."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"--size {text}: not a number. For example 1000, or 0.1 for a tenth.")
    size = round(number * num_examples) if 0.0 < number < 1.0 else int(number)
    if not 1 <= size <= num_examples or (number >= 1.0 and number != size):
        raise ConfigError(f"--size {text}: choose a whole number from 1 to {num_examples}, or a share below 1.")
    return size
