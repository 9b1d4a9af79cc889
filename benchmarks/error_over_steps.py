"""Compare ways to choose by tokens over many steps: the error of a sum of steps' gradients, not only of one step's.

    python benchmarks/error_over_steps.py data.train=PATH/TO/math_instruct/train.jsonl.gz data.max_length=192

What is chosen in one step adds to what is chosen in the next: an error that points elsewhere every time averages out,
one that always points the same way does not. The gradients of some hundred examples are measured once, as `colm-ds
check` does, and stored (`--keep FILE`, 15 minutes on two cores; without key=value they are read from there), and every
way chooses from the same large batches, step after step. What is compared is the gradient of the layers, or of another
part of the model (`--part`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colm_ds.check.measure import checked_section
from colm_ds.check.sample import measure_sample
from colm_ds.engine.token_table import occurring_ids
from colm_ds.probe.tokens import counted_tokens, features, mean_vectors, token_vectors, vocabulary_size
from colm_ds.randomness import private_generator
from colm_ds.recipes.model import load_model, load_tokenizer, quiet_libraries
from colm_ds.recipes.recipe import load_recipe
from colm_ds.run_folder.environment import describe_environment
from colm_ds.selection import (
    SINGLE_PROCESS,
    SelectionSettings,
    Selector,
    SelectorContext,
    Signals,
    make_selector,
)
from colm_ds.training.tasks import load_task
from colm_ds.types import LargeBatch

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "finetune" / "recipes" / "smollm2_math_tokens.yaml"
KEPT = ROOT / "runs" / "error_over_steps.pt"
SIZES = ("8:32", "32:64", "32:128", "64:256")
SUMS = (10, 30, 100)
BLIND = "importance, no exchange"
"""Way that is shown no signals: without them nothing is gained by an exchange."""

POOL = {"geometry": "plain", "metric": "euclidean", "per_source": False}


@dataclass(frozen=True)
class Measured:
    """What is known of N examples.

    Attributes:
        gradients: rows whose inner products are those of the gradients, float64 `[N, N]`.
        signals: features of the estimator `tokens`, float32 `[N, K]`.
        lengths: labelled tokens, int64 `[N]`.
        sources: source ids, int64 `[N]`.
        about: model and data, for the record.
    """

    gradients: np.ndarray
    signals: torch.Tensor
    lengths: torch.Tensor
    sources: torch.Tensor
    about: dict[str, Any]


def measure(recipe_file: str, overrides: list[str], count: int, keep: Path) -> None:
    """Measure gradients and signals of `count` examples and store them."""
    quiet_libraries()
    fixed = ["lora=null", "colm.large_batch_size=32", "colm.coreset_size=8"]
    recipe = load_recipe(recipe_file, [*fixed, *overrides])
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    data, model = load_task(recipe, tokenizer).train, load_model(recipe.model, None, tokenizer)
    measured = measure_sample(model, checked_section(recipe), data, count, progress=True)
    occurs = occurring_ids(data, vocabulary_size(model), SINGLE_PROCESS, 0)
    embedding = model.get_input_embeddings().weight.detach().cpu()  # type: ignore[operator]
    examples = measured.sample.examples
    keep.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "products": {name: gram.products for name, gram in measured.parts.items()},
            "means": mean_vectors(examples, token_vectors(embedding, recipe.seed, occurs=occurs)),
            "lengths": torch.tensor([len(counted_tokens(example)) for example in examples]),
            "sources": torch.tensor([example.source for example in examples]),
            "about": {
                "model": recipe.name,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "matrices": measured.num_modules,
                "side": measured.side,
            },
        },
        keep,
    )


def read(keep: Path, part: str = "layers", rows: slice = slice(None)) -> Measured:
    """Read what `measure` stored of a part of the model, for some of the examples."""
    stored = torch.load(keep, weights_only=True)
    if part not in stored["products"]:
        raise SystemExit(f"--part {part}: {keep} holds {', '.join(stored['products'])}")
    values, vectors = np.linalg.eigh(stored["products"][part][rows, rows].numpy())
    signals = features(stored["means"][rows], stored["lengths"][rows], 1 / 3)
    gradients = vectors * np.sqrt(np.clip(values, 0.0, None))
    return Measured(gradients, signals, stored["lengths"][rows], stored["sources"][rows], stored["about"])


def ways(size: int, seed: int) -> Iterator[tuple[str, Selector]]:
    """Yield selectors of training by a name for the table."""

    def made(selector: str, options: dict[str, Any] | None = None, **settings: Any) -> Selector:
        whole = SelectionSettings(**{**POOL, "seed": seed, **settings})
        return make_selector(selector, SelectorContext(size, (), whole, options=options or {}))

    yield "random", made("random")
    yield "medoids, matched weights", made("colm", weights="matched")
    yield "medoids, cluster weights", made("colm", weights="cluster")
    yield "balanced", made("balanced")
    yield "importance", made("importance")
    yield BLIND, made("importance")
    yield "importance by the signal", made("importance", {"by": "signal"})
    yield "importance, per source", made("importance", per_source=True, carries=True)
    yield "importance, per source, independent quotas", made("importance", per_source=True)


def large_batches(count: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield large batches: random orders of the examples, cut."""
    made, number = 0, 0
    while made < steps:
        order = torch.randperm(count, generator=private_generator(seed, "error over steps", number))
        number += 1
        for start in range(0, count - size + 1, size):
            if made < steps:
                made += 1
                yield order[start : start + size]


