"""Compare variants of the estimator `tokens` by kappa: width of its vectors, power of the length, ridge and bound.

    python benchmarks/token_signal.py data.train=PATH/TO/math_instruct/train.jsonl.gz      # 20 minutes on two cores

The recipe's model, all its matrices trained (no adapter): the gradients of some hundred examples are measured once, as
`colm-ds check` does, and every variant chooses from the same large batches: medoids of one pool, matched weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colm_ds.check.errors_of_coresets import GradientGram, LargeBatches, coreset_error
from colm_ds.check.measure import checked_section
from colm_ds.check.sample import DrawnSample, measure_sample
from colm_ds.engine.token_table import occurring_ids
from colm_ds.probe.tokens import (
    WIDTH,
    counted_tokens,
    features,
    mean_vectors,
    random_vectors,
    token_vectors,
    vocabulary_size,
)
from colm_ds.recipes.model import load_model, load_tokenizer, quiet_libraries
from colm_ds.recipes.recipe import load_recipe
from colm_ds.run_folder.environment import describe_environment
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.selection.large_pools import pick_medoids
from colm_ds.selection.weights import MAX_WEIGHT, RIDGE, matched_weights
from colm_ds.training.tasks import load_task
from colm_ds.types import Coreset

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "finetune" / "recipes" / "smollm2_math_tokens.yaml"
SIZES = ("8:32", "32:64", "32:128", "64:256")
POWERS = {"0": 0.0, "1/3": 1 / 3, "1/2": 0.5, "1": 1.0}
USUAL_POWER = "1/3"


@dataclass(frozen=True)
class Variant:
    """A signal, and how its weights are matched."""

    vectors: str
    power: str = USUAL_POWER
    ridge: float = RIDGE
    bound: float = MAX_WEIGHT


def variants() -> Iterator[Variant]:
    """Yield the variants: one thing is changed at a time."""
    for vectors in ("64", "128", "256", "512", "whole", "256, over the vocabulary", "256, random"):
        for power in (USUAL_POWER, "1/2"):
            yield Variant(vectors, power)
    for power in ("0", "1"):
        yield Variant(str(WIDTH), power)
    for ridge in (0.01, 0.03, 0.3):
        yield Variant(str(WIDTH), ridge=ridge)
    for bound in (2.0, 8.0):
        yield Variant(str(WIDTH), bound=bound)


def make_means(embedding: Tensor, occurs: Tensor, sample: DrawnSample, seed: int) -> Callable[[str], Tensor]:
    """Return a function for the sample's mean vectors, float16 `[N, K]`, by the vectors' name."""
    known: dict[str, Tensor] = {}

    def standardised() -> Tensor:
        counted = embedding[occurs].double()
        return ((embedding.double() - counted.mean(dim=0)) / counted.std(dim=0, correction=0)).float()

    def means(name: str) -> Tensor:
        if name not in known:
            width, _, kind = name.partition(", ")
            if kind == "random":
                vectors = random_vectors(len(embedding), seed, int(width))
            elif width == "whole":
                vectors = standardised()
            else:
                vectors = token_vectors(embedding, seed, int(width), None if kind else occurs)
            known[name] = mean_vectors(sample.examples, vectors)
        return known[name]

    return means


def choose(pool: Tensor, size: int, variant: Variant) -> Coreset:
    """Return the medoids of one pool, with weights that match its mean."""
    picks = pick_medoids(pool, size, "euclidean").indices
    weights = matched_weights(pool[picks], pool.mean(dim=0), ridge=variant.ridge, max_weight=variant.bound)
    return Coreset(picks, weights)


def measure(
    gram: GradientGram,
    sample: DrawnSample,
    means: Callable[[str], Tensor],
    sizes: list[tuple[int, int]],
    num_batches: int,
) -> list[dict[str, Any]]:
    """Return a row for every variant and size."""
    rows = []
    lengths = torch.tensor([len(counted_tokens(example)) for example in sample.examples])
    for size, large in sizes:
        batches = LargeBatches.draw(len(sample.examples), large, num_batches, seed=0)
        for variant in variants():
            phi = features(means(variant.vectors), lengths, POWERS[variant.power])
            error = coreset_error(gram, batches, [choose(phi[batch], size, variant) for batch in batches.examples])
            rows.append({"b": size, "r": large, "batches": len(batches.examples), **vars(variant), **vars(error)})
            print(
                f"{size} of {large}  vectors {variant.vectors:25s} T^-{variant.power:4s} ridge {variant.ridge:<5} "
                f"bound {variant.bound:.0f}  kappa {error.kappa:.3f} ± {error.kappa_se:.3f}  worth {error.worth:.1f}",
                flush=True,
            )
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default=str(RECIPE), help="YAML file (SmolLM2-135M on the math mixture)")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="b:r", help=f"({' '.join(SIZES)})")
    parser.add_argument("--examples", type=int, default=512, help="examples whose gradients are measured (512)")
    parser.add_argument("--batches", type=int, default=40, help="minimum number of large batches of each size (40)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "token_signal.json", help="JSON")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    sizes = [(int(size), int(large)) for size, _, large in (each.partition(":") for each in options.sizes)]
    most = max(large for _, large in sizes)
    fixed = ["lora=null", f"colm.large_batch_size={most}", f"colm.coreset_size={most // 4}"]
    recipe = load_recipe(options.recipe, [*fixed, *options.overrides])
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    data, model = load_task(recipe, tokenizer).train, load_model(recipe.model, None, tokenizer)
    measured = measure_sample(model, checked_section(recipe), data, options.examples, progress=True)
    occurs = occurring_ids(data, vocabulary_size(model), SINGLE_PROCESS, 0)
    embedding = model.get_input_embeddings().weight.detach().cpu()  # type: ignore[operator]
    means = make_means(embedding, occurs, measured.sample, recipe.seed)
    rows = measure(measured.parts["layers"], measured.sample, means, sizes, options.batches)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result = {
        "benchmark": "token_signal",
        **describe_environment(),
        "date": date,
        "model": recipe.name,
        "dtype": recipe.model.dtype,
        "examples": len(measured.sample.examples),
        "modules": measured.num_modules,
        "side": measured.side,
        "notes": measured.notes,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
