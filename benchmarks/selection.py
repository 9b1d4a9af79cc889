# python benchmarks/selection.py
"""Selection at the paper's sizes: gradients streamed over coordinates, against the [r, d] matrix held and sent whole.

Both arms choose b of r examples of one pool from the same SPSA coefficients, direction and history (K = 1): Adam
geometry, mask of h coordinates, l1 distances, greedy medoids, update of the history. The matrix arm forms the [r, d]
matrix of gradients, normalises all of it and evaluates the gain of every candidate again for each pick; in a run of
several processes the published code also sends that matrix as pickled objects, so it is shown with and without one
`pickle.dumps` and `pickle.loads` of all rows (no network). Drawing the direction is left out of both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import pickle
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colm_ds.memory.counted import counted_allocations
from colm_ds.randomness import private_generator
from colm_ds.selection import AdamHistory, LowRankGradients, SelectionSettings, Signals, select_coreset

MIB = 1 << 20
WARM_UP_STEPS = 3
"""Steps before the first one measured: with one probe and an empty history every |u| is 1 and the choice arbitrary."""


@dataclass(frozen=True)
class Sizes:
    """r, b, d, h."""

    r: int = 128
    b: int = 64
    d: int = 327_680
    h: int = 2560


class Direction:
    """One direction held in memory, `[1, d]`."""

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.num_coordinates = z.shape[1]

    def chunk(self, start: int, stop: int) -> Tensor:
        """See `DirectionSource.chunk`."""
        return self.z[:, start:stop]

    def columns(self, index: Tensor) -> Tensor:
        """See `DirectionSource.columns`."""
        return self.z[:, index]


def step_inputs(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """Return the coefficients `[r, 1]` and direction `[1, d]` of one step."""
    generator = private_generator(0, "benchmark", step)
    return torch.randn(sizes.r, 1, generator=generator), torch.randn(1, sizes.d, generator=generator)


def streamed(coefficients: Tensor, z: Tensor, history: AdamHistory, sizes: Sizes) -> list[int]:
    """Select by `select_coreset`; return picks in order and update the history."""
    signals = Signals(
        positions=torch.arange(sizes.r),
        finite=torch.ones(sizes.r, dtype=torch.bool),
        gradients=LowRankGradients(coefficients, Direction(z)),
    )
    sources = torch.zeros(sizes.r, dtype=torch.int64)
    settings = SelectionSettings(mask_size=sizes.h)
    return select_coreset(sources, signals, sizes.b, settings=settings, history=history).positions.tolist()


def matrix(
    coefficients: Tensor, z: Tensor, history: AdamHistory, sizes: Sizes, dtype: torch.dtype = torch.float32
) -> list[int]:
    """Select with whole matrices, `[r, d]`; return picks in order and update the history.

    Distances are taken in `dtype`. Float32 breaks the many ties of one probe by round-off, so the check that both arms
    choose alike runs this once more in float64, without timing it.
    """
    gradients = coefficients @ z
    (beta1, beta2), t = history.betas, history.count + 1
    m = beta1 * history.m + (1 - beta1) * gradients
    v = beta2 * history.v + (1 - beta2) * gradients**2
    u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + history.eps)
    index = u.mean(dim=0).abs().topk(sizes.h).indices
    features = u[:, index].to(dtype)
    distance = torch.cdist(features, features, p=1.0)
    similarity = distance.max() - distance
    picks: list[int] = []
    best = torch.zeros(sizes.r, dtype=dtype)
    for _ in range(sizes.b):
        gain = torch.maximum(similarity, best[:, None]).sum(dim=0) - best.sum()
        gain[picks] = -torch.inf
        picks.append(int((gain >= gain.max() - 1e-12 * similarity.sum()).int().argmax()))  # the first of equals
        best = torch.maximum(best, similarity[:, picks[-1]])
    history.m, history.v, history.count = m[picks].mean(dim=0), v[picks].mean(dim=0), t
    return picks


def pickled(coefficients: Tensor, z: Tensor, history: AdamHistory, sizes: Sizes) -> Tensor:
    """Pass the `[r, d]` matrix through pickle once, as object collectives send it."""
    return pickle.loads(pickle.dumps(coefficients @ z))


ARMS: dict[str, Callable[..., Any]] = {"streamed": streamed, "matrix": matrix, "pickling": pickled}


def copy_of(history: AdamHistory) -> AdamHistory:
    """Return an independent history of the same content."""
    copy = AdamHistory(len(history.m), history.betas, history.eps)
    copy.load_state_dict(history.state_dict())
    return copy


def warm_history(sizes: Sizes) -> AdamHistory:
    """Return the history after the warm-up steps."""
    history = AdamHistory(sizes.d)
    for step in range(WARM_UP_STEPS):
        streamed(*step_inputs(sizes, step), history, sizes)
    return history


def resident_growth(function: Callable[[], Any]) -> int | None:
    """Return the growth of the resident peak during a call, in bytes; None if Linux does not report it."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
        before = status("VmRSS")
        function()
        return status("VmHWM") - before
    except OSError:
        return None


