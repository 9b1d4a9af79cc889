"""Choosing r / 4 of r by token vectors, as the reader's thread of rank 0 does it: CPU seconds, memory, the objective.

    python benchmarks/choose.py                # draws by importance (the default) and medoids; 3 minutes, one thread
    python benchmarks/choose.py --selectors    # every selector, b of r in one pool, beside a step of SmolLM2-135M

Features are clusters of as many numbers as a token's vector has, as mean vectors of a mixture's sources are. Above
4,096 examples medoids are picked in parts of 1,024 neighbours; their objective is compared with that of the greedy
choice of one matrix, up to 8,192 examples.

Seconds are of the CPU, of one thread, so that other processes do not count. With --selectors the step is b examples
trained with LoRA and activation checkpointing, and the pass over r that the selector needs, without replay.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from result_file import write_result
from torch import Tensor

from colm_ds.memory.counted import counted_allocations
from colm_ds.probe.tokens import WIDTH
from colm_ds.randomness import private_generator
from colm_ds.selection import (
    SELECTORS,
    SINGLE_PROCESS,
    Needs,
    SelectionSettings,
    SelectorContext,
    Signals,
    make_selector,
    needs_of,
    select_coreset,
)
from colm_ds.selection.facility_location import facility_location, pairwise_similarity
from colm_ds.selection.large_pools import pick_medoids
from colm_ds.types import LargeBatch, PastLosses

ROOT = Path(__file__).resolve().parents[1]
SIZES = (256, 2048, 8192, 65_536)
MOST_GREEDY = 8192
"""Examples up to which the greedy choice is made as well, from a matrix of 512 MiB."""

NUM_CLUSTERS = 40
IMPORTANCE, MEDOIDS = "importance", "medoids, matched weights"
WAYS = {
    IMPORTANCE: SelectionSettings(geometry="plain", picks="importance", per_source=False),
    MEDOIDS: SelectionSettings(geometry="plain", metric="euclidean", weights="matched", per_source=False),
}


def make_features(size: int) -> tuple[Tensor, Tensor]:
    """Return features of examples around some centres, `[size, WIDTH]`, and chances by their lengths, `[size]`."""
    generator = private_generator(0, "benchmark choose", size)
    centres = torch.randn(NUM_CLUSTERS, WIDTH, generator=generator)
    places = torch.randint(0, NUM_CLUSTERS, (size,), generator=generator)
    lengths = 10 + 100 * torch.rand(size, 1, generator=generator)
    features = ((centres[places] + torch.randn(size, WIDTH, generator=generator)) / lengths.sqrt()).half().float()
    return features, lengths.flatten().double().rsqrt()


def choose(features: Tensor, chances: Tensor, settings: SelectionSettings) -> None:
    """Choose a quarter of the examples, with weights."""
    size = len(features)
    signals = Signals(torch.arange(size), torch.ones(size, dtype=torch.bool), vectors=features)
    sources = torch.zeros(size, dtype=torch.int64)
    select_coreset(sources, signals, size // 4, settings=settings, chances=chances)


def measure(size: int, way: str, repeats: int) -> dict[str, Any]:
    """Return medians and extremes of the seconds, peak of allocations, and the objective over the greedy choice's."""
    features, chances = make_features(size)
    settings = WAYS[way]
    choose(features, chances, settings)  # warms up
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        choose(features, chances, settings)
        seconds.append(time.process_time() - begun)
    peak = counted_allocations(lambda: choose(features, chances, settings)).peak
    compared = way == MEDOIDS and size <= MOST_GREEDY
    return {
        "way": way,
        "r": size,
        "b": size // 4,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "peak_mib": peak / 2**20,
        "objective_to_greedy": objective_to_greedy(features) if compared else None,
    }


def objective_to_greedy(features: Tensor) -> float:
    """Return the objective of the medoids over that of the greedy choice from one matrix."""
    size = len(features) // 4
    similarity = pairwise_similarity(features, "euclidean")
    picks = pick_medoids(features, size, "euclidean").indices
    return float(similarity[:, picks].amax(dim=1).sum()) / facility_location(similarity, size).objective


CHOICES: dict[str, dict[str, Any]] = {
    **{name: {} for name in SELECTORS if name != "full"},
    "vector_sum best_of": {"method": "best_of"},
    "vector_sum balanced": {"method": "balanced"},
    "grab herding": {"rule": "herding"},
    "selective_backprop stale": {"stale": True},
}
"""Options of every selector that is timed; its name is the first word."""


def inputs_of(needs: Needs, options: argparse.Namespace, step: int) -> tuple[LargeBatch, Signals | None]:
    """Return a large batch of one source and signals of the widths of SmolLM2: clusters, some of them near a target."""
    r, generator = options.large, private_generator(0, "benchmark selectors", step)
    loss = torch.rand(r, generator=generator) * 3
    batch = LargeBatch(
        step=step,
        indices=torch.arange(r),
        sources=torch.zeros(r, dtype=torch.int64),
        lengths=torch.randint(40, 256, (r,), generator=generator),
        num_label_tokens=torch.randint(5, 200, (r,), generator=generator),
        home=torch.zeros(r, dtype=torch.int64),
        examples={},
        past=PastLosses(loss, loss + torch.rand(r, generator=generator), 100 * r),
        reference=torch.rand(r, generator=generator) * 3,
        lr=1e-4,
    )
    if needs.signal is None:
        return batch, None
    width = {"gradient": options.probes, "hidden": options.hidden}.get(needs.signal, 1)
    if width == 1:
        vectors, target = torch.rand(r, 1, generator=generator) * 3, None
    else:
        centres = torch.randn(NUM_CLUSTERS, width, generator=generator)
        places = torch.randint(0, NUM_CLUSTERS, (r + options.target,), generator=generator)
        everyone = centres[places] + torch.randn(r + options.target, width, generator=generator)
        norms = torch.rand(r + options.target, len(needs.also), generator=generator)
        vectors, target = torch.cat([everyone, norms], dim=1).split([r, options.target])
    widths = {needs.signal: width, **dict.fromkeys(needs.also, 1)} if needs.also else {}
    finite = torch.ones(r, dtype=torch.bool)
    indices = list(range(options.target))
    return batch, Signals(
        torch.arange(r), finite, vectors=vectors, widths=widths, target=target, target_indices=indices
    )


