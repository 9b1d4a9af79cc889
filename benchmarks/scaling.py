"""Growth of CoLM's cost with r, d, number of sources, K, ranks and sequence length; on paper for 1,024 ranks.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --tokens    # only the parts of a choice by token vectors, r to 65,536

Measured on this machine, one thread a process: seconds of one `select_coreset` call (geometry, mask, medoids) on one
process, as rank 0 does it; seconds of a step's two collectives on 1, 2 and 4 ranks (gloo, all on this machine); seconds
of the phases of whole steps, CoLM beside plain r, at several sequence lengths. The bytes that each estimator has to
exchange are counted, not timed. The last table is arithmetic, not measured.

With --tokens: r / 4 of r, 64 examples of the large batch for each of r / 64 ranks. Rank 0's thread reads the rows of a
memory-mapped table of a million examples and chooses; every rank then assigns the chosen examples to the ranks and cuts
micro-batches of 4. These are seconds of one thread; the broadcast of the choice is timed on 1, 2 and 4 ranks here, and
computed for r / 64.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from choose import IMPORTANCE, WAYS, choose, make_features
from result_file import write_result
from step import make_arm

from colm_ds.batching.assign import by_rank, home_ranks, micro_batches, training_ranks
from colm_ds.distributed.exchange import ProcessGroupExchange
from colm_ds.memory.counted import counted_allocations
from colm_ds.probe.directions import Directions
from colm_ds.probe.tokens import features
from colm_ds.selection import AdamHistory, LowRankGradients, SelectionSettings, Signals, select_coreset
from colm_ds.selection.exchange import broadcast_coreset
from colm_ds.selection.importance import chances_by_labels
from colm_ds.types import Coreset

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = {"r": 128, "d": 327_680, "sources": 4, "probes": 1}
GRID: dict[str, tuple[int, ...]] = {
    "r": (64, 128, 512, 2048, 8192),
    "d": (65_536, 327_680, 1_310_720, 6_553_600),
    "sources": (1, 4, 16, 64),
    "probes": (1, 4, 16, 64),
}
RANKS = (1, 2, 4)
EXCHANGES = ((128, 1), (8192, 1), (128, 256), (8192, 256))
"""(r, numbers of an example): SPSA's K = 1, and the 256 of a sketch; 0: only r / 4 positions and weights are sent."""

TOKEN_EXCHANGES = ((8192, 0), (65_536, 0))

TOKEN_SIZES = (1024, 8192, 65_536)
RANK_SHARE = 64
TABLE_ROWS = 1 << 20

LENGTHS = (64, 128, 256, 512)
SHAPE = {"layers": 6, "hidden": 256, "intermediate": 704, "heads": 8, "vocabulary": 2048, "rank": 16}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each size (3)")
    parser.add_argument("--mask", type=int, default=2560, help="h (2560)")
    parser.add_argument("--tokens", action="store_true", help="only choices by token vectors")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/scaling.json, scaling_tokens.json)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "scaling_tokens" if options.tokens else "scaling"
    out = options.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    if options.tokens:
        collectives = [row for ranks in RANKS for row in measure_collectives(ranks, options.repeats, TOKEN_EXCHANGES)]
        write_result(out, name, rows=measure_tokens(options.repeats), ranks=collectives)
        return
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
    collectives = [row for ranks in RANKS for row in measure_collectives(ranks, options.repeats, EXCHANGES)]
    lengths = measure_lengths(options.repeats)
    exchange = [exchanged(r, d, h=options.mask) for r, d in ((128, 327_680), (512, 6_553_600), (8192, 6_553_600))]
    paper = on_paper(ranks=1024, r=8192, d=6_553_600, h=options.mask)
    print("bytes exchanged in a step:", json.dumps(exchange))
    print("on paper, 1,024 ranks:", json.dumps(paper))
    write_result(
        out,
        name,
        rows=rows,
        ranks=collectives,
        lengths={"shape": SHAPE, "rows": lengths},
        exchange=exchange,
        on_paper=paper,
    )


