"""Greedy facility location: ours against apricot and submodlib, on the same similarities.

    pip install apricot-select submodlib-py      # either may be missing
    python benchmarks/libraries.py

Half of n points is picked from a dense [n, n] matrix of l1 similarities between random features of 256 numbers. Every
library gets the matrix; making it is not timed. Arms take turns; medians. The objective is computed for all by the
same function in float64. Memory is the growth of the resident peak during the call.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colm_ds.memory.meter import reset_resident_peak, resident_peak_bytes
from colm_ds.run_folder.environment import describe_environment
from colm_ds.selection import facility_location, pairwise_similarity

RESULTS = Path(__file__).parent / "results"
Pick = Callable[[torch.Tensor, int], list[int]]


def ours(similarity: torch.Tensor, k: int) -> list[int]:
    """Pick by colm_ds."""
    return facility_location(similarity, k).indices.tolist()


def apricot(similarity: torch.Tensor, k: int) -> list[int]:
    """Pick by apricot's lazy greedy."""
    from apricot import FacilityLocationSelection

    fitted = FacilityLocationSelection(k, metric="precomputed", optimizer="lazy").fit(similarity.numpy())
    return [int(index) for index in fitted.ranking]


def submodlib(similarity: torch.Tensor, k: int) -> list[int]:
    """Pick by submodlib's lazy greedy."""
    from submodlib import FacilityLocationFunction

    n = len(similarity)
    matrix = similarity.numpy().astype(np.float32)
    function = FacilityLocationFunction(n=n, mode="dense", sijs=matrix, separate_rep=False)
    picks = function.maximize(budget=k, optimizer="LazyGreedy", show_progress=False)
    return [int(index) for index, _ in picks]


ARMS: dict[str, tuple[Pick, str | None]] = {
    "colm_ds": (ours, None),
    "apricot": (apricot, "apricot-select"),
    "submodlib": (submodlib, "submodlib-py"),
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128,512,2048", help="n, separated by commas (128,512,2048)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each arm (5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "libraries.json", help="result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["NUMBA_NUM_THREADS"] = "1"  # apricot's; all arms have one thread
    arms = {name: pick for name, (pick, package) in ARMS.items() if package is None or installed(name)}
    rows = [row for n in map(int, options.sizes.split(",")) for row in compare(arms, n, options.repeats)]
    versions = {name: metadata.version(package) for name, (_, package) in ARMS.items() if package and name in arms}
    result = {
        "benchmark": "libraries",
        **describe_environment(),
        "libraries": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def installed(name: str) -> bool:
    """Return whether a library can be imported."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: left out ({error})")
        return False
    return True


def similarity_of(n: int) -> torch.Tensor:
    """Return the similarities of n random points."""
    points = torch.randn(n, 256, generator=torch.Generator().manual_seed(n))
    return pairwise_similarity(points, "l1")


def compare(arms: dict[str, Pick], n: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per arm for one n."""
    similarity, k = similarity_of(n), n // 2
    times: dict[str, list[float]] = {name: [] for name in arms}
    objectives = {}
    for turn in range(repeats + 1):
        for name, pick in arms.items():
            start = time.perf_counter()
            picks = pick(similarity, k)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
            objectives[name] = float(similarity[:, picks].double().max(dim=1).values.sum())
    rows = []
    for name in arms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            growth = pool.apply(memory_growth, (name, n))
        rows.append(
            {
                "n": n,
                "k": k,
                "arm": name,
                "median_s": statistics.median(times[name]),
                "min_s": min(times[name]),
                "max_s": max(times[name]),
                "to_ours": statistics.median(times[name]) / statistics.median(times["colm_ds"]),
                "objective": objectives[name],
                "objective_to_ours": objectives[name] / objectives["colm_ds"],
                "resident_growth_mib": growth / 2**20,
            }
        )
        shown = rows[-1]
        print(
            f"n {n}, k {k}: {name:10} {shown['median_s'] * 1e3:9.2f} ms ({shown['to_ours']:6.1f} x ours), "
            f"objective {shown['objective_to_ours']:.6f} of ours, {shown['resident_growth_mib']:.1f} MiB",
            flush=True,
        )
    return rows


def memory_growth(name: str, n: int) -> int:
    """Return the growth of the resident peak during one call, in bytes; meant for a fresh process."""
    torch.set_num_threads(1)
    pick = ARMS[name][0]
    pick(similarity_of(16), 8)  # code is loaded
    similarity = similarity_of(n)
    reset_resident_peak()
    before = resident_peak_bytes()
    pick(similarity, n // 2)
    return resident_peak_bytes() - before


if __name__ == "__main__":
    main()