def errors(name: str, measured: Measured, size: int, large: int, steps: int, seed: int) -> np.ndarray:
    """Return the error of every step's mean gradient by a way of `ways`, `[steps, N]`."""
    selector = dict(ways(size, seed))[name]
    known = torch.zeros_like(measured.signals) if name == BLIND else measured.signals
    found: list[np.ndarray] = []
    carry: dict[int, float] = {}
    for step, batch in enumerate(large_batches(len(measured.lengths), large, steps, seed), start=1):
        lengths, nowhere = measured.lengths[batch], torch.zeros_like(batch)
        facts = LargeBatch(step, batch, measured.sources[batch], lengths, lengths, nowhere, {}, carry=carry)
        finite = torch.ones(large, dtype=torch.bool)
        signals = Signals(torch.arange(large), finite, vectors=known[batch])
        coreset = selector.select(facts, signals, SINGLE_PROCESS)
        carry = carry if coreset.carry is None else coreset.carry
        weights = coreset.weights.double().numpy()
        chosen = measured.gradients[batch[coreset.positions].numpy()]
        found.append(weights @ chosen / weights.sum() - measured.gradients[batch.numpy()].mean(axis=0))
    return np.array(found)


def table(measured: Measured, sizes: list[tuple[int, int]], steps: int, seeds: int) -> list[dict[str, Any]]:
    """Measure every way at every size; print and return the rows."""
    rows = []
    centred = measured.gradients - measured.gradients.mean(axis=0)
    variance, square = (centred**2).sum() / (len(centred) - 1), (measured.gradients.mean(axis=0) ** 2).sum()
    for size, large in sizes:
        chance = variance * (1.0 / size - 1.0 / large)
        for name in [name for name, _ in ways(size, 0)]:
            runs = [errors(name, measured, size, large, steps, seed) for seed in range(seeds)]
            each = np.array([(run**2).sum(axis=1).mean() / chance for run in runs])
            row: dict[str, Any] = {"b": size, "r": large, "way": name, "kappa": float(each.mean())}
            row["kappa_se"] = float(each.std(ddof=1) / len(each) ** 0.5)
            for length in SUMS:
                sums = [run[: steps // length * length].reshape(-1, length, run.shape[1]).sum(axis=1) for run in runs]
                row[f"sum of {length}"] = float(
                    np.mean([(each**2).sum(axis=1).mean() for each in sums]) / length / chance
                )
            means = np.array([run.mean(axis=0) for run in runs])
            paired = (means.sum(axis=0) ** 2).sum() - (means**2).sum()
            row["bias"] = float(paired / (seeds * (seeds - 1)) / square)
            rows.append(row)
            numbers = "  ".join(f"{row[f'sum of {length}']:5.2f}" for length in SUMS)
            kappa = f"{row['kappa']:.3f} ± {row['kappa_se']:.3f}"
            print(f"{size:3d} of {large:3d}  {name:42s} {kappa}  {numbers}  bias {row['bias']:.4f}", flush=True)
    return rows


def lengths_of_gradients(measured: Measured) -> dict[str, float]:
    """Return how the logarithm of a gradient's length goes by that of the number of labelled tokens."""
    tokens = np.log(measured.lengths.double().numpy())
    norms = np.log(np.sqrt((measured.gradients**2).sum(axis=1)))
    return {"correlation": float(np.corrcoef(tokens, norms)[0, 1]), "slope": float(np.polyfit(tokens, norms, 1)[0])}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default=str(RECIPE), help="YAML file (SmolLM2-135M on the math mixture)")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="b:r", help=f"({' '.join(SIZES)})")
    parser.add_argument("--examples", type=int, default=512, help="examples whose gradients are measured (512)")
    parser.add_argument("--rows", default=":", metavar="FROM:TO", help="only these of the measured examples (all)")
    parser.add_argument("--part", default="layers", help="layers, all, or a part that a check names (layers)")
    parser.add_argument("--steps", type=int, default=200, help="steps of a seed (200)")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of batches and draws (4)")
    parser.add_argument("--keep", type=Path, default=KEPT, help="file of the measured gradients")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "error_over_steps.json", help="JSON"
    )
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sizes = [(int(size), int(large)) for size, _, large in (each.partition(":") for each in options.sizes)]
    if options.overrides:
        measure(options.recipe, options.overrides, options.examples, options.keep)
    first, _, last = options.rows.partition(":")
    measured = read(options.keep, options.part, slice(int(first or 0), int(last) if last else None))
    rows = table(measured, sizes, options.steps, options.seeds)
    result = {
        "benchmark": "error_over_steps",
        **describe_environment(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **measured.about,
        "part": options.part,
        "examples of the kept": options.rows,
        "examples": len(measured.lengths),
        "steps": options.steps,
        "seeds": options.seeds,
        "length of a gradient by labelled tokens": lengths_of_gradients(measured),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
