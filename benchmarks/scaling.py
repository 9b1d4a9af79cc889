"""How the cost of the selection grows: with r, d, number of sources, K and ranks; and on paper for 1,024 ranks.

    python benchmarks/scaling.py

Measured on this machine: seconds of one `select_coreset` call (geometry, mask, medoids) on one process, as rank 0 does
it, and the bytes that each estimator has to exchange (counted, not timed). The last table is arithmetic, not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from colm_ds.probe.directions import Directions
from colm_ds.selection import AdamHistory, LowRankGradients, SelectionSettings, Signals, select_coreset

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = {"r": 128, "d": 327_680, "sources": 4, "probes": 1}
GRID: dict[str, tuple[int, ...]] = {
    "r": (64, 128, 512, 2048, 8192),
    "d": (65_536, 327_680, 1_310_720, 6_553_600),
    "sources": (1, 4, 16, 64),
    "probes": (1, 4, 16, 64),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each size (3)")
    parser.add_argument("--mask", type=int, default=2560, help="h (2560)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "scaling.json", help="result file"
    )
    options = parser.parse_args()
    rows = []
    for name, values in GRID.items():
        for value in values:
            sizes = {**DEFAULT, name: value}
            if sizes["r"] > 2048:  # compared whole, as sketches are: h = 256 numbers per example
                seconds = measure_sketch(sizes["r"], 256, options.repeats)
                row: dict[str, Any] = {**sizes, "signal": "sketch K = 256, one pool"}
            else:
                seconds = measure(**sizes, mask=options.mask, repeats=options.repeats)
                row = {**sizes, "signal": "spsa"}
            rows.append({"varied": name, **row, "median_s": statistics.median(seconds), "max_s": max(seconds)})
            shown = ", ".join(f"{key} {sizes[key]:,}" for key in sizes)
            print(f"{shown} ({row['signal']}): {rows[-1]['median_s']:.3f} s", flush=True)
    exchange = [exchanged(r, d, h=options.mask) for r, d in ((128, 327_680), (512, 6_553_600), (8192, 6_553_600))]
    paper = on_paper(ranks=1024, r=8192, d=6_553_600, h=options.mask)
    print("bytes exchanged in a step:", json.dumps(exchange))
    print("on paper, 1,024 ranks:", json.dumps(paper))
    from colm_ds.tracking import describe_environment

    result = {"benchmark": "scaling", **describe_environment(), "rows": rows, "exchange": exchange, "on_paper": paper}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(r: int, d: int, sources: int, probes: int, mask: int, repeats: int) -> list[float]:
    """Seconds of selecting r/2 of r from SPSA coefficients, all sources big."""
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(r, probes, generator=generator)
    directions = Directions(0, 1, probes, d)
    gradients = LowRankGradients(coefficients, directions)
    signals = Signals(torch.arange(r), torch.ones(r, dtype=torch.bool), gradients, coefficients)
    ids = torch.arange(r) % sources
    history = AdamHistory(d)
    seconds = []
    for turn in range(repeats + 2):  # the first has no history, the second warms up
        start = time.perf_counter()
        select_coreset(ids, signals, r // 2, settings=SelectionSettings(mask_size=mask), history=history, step=turn + 1)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def measure_sketch(r: int, width: int, repeats: int) -> list[float]:
    """Seconds of selecting r/2 of r from sketches in one pool."""
    vectors = torch.randn(r, width, generator=torch.Generator().manual_seed(0))
    signals = Signals(torch.arange(r), torch.ones(r, dtype=torch.bool), vectors=vectors)
    seconds = []
    for turn in range(repeats):
        start = time.perf_counter()
        select_coreset(torch.zeros(r, dtype=torch.int64), signals, r // 2, step=turn + 1)
        seconds.append(time.perf_counter() - start)
    return seconds


def exchanged(r: int, d: int, h: int, pools: int = 4) -> dict[str, int]:
    """Payload in bytes of the signals of one step; `matrix` is what gathering the gradients would take.

    `exact`: the masked columns, one float64 sum per pool for its mask, two float32 sums for the history.
    """
    exact = 4 * r * h + 8 * d * pools + 8 * d
    return {"r": r, "d": d, "spsa": 4 * r, "sketch": 4 * r * 256, "exact": exact, "matrix": 4 * r * d}


def on_paper(ranks: int, r: int, d: int, h: int) -> dict[str, Any]:
    """Ring all-reduce of the signals over 25 GB/s links: 2 (W - 1)/W of the payload, and 2 (W - 1) hops of 5 us."""
    payload = exchanged(r, d, h)
    hops = 2 * (ranks - 1) * 5e-6
    seconds = {
        name: round(2 * (ranks - 1) / ranks * payload[name] / 25e9 + hops, 4) for name in ("spsa", "sketch", "exact")
    }
    return {"ranks": ranks, "r": r, "d": d, "assumed": "25 GB/s a link, 5 us a hop, a ring", "seconds": seconds}


if __name__ == "__main__":
    main()