def memory_of(arm: str, sizes: Sizes, threads: int) -> dict[str, int | None]:
    """Measure the extra memory of one arm beside its inputs and history; meant for a fresh process."""
    torch.set_num_threads(threads)
    inputs = step_inputs(sizes, WARM_UP_STEPS)
    history = AdamHistory(sizes.d)  # filled in place: the arm's own work must not have been done before
    history.m.copy_(inputs[1][0]).mul_(0.01)
    history.v.copy_(inputs[1][0]).square_().mul_(0.001)
    history.count = WARM_UP_STEPS
    small = Sizes(r=4, b=2, d=64, h=8)
    ARMS[arm](*step_inputs(small, 0), AdamHistory(small.d), small)  # code and thread pools are loaded
    resident = resident_growth(lambda: ARMS[arm](*inputs, copy_of(history), sizes))
    history_bytes = 2 * 4 * sizes.d  # of the copy
    counted = counted_allocations(lambda: ARMS[arm](*inputs, copy_of(history), sizes)).peak
    return {
        "resident_bytes": None if resident is None else max(0, resident - history_bytes),
        "counted_bytes": counted - history_bytes,
    }


def measure(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure times of the interleaved arms, whether they chose alike, and their extra memory in fresh processes."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    same_set, same_order, same_in_float32 = [], [], []
    history = warm_history(sizes)
    for repeat in range(repeats + 1):
        inputs = step_inputs(sizes, WARM_UP_STEPS + repeat)
        order = list(ARMS) if repeat % 2 else list(ARMS)[::-1]
        outcomes: dict[str, Any] = {}
        for arm in order:
            own = copy_of(history)
            start = time.perf_counter()
            outcomes[arm] = ARMS[arm](*inputs, own, sizes)
            elapsed = time.perf_counter() - start
            if arm == "streamed":
                following = own
            if repeat:  # the first one warms up
                times[arm].append(elapsed)
        expected = matrix(*inputs, copy_of(history), sizes, torch.float64)
        same_order.append(outcomes["streamed"] == expected)
        same_set.append(set(outcomes["streamed"]) == set(expected))
        same_in_float32.append(set(outcomes["streamed"]) == set(outcomes["matrix"]))
        history = following
    times["matrix and pickling"] = [a + b for a, b in zip(times["matrix"], times["pickling"], strict=True)]

    memory = {}
    for arm in ARMS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[arm] = pool.apply(memory_of, (arm, sizes, torch.get_num_threads()))
    return {
        "times": {arm: summary(values) for arm, values in times.items()},
        "memory": memory,
        "exchanged_bytes": {"streamed": sizes.r * 1 * 4, "matrix": sizes.r * sizes.d * 4},
        "same_set": f"{sum(same_set)} of {len(same_set)}",
        "same_order": f"{sum(same_order)} of {len(same_order)}",
        "same_set_with_float32_distances": f"{sum(same_in_float32)} of {len(same_in_float32)}",
        "all_the_same": all(same_set),
    }


def summary(times_s: list[float]) -> dict[str, Any]:
    """Return the median and spread of times in seconds."""
    ordered = sorted(times_s)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median_s": statistics.median(ordered),
        "quartile1_s": quartiles[0],
        "quartile3_s": quartiles[2],
        "min_s": ordered[0],
        "max_s": ordered[-1],
        "runs_s": times_s,
    }


def machine() -> dict[str, Any]:
    """Describe the machine of the measurements."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_1min": os.getloadavg()[0],
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as lines of text."""
    baseline = result["times"]["streamed"]["median_s"]
    lines = [f"{'arm':<22}{'median s':>10}{'quartiles s':>18}{'x streamed':>12}{'counted MiB':>13}{'resident MiB':>14}"]
    for arm, times in result["times"].items():
        memory = result["memory"].get(arm, {})
        shown = [
            "" if memory.get(key) is None else f"{memory[key] / MIB:.1f}" for key in ("counted_bytes", "resident_bytes")
        ]
        spread = f"{times['quartile1_s']:.3f}-{times['quartile3_s']:.3f}"
        ratio = times["median_s"] / baseline
        lines.append(f"{arm:<22}{times['median_s']:>10.3f}{spread:>18}{ratio:>12.2f}{shown[0]:>13}{shown[1]:>14}")
    exchanged = result["exchanged_bytes"]
    lines.append(
        f"bytes exchanged: {exchanged['streamed']:,} (r K floats) against {exchanged['matrix']:,} (r d floats)"
    )
    lines.append(
        f"same set as the matrix way with float64 distances in {result['same_set']} steps, same order in "
        f"{result['same_order']}; with float32 distances, where round-off breaks ties, same set in "
        f"{result['same_set_with_float32_distances']}"
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run from the command line; return 1 if the arms did not choose the same sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of each arm (default 11)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of both arms (default 1: with more, small operations wait for each other where cores are busy)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "selection.json",
        help="result file (default benchmarks/results/selection.json)",
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1 or not 1 <= options.b <= options.r or not 1 <= options.h <= options.d:
        parser.error("needs repeats and threads >= 1, 1 <= b <= r and 1 <= h <= d")
    sizes = Sizes(options.r, options.b, options.d, options.h)
    torch.set_num_threads(options.threads)
    result = measure(sizes, options.repeats)
    flags = {"repeats": options.repeats, "threads": options.threads, **asdict(sizes)}
    given = [f"--{name}={value}" for name, value in flags.items() if value != parser.get_default(name)]
    record = {
        "benchmark": "selection",
        "command": shlex.join(["python", "benchmarks/selection.py", *given]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sizes": asdict(sizes),
        **result,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"r {sizes.r}, b {sizes.b}, d {sizes.d:,}, h {sizes.h}, K 1; {options.repeats} runs of each arm, interleaved, "
        f"threads {options.threads}"
    )
    print(table(result))
    return 0 if result["all_the_same"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