def time_selectors(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the CPU seconds that each selector takes to choose b of r, medians over steps."""
    rows = []
    for name, chosen in CHOICES.items():
        selector_name = name.split()[0]
        needs = needs_of(selector_name, chosen)
        settings = SelectionSettings(geometry="plain", per_source=False)
        selector = make_selector(selector_name, SelectorContext(options.coreset, settings=settings, options=chosen))
        seconds = []
        for step in range(options.repeats + 1):
            batch, signals = inputs_of(needs, options, step + 1)
            begun = time.process_time()
            selector.select(batch, copy.deepcopy(signals), SINGLE_PROCESS)
            seconds.append(time.process_time() - begun)
        seconds = seconds[1:]  # the first one warms up
        kind = "+".join((needs.signal, *needs.also)) if needs.signal else None
        rows.append(
            {
                "selector": name,
                "signal": kind,
                "target": needs.target,
                "median_s": statistics.median(seconds),
                "max_s": max(seconds),
            }
        )
        print(f"{name:28} {1e3 * rows[-1]['median_s']:8.2f} ms (at most {1e3 * max(seconds):.2f})", flush=True)
    return rows


def time_of_steps(options: argparse.Namespace, kinds: set[str | None]) -> dict[str, float]:
    """Return CPU seconds of training SmolLM2 on b examples ("plain"), and of a pass over r for each kind of signal."""
    from step import make_arm, make_records, parse  # beside this script

    from colm_ds.config.colm import ProbeConfig
    from colm_ds.distributed.agreement import single_process_environment
    from colm_ds.probe.of_examples import signals_of_examples

    single_process_environment()
    of_step = parse(["--smollm2", "--coreset", str(options.coreset), "--large", str(options.large)])
    records, _ = make_records(of_step)
    engine = make_arm(of_step, records, {"selector": "full", "r": options.coreset, "b": options.coreset})
    batch = engine.loader.batch(1)
    begun = time.process_time()
    engine.train_batch(batch)
    seconds = {"plain": time.process_time() - begun}
    print(f"plain {options.coreset}: {seconds['plain']:.1f} s", flush=True)
    examples = [batch.examples[position] for position in range(options.coreset)]
    probe = ProbeConfig(estimator="sketch", num_probes=options.probes)
    for kind in sorted(kind for kind in kinds if kind is not None):
        signal, *also = kind.split("+")
        begun = time.process_time()
        signals_of_examples(engine.module, examples, [len(one.input_ids) for one in examples], probe, signal, also)
        seconds[kind] = (time.process_time() - begun) * options.large / options.coreset
        print(f"pass over {options.large} for {kind}: {seconds[kind]:.1f} s", flush=True)
    engine.destroy()
    return seconds


def selectors_and_step(options: argparse.Namespace) -> dict[str, Any]:
    """Return the table of all selectors with the share that choosing has in each one's step."""
    rows = time_selectors(options)
    steps = time_of_steps(options, {row["signal"] for row in rows}) if options.step else {}
    for row in rows:
        if steps:
            step = steps["plain"] + (steps[row["signal"]] if row["signal"] else 0.0)
            row |= {"step_s": step, "share": row["median_s"] / step, "share_of_plain": row["median_s"] / steps["plain"]}
            print(f"{row['selector']:28} {1e3 * row['median_s']:8.2f} ms of {step:6.1f} s: {row['share']:.3%}")
    return {"rows": rows, "steps": steps}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="values of r")
    parser.add_argument("--repeats", type=int, default=5, help="measured choices of each (5)")
    parser.add_argument("--selectors", action="store_true", help="time every selector")
    parser.add_argument("--large", type=int, default=256, help="r of --selectors (256)")
    parser.add_argument("--coreset", type=int, default=64, help="b (64)")
    parser.add_argument("--probes", type=int, default=128, help="K (128)")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size (576)")
    parser.add_argument("--target", type=int, default=8, help="target examples (8)")
    parser.add_argument("--no-step", dest="step", action="store_false", help="leave out the step of SmolLM2")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/choose.json, choose_selectors.json)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.selectors:
        report("choose_selectors", selectors_and_step(options), options)
        return
    rows = []
    for size, way in product(options.sizes, WAYS):
        rows.append(measure(size, way, options.repeats))
        text = f"{way}, {rows[-1]['b']} of {size}: {rows[-1]['median_s']:.3f} s, {rows[-1]['peak_mib']:.0f} MiB"
        objective = rows[-1]["objective_to_greedy"]
        print(text if objective is None else f"{text}, objective {objective:.4f} of the greedy choice's", flush=True)
    report("choose", {"rows": rows}, options)


def report(name: str, measured: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the result file."""
    write_result(options.out or ROOT / "benchmarks" / "results" / f"{name}.json", name, **measured)


if __name__ == "__main__":
    main()
