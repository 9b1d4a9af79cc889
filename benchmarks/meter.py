"""Cost of measuring memory in a step: the engine's meter, which is always on, and `MemoryHooks` in a plain loop.

    python benchmarks/meter.py                 # about 3 minutes

Each pair has one model and takes its steps in turns, with and without, alternating which is first; the cost is the
median of the differences of two neighbouring steps, so that a slow moment of the machine affects both. On a CPU times
are processor times of one thread, as other processes may want the cores; on a GPU they are wall-clock times. The table
also has the cost of the same phases with nothing in them, which lacks the noise of the step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "meter.json"
VOCABULARY = 2048


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (4)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example (128)")
    parser.add_argument("--micro", type=int, default=4, help="examples of a micro-batch (4)")
    parser.add_argument("--large", type=int, default=32, help="r (32); b is half of it")
    parser.add_argument("--rounds", type=int, default=20, help="steps with and as many without (20)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    options = parser.parse_args()
    from colm_ds.distributed.agreement import single_process_environment
    from colm_ds.run_folder.environment import describe_environment

    single_process_environment()
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = [compared(name, pair, options.rounds) for name, pair in pairs(options).items()]
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result = {
        "benchmark": "meter",
        **describe_environment(),
        "settings": settings,
        "rows": rows,
        "largest_share": max(row["share"] for row in rows),
        "largest_empty_share": max(row["empty_share"] for row in rows),
        "wall_s": time.perf_counter() - start,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


@dataclass(frozen=True)
class Pair:
    """Steps to compare.

    Attributes:
        measured: a step with the meter.
        bare: the same step without it.
        empty: the phases of a step with nothing in them.
        num_micro_batches: micro-batches of a step.
    """

    measured: Callable[[], None]
    bare: Callable[[], None]
    empty: Callable[[], None]
    num_micro_batches: int


def pairs(options: argparse.Namespace) -> dict[str, Pair]:
    """Make the pairs to compare, by name."""
    return {
        "engine, plain b": engine_pair(options, "full"),
        "engine, CoLM b of r": engine_pair(options, "colm"),
        "plain loop, MemoryHooks": loop_pair(options),
    }


def compared(name: str, pair: Pair, rounds: int) -> dict[str, Any]:
    """Return the medians of both, and of the difference of neighbours."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for turn in range(rounds + 1):
        order = [("with", pair.measured), ("without", pair.bare)]
        for kind, step in order if turn % 2 else order[::-1]:
            gc.collect()
            synchronise()
            start = clock()
            step()
            synchronise()
            if turn:  # the first one warms up
                seconds[kind].append(clock() - start)
    differences = [one - other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    bare = statistics.median(seconds["without"])
    quarters = statistics.quantiles(differences, n=4)
    empty = min(timed(pair.empty, clock) for _ in range(5))
    row = {
        "arm": name,
        "with_s": statistics.median(seconds["with"]),
        "without_s": bare,
        "difference_ms": 1000 * statistics.median(differences),
        "difference_quartiles_ms": [1000 * quarters[0], 1000 * quarters[2]],
        "share": statistics.median(differences) / bare,
        "empty_ms": 1000 * empty,
        "empty_share": empty / bare,
        "micro_batches": pair.num_micro_batches,
    }
    print(
        f"{name}: {1000 * row['with_s']:.1f} ms with, {1000 * bare:.1f} ms without, difference "
        f"{row['difference_ms']:+.2f} ms ({row['share']:+.2%}); empty phases {row['empty_ms']:.2f} ms "
        f"({row['empty_share']:.2%}), {pair.num_micro_batches} micro-batches",
        flush=True,
    )
    return row


def timed(call: Callable[[], None], clock: Callable[[], float], times: int = 20) -> float:
    """Return the seconds of one call, over several."""
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


def synchronise() -> None:
    """Synchronise the GPU, if any."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_model(options: argparse.Namespace) -> Any:
    """Return a Llama with random weights."""
    set_seed(0)
    shape = {"hidden_size": options.hidden, "intermediate_size": 11 * options.hidden // 4, "vocab_size": VOCABULARY}
    shape |= {"num_hidden_layers": options.layers, "num_attention_heads": 8, "num_key_value_heads": 8}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.float32)


def engine_pair(options: argparse.Namespace, selector: str) -> Pair:
    """Return steps of an engine, with its recorder and with one that measures nothing."""
    import colm_ds

    b = options.large // 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (4 * options.large, options.length), generator=generator).tolist()
    section = {"large_batch_size": b if selector == "full" else options.large, "coreset_size": b, "selector": selector}
    settings = {
        "train_micro_batch_size_per_gpu": options.micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "colm": {**section, "small_sources": "none"},
    }
    records = [{"input_ids": ids, "labels": ids, "source": "one"} for ids in tokens]
    engine = colm_ds.initialize(model=make_model(options), config=settings, training_data=records)[0]
    own, off = engine.memory, NoRecorder()

    def step(recorder: Any) -> None:
        engine.memory = recorder
        engine.train_batch()

    def empty() -> None:
        with own.step(0, nullcontext, engine.module, engine.optimizer) as meter:
            for phase in ("probe", "exchange", "select") if selector == "colm" else ("select",):
                with meter.phase(phase):
                    pass
            own.note_selected(engine.coreset_selector.kept_tensors(), None)
            with meter.phase("train"):
                for _ in range(b // options.micro):
                    for part in ("forward", "backward"):
                        with meter.part(part):
                            pass
            own.note_trained(engine.module, engine.optimizer, None)
            with meter.phase("step"):
                pass
        own.stats()

    return Pair(lambda: step(own), lambda: step(off), empty, b // options.micro)


def loop_pair(options: argparse.Namespace) -> Pair:
    """Return steps of a plain loop, with hooks on its model and optimizer and without."""
    from colm_ds.memory import MemoryHooks

    model = make_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    count = options.large // 2 // options.micro
    batches = torch.randint(0, VOCABULARY, (count, options.micro, options.length))

    def step() -> None:
        for batch in batches:
            (model(input_ids=batch, labels=batch).loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    def measured() -> None:
        with MemoryHooks(model, optimizer):
            step()

    def empty() -> None:
        with MemoryHooks(model, optimizer) as memory:
            for phase in ["forward", "backward"] * count + ["step"]:
                with memory.phase(phase):
                    pass

    return Pair(measured, step, empty, count)


class NoMeter:
    """A meter that measures nothing."""

    failed_in = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Run the block."""
        return nullcontext()

    part = phase


class NoRecorder:
    """A recorder that measures nothing."""

    save: Any = None

    @contextmanager
    def step(self, *_: Any) -> Iterator[NoMeter]:
        """Run the block."""
        yield NoMeter()

    def note_selected(self, *_: Any) -> None:
        """Note nothing."""

    note_trained = note_selected

    def stats(self) -> dict[str, Any]:
        """Return no numbers."""
        return {"memory_kind": "", "memory_gib": {}, "memory_parts_gib": {}, "counted_gib": None}

    def seconds(self) -> dict[str, float]:
        """Return no numbers."""
        return {}


if __name__ == "__main__":
    main()
