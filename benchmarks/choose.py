"""Choosing r / 4 of r by token vectors, as the reader's thread of rank 0 does it: seconds, memory, and the objective.

    python benchmarks/choose.py                # 1 minute; one thread

Features are clusters of as many numbers as a token's vector has, as mean vectors of a mixture's sources are. Above
4,096 examples medoids take two rounds; their objective is compared with that of the greedy choice in one round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colm_ds.memory.counted import counted_allocations
from colm_ds.probe.tokens import WIDTH
from colm_ds.randomness import private_generator
from colm_ds.run_folder.environment import describe_environment
from colm_ds.selection import SelectionSettings, Signals, select_coreset
from colm_ds.selection.facility_location import facility_location, pairwise_similarity
from colm_ds.selection.two_round import pick_medoids

ROOT = Path(__file__).resolve().parents[1]
SIZES = (256, 2048, 8192)
NUM_CLUSTERS = 40
SETTINGS = SelectionSettings(geometry="plain", metric="euclidean", weights="matched", per_source=False)


def make_features(size: int) -> Tensor:
    """Return features of examples of many lengths around some centres, `[size, WIDTH]`."""
    generator = private_generator(0, "benchmark choose", size)
    centres = torch.randn(NUM_CLUSTERS, WIDTH, generator=generator)
    places = torch.randint(0, NUM_CLUSTERS, (size,), generator=generator)
    lengths = 10 + 100 * torch.rand(size, 1, generator=generator)
    return ((centres[places] + torch.randn(size, WIDTH, generator=generator)) / lengths.sqrt()).half().float()


def choose(features: Tensor) -> None:
    """Choose a quarter of the examples, with weights."""
    size = len(features)
    signals = Signals(torch.arange(size), torch.ones(size, dtype=torch.bool), vectors=features)
    select_coreset(torch.zeros(size, dtype=torch.int64), signals, size // 4, settings=SETTINGS)


def measure(size: int, repeats: int) -> dict[str, Any]:
    """Return medians and extremes of the seconds, peak of allocations, and the objective over the greedy choice's."""
    features = make_features(size)
    choose(features)  # warms up
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        choose(features)
        seconds.append(time.perf_counter() - begun)
    peak = counted_allocations(lambda: choose(features)).peak
    similarity = pairwise_similarity(features, "euclidean")
    greedy = facility_location(similarity, size // 4).objective
    picks = pick_medoids(features, size // 4, "euclidean").indices
    objective = float(similarity[:, picks].amax(dim=1).sum())
    return {
        "r": size,
        "b": size // 4,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "peak_mib": peak / 2**20,
        "objective_to_greedy": objective / greedy,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="values of r")
    parser.add_argument("--repeats", type=int, default=5, help="measured choices of each (5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "choose.json", help="result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        rows.append(measure(size, options.repeats))
        print(
            f"{rows[-1]['b']} of {size}: {rows[-1]['median_s']:.3f} s, {rows[-1]['peak_mib']:.0f} MiB, "
            f"objective {rows[-1]['objective_to_greedy']:.4f} of the greedy choice's",
            flush=True,
        )
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result = {"benchmark": "choose", **describe_environment(), "date": date, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
