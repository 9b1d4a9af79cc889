"""Compare signals by kappa at a checkpoint: token vectors, the gradient of the last V projection, the true gradient.

    python benchmarks/signals_along_a_run.py RUN/checkpoints/step_50 data.train=TRAIN.jsonl.gz seed=2 lora=... colm=...

Overrides are those of the run. Medoids of one pool by euclidean distance, matched weights, for every signal. The true
gradient is that of all trained matrices together: what this rule makes of all that there is to know. It is no bound, as
another signal can by chance, or by being simpler, lead the same rule to better picks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from result_file import write_result
from token_signal import RECIPE, Variant, choose
from torch import Tensor

from colm_ds.check.errors_of_coresets import GradientGram, LargeBatches, coreset_error
from colm_ds.check.measure import checked_section
from colm_ds.check.sample import measure_sample
from colm_ds.engine.token_table import occurring_ids
from colm_ds.export.run import load_at
from colm_ds.probe.tokens import example_features, vectors_of_model, vocabulary_size
from colm_ds.recipes.model import load_tokenizer, quiet_libraries
from colm_ds.recipes.recipe import load_recipe
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.training.tasks import load_task

SIZES = ("8:16", "8:32", "8:64")
COMPONENTS = (8, 32)


def coordinates(products: Tensor) -> Tensor:
    """Return vectors with these inner products, float32 `[N, at most N]`."""
    values, vectors = torch.linalg.eigh(products.double())
    kept = values > 1e-12 * values.max()
    return (vectors[:, kept] * values[kept].sqrt()).float()


def principal(rows: Tensor, number: int) -> Tensor:
    """Return the coordinates of rows along their first principal directions, `[N, number]`."""
    return rows @ torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[:number].T


def measure(
    gram: GradientGram, signals: dict[str, Tensor], sizes: list[tuple[int, int]], num_batches: int
) -> list[dict[str, Any]]:
    """Return a row for every signal and size."""
    rows = []
    for name, vectors in signals.items():
        for size, large in sizes:
            batches = LargeBatches.draw(len(vectors), large, num_batches, seed=0)
            error = coreset_error(
                gram, batches, [choose(vectors[batch], size, Variant(name)) for batch in batches.examples]
            )
            rows.append({"signal": name, "b": size, "r": large, "batches": len(batches.examples), **vars(error)})
            del rows[-1]["deviations"]
            print(f"{name:30s} {size} of {large}  kappa {error.kappa:.2f} ± {error.kappa_se:.2f}  {error.bias:+.3f}")
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("at", help="run or checkpoint; none: the weights as training begins")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, those of the run")
    parser.add_argument("--recipe", default=str(RECIPE), help="YAML file (SmolLM2-135M on the math mixture)")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="b:r", help=f"({' '.join(SIZES)})")
    parser.add_argument("--examples", type=int, default=256, help="examples whose gradients are measured (256)")
    parser.add_argument("--batches", type=int, default=60, help="minimum number of large batches of each size (60)")
    parser.add_argument("--out", type=Path, help="JSON (none)")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    recipe = load_recipe(options.recipe, options.overrides)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    data = load_task(recipe, tokenizer).train
    first, _ = load_at(recipe, tokenizer, None)
    occurs = occurring_ids(data, vocabulary_size(first), SINGLE_PROCESS, 0)
    vectors = vectors_of_model(first, recipe.seed, SINGLE_PROCESS, occurs)
    model, weights = load_at(recipe, tokenizer, None if options.at == "none" else options.at)
    measured = measure_sample(model, checked_section(recipe), data, options.examples, progress=True)
    assert measured.exact is not None
    true = coordinates(measured.gram.products)
    signals = {
        "tokens": example_features(measured.sample.examples, vectors, recipe.colm.probe.length_power),
        "exact, the last V projection": coordinates(measured.exact.double() @ measured.exact.double().T),
        "the true gradient": true,
        **{f"the true gradient, {number} components": principal(true, number) for number in COMPONENTS},
    }
    sizes = [(int(size), int(large)) for size, _, large in (each.partition(":") for each in options.sizes)]
    rows = measure(measured.gram, signals, sizes, options.batches)
    everything = torch.arange(len(true))
    noise = measured.gram.variance(everything) / measured.gram.mean_square()
    if options.out is not None:
        facts = {"weights": weights.rpartition(", ")[2], "examples": len(true), "modules": measured.num_modules}
        write_result(options.out, "signals_along_a_run", **facts, noise=noise, rows=rows)


if __name__ == "__main__":
    main()