def measure(r: int, d: int, sources: int, probes: int, mask: int, repeats: int) -> list[float]:
    """Measure the seconds of selecting r/2 of r from SPSA coefficients, all sources big."""
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
    """Measure the seconds of selecting r/2 of r from sketches in one pool."""
    vectors = torch.randn(r, width, generator=torch.Generator().manual_seed(0))
    signals = Signals(torch.arange(r), torch.ones(r, dtype=torch.bool), vectors=vectors)
    seconds = []
    for turn in range(repeats):
        start = time.perf_counter()
        select_coreset(torch.zeros(r, dtype=torch.int64), signals, r // 2, step=turn + 1)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_tokens(repeats: int) -> list[dict[str, Any]]:
    """Measure the parts of drawing r / 4 of r by token vectors for r / 64 ranks, with the bytes of the broadcast."""
    rows = []
    with tempfile.NamedTemporaryFile() as file:
        width = make_features(1)[0].shape[1]
        table = np.memmap(file.name, dtype=np.float16, mode="w+", shape=(TABLE_ROWS, width))
        for start in range(0, TABLE_ROWS, 1 << 16):
            table[start : start + (1 << 16)] = make_features(1 << 16)[0].numpy()
        means = torch.from_numpy(table)
        for r in TOKEN_SIZES:
            rows.append(measure_tokens_of(means, r, repeats))
            print(", ".join(f"{key} {value:,.4g}" for key, value in rows[-1].items()), flush=True)
    return rows


def measure_tokens_of(means: torch.Tensor, r: int, repeats: int) -> dict[str, Any]:
    """Measure one size of `measure_tokens`."""
    generator = torch.Generator().manual_seed(r)
    indices = torch.randint(0, len(means), (r,), generator=generator)
    lengths = torch.randint(20, 512, (r,), generator=generator)
    ranks = r // RANK_SHARE
    positions = torch.randperm(r, generator=generator)[: r // 4].sort().values
    home = torch.zeros(r, dtype=torch.int64)
    read, chances = features(means[indices], lengths, 1 / 3), chances_by_labels(lengths)

    def assign() -> dict[int, int]:
        home_ranks(lengths, ranks)
        home[positions] = home_ranks(lengths[positions], ranks)
        return training_ranks(positions.tolist(), lengths, home, ranks)

    trained = assign()
    held = by_rank(trained, trained.values(), ranks)
    parts: dict[str, Callable[[], Any]] = {
        "read_s": lambda: features(means[indices], lengths, 1 / 3),
        "choose_s": lambda: choose(read, chances, WAYS[IMPORTANCE]),
        "assign_s": assign,
        "micro_batches_s": lambda: micro_batches(held, lengths, max_examples=4),
    }
    row: dict[str, Any] = {"r": r, "b": r // 4, "ranks": ranks}
    for name, run in parts.items():
        seconds = []
        for _ in range(repeats):
            begun = time.process_time()
            run()
            seconds.append(time.process_time() - begun)
        row[name] = statistics.median(seconds)
    row["peak_mib"] = counted_allocations(lambda: choose(read, chances, WAYS[IMPORTANCE])).peak / 2**20
    row["broadcast_bytes"] = 8 * len(positions)
    row["broadcast_on_paper_s"] = 8 * len(positions) / 25e9 + math.ceil(math.log2(ranks)) * 5e-6
    return row


def measure_collectives(ranks: int, repeats: int, sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Measure the seconds of gathering r x K numbers and of broadcasting the choice, as measured on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(exchange_rank, (ranks, repeats, folder, sizes), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
    for row in rows:
        print(f"ranks {ranks}, r {row['r']:,}, {row['numbers']} numbers an example: {row['median_s'] * 1e3:.2f} ms")
    return rows


def exchange_rank(rank: int, ranks: int, repeats: int, folder: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """Run one rank of `measure_collectives`; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    exchange = ProcessGroupExchange()
    rows = []
    for r, width in sizes:
        positions = torch.arange(rank, r, ranks)
        signals = torch.randn(len(positions), width)
        picked = torch.arange(0, r, 2 if width else 4)
        coreset = Coreset(picked, torch.ones(len(picked)), num_kept=0) if rank == 0 else None
        seconds = []
        for _ in range(5 * repeats + 1):
            dist.barrier()
            start = time.perf_counter()
            if width:
                exchange.gather_rows(signals, positions, r)
            broadcast_coreset(coreset, len(picked), num_sources=4, exchange=exchange)
            seconds.append(time.perf_counter() - start)
        timed = seconds[1:]  # the first one warms up
        rows.append(
            {"ranks": ranks, "r": r, "numbers": width, "median_s": statistics.median(timed), "max_s": max(timed)}
        )
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def measure_lengths(repeats: int) -> list[dict[str, Any]]:
    """Measure phases of whole steps at every length: CoLM 16 of 32 with replay and plain 32, taking turns."""
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    arms = {
        "plain 32": {"selector": "full", "r": 32, "b": 32},
        "CoLM spsa": {"estimator": "spsa", "replay": "on", "r": 32, "b": 16},
        "CoLM exact": {"estimator": "exact", "replay": "on", "r": 32, "b": 16},
    }
    shape = argparse.Namespace(**SHAPE, micro=8, dtype="float32", precision="float32", smollm2=False)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(0, SHAPE["vocabulary"], (256, length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : length // 2] = -100
        records = [
            {"input_ids": line, "labels": target, "source": f"source {index % 4}"}
            for index, (line, target) in enumerate(zip(ids, labels, strict=True))
        ]
        engines = {name: make_arm(shape, records, arm) for name, arm in arms.items()}
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for _ in range(repeats + 1):
            for name, engine in engines.items():
                measured[name].append(dict(engine.train_batch().time_s))
        for name, steps in measured.items():
            kept = steps[1:]
            phases = ("total", "probe", "exchange", "select", "train", "step")
            medians = {phase: statistics.median(step.get(phase, 0.0) for step in kept) for phase in phases}
            rows.append({"length": length, "arm": name, "median_s": medians})
            print(f"{length} tokens, {name}: " + ", ".join(f"{key} {medians[key]:.3f} s" for key in phases), flush=True)
    return rows


def exchanged(r: int, d: int, h: int, pools: int = 4) -> dict[str, int]:
    """Return the payload in bytes of the signals of one step; `matrix` is that of gathering the gradients.

    `exact`: the masked columns, one float64 sum per pool for its mask, two float32 sums for the history.
    """
    exact = 4 * r * h + 8 * d * pools + 8 * d
    return {"r": r, "d": d, "spsa": 4 * r, "sketch": 4 * r * 256, "exact": exact, "matrix": 4 * r * d}


def on_paper(ranks: int, r: int, d: int, h: int) -> dict[str, Any]:
    """Compute ring all-reduce over 25 GB/s links: 2 (W - 1)/W of the payload, and 2 (W - 1) hops of 5 us."""
    payload = exchanged(r, d, h)
    hops = 2 * (ranks - 1) * 5e-6
    seconds = {
        name: round(2 * (ranks - 1) / ranks * payload[name] / 25e9 + hops, 4) for name in ("spsa", "sketch", "exact")
    }
    return {"ranks": ranks, "r": r, "d": d, "assumed": "25 GB/s a link, 5 us a hop, a ring", "seconds": seconds}


if __name__ == "__main__":
    main()
