"""Packed rows against length-sorted micro-batches: seconds of a step, passes and padding, with few and many examples.

    python benchmarks/packing.py                                       # Llama of 12 layers, hidden 256
    python benchmarks/packing.py --model PATH --rounds 3 --sizes 2x1,8x2 --out benchmarks/results/packing_smollm2.json
    python benchmarks/packing.py --plans                               # passes and padding on 1 to 8 ranks, no model

Lengths are those of the math mixture. Steps are plain training with LoRA and activation checkpointing on one process;
every arm has its own engine with the same weights and gets the same batches, and the arms take turns. Beside seconds
there are seconds of the CPU, which other work on the machine changes less. A size BxM is a share of B examples on this
rank, in micro-batches of M examples, or of M rows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from colm_ds.batching.assign import home_ranks, micro_batches, training_ranks
from colm_ds.batching.packing import pack_micro_batches
from colm_ds.randomness import private_generator

ROOT = Path(__file__).resolve().parents[1]
NUM_DRAWS = 200


def main() -> None:
    """Run from the command line."""
    step = _steps()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model with weights, instead of the small Llama")
    parser.add_argument("--sizes", default="2x1,8x1,8x2,16x2,64x8", help="shares and micro-batches (BxM,...)")
    parser.add_argument("--max-length", type=int, default=512, help="maximum tokens of an example (512)")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of every arm (5)")
    parser.add_argument("--plans", action="store_true", help="plans of several ranks only")
    parser.add_argument("--data", type=Path, default=step.REAL_DATA, help="instruction data whose lengths are used")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/packing.json, packing_plans.json)")
    options = parser.parse_args()
    shape = {"layers": 12, "hidden": 256, "intermediate": 704, "heads": 8, "vocabulary": 2048, "dtype": "float32"}
    records, where = step.make_records(Namespace(**shape, **vars(options), pretraining=False))
    lengths = torch.tensor([len(record["input_ids"]) for record in records])
    if options.plans:
        rows, out = plans(lengths), options.out or ROOT / "benchmarks" / "results" / "packing_plans.json"
    else:
        from colm_ds.distributed.agreement import single_process_environment

        single_process_environment()
        rows, out = [], options.out or ROOT / "benchmarks" / "results" / "packing.json"
        for size in options.sizes.split(","):
            share, micro = map(int, size.split("x"))
            rows += measure(lambda: make_model(step, shape, options.model), records, share, micro, options)
            report(options, rows, where, lengths, out)  # after every size, as a run takes long
    print(table(rows))
    report(options, rows, where, lengths, out)


def make_model(step: ModuleType, shape: dict[str, Any], folder: Path | None) -> Any:
    """Return a model under LoRA with activation checkpointing, with the same weights in every call."""
    import peft

    set_seed(0)
    if folder is None:
        model = step.make_model(Namespace(**shape, smollm2=False))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=64, target_modules=targets))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measure(
    make: Any, records: list[dict[str, Any]], share: int, micro: int, options: Namespace
) -> list[dict[str, Any]]:
    """Return a row for every packing of one size."""
    import colm_ds

    arms = {packing: [] for packing in packings(options.max_length)}
    engines = {}
    for packing in arms:
        settings = {
            "train_micro_batch_size_per_gpu": micro,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "colm": {"large_batch_size": share, "coreset_size": share, "selector": "full", "packing": packing},
        }
        engines[packing] = colm_ds.initialize(model=make(), config=settings, training_data=records)[0]
    for turn in range(options.rounds + 1):
        for packing, engine in engines.items():
            begun = time.process_time()
            stats = engine.train_batch()
            spent = time.process_time() - begun
            if turn > 0:  # the first one warms up
                arms[packing].append((stats, spent))
        print(f"{share}x{micro}: round {turn} of {options.rounds}", flush=True)
    for engine in engines.values():
        engine.destroy()
    gc.collect()
    base = [spent for _, spent in arms["off"]]
    rows = []
    for packing, steps in arms.items():
        spent = [seconds for _, seconds in steps]
        rows.append(
            {
                "size": f"{share}x{micro}",
                "packing": packing,
                "median_s": statistics.median(stats.time_s["total"] for stats, _ in steps),
                "cpu_s": statistics.median(spent),
                "cpu_to_off": statistics.median(one / other for one, other in zip(spent, base, strict=True)),
                "passes": statistics.mean(stats.micro_batches["count"] for stats, _ in steps),
                "padding_fraction": padding_of([stats for stats, _ in steps]),
                "peak_gib": max(stats.memory_gib["peak"] for stats, _ in steps),
                "loss": steps[0][0].loss,
            }
        )
    return rows


def packings(longest: int) -> list[Any]:
    """Return the arms: without packing, rows as long as the longest example, and twice as long."""
    return ["off", "on", 2 * longest]


def padding_of(steps: list[Any]) -> float:
    """Return the share of padding among all tokens of some steps."""
    real = sum(stats.tokens for stats in steps)
    return 1.0 - real / sum(stats.tokens / (1.0 - stats.padding_fraction) for stats in steps)


def plans(lengths: Tensor) -> list[dict[str, Any]]:
    """Return passes, and tokens of the rank with the most, over draws of b examples on W ranks."""
    rows = []
    longest = int(lengths.max())
    for size, world_size, micro in [(8, 4, 1), (8, 4, 2), (8, 8, 1), (16, 4, 2), (32, 4, 4), (64, 4, 8), (64, 1, 8)]:
        for packing in packings(longest):
            generator = private_generator(0, "benchmark packing", size, world_size)
            passes, computed, slowest, real = 0, 0, 0, 0
            for _ in range(NUM_DRAWS):
                drawn = lengths[torch.randint(0, len(lengths), (size,), generator=generator)]
                ranks = training_ranks(range(size), drawn, home_ranks(drawn, world_size), world_size)
                by_rank = [[place for place in range(size) if ranks[place] == each] for each in range(world_size)]
                if packing == "off":
                    cut = micro_batches(by_rank, drawn, max_examples=micro)
                    plan = [[[[place] for place in batch] for batch in batches] for batches in cut]
                else:
                    plan = pack_micro_batches(by_rank, drawn, longest if packing == "on" else packing, max_rows=micro)
                tokens = [sum(_tokens(batch, drawn) for batch in batches) for batches in plan]
                passes += len(plan[0])
                computed, slowest, real = computed + sum(tokens), slowest + max(tokens), real + int(drawn.sum())
            rows.append(
                {
                    "size": f"{size} on {world_size} x{micro}",
                    "packing": packing,
                    "passes": passes / NUM_DRAWS,
                    "padding_fraction": 1.0 - real / computed,
                    "tokens_of_the_slowest": slowest / NUM_DRAWS,
                }
            )
    return rows


def _tokens(batch: list[list[int]], lengths: Tensor) -> int:
    return len(batch) * max((int(lengths[row].sum()) for row in batch), default=0)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    keys = list(rows[0])
    shown = [
        keys,
        *([f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in keys] for row in rows),
    ]
    widths = [max(len(row[column]) for row in shown) for column in range(len(keys))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)


def report(options: Namespace, rows: list[dict[str, Any]], where: str, lengths: Tensor, out: Path) -> None:
    """Write the result file."""
    from colm_ds.run_folder.environment import describe_environment

    result = {
        "benchmark": "packing",
        **describe_environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "model": "small Llama" if options.model is None else options.model.name,
            "max_length": options.max_length,
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
        },
        "data": f"{where}; mean {float(lengths.double().mean()):.0f} tokens, longest {int(lengths.max())}",
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")


def _steps() -> ModuleType:
    """Return the benchmark of steps, whose models and records are used."""
    spec = importlib.util.spec_from_file_location("benchmarks_step", Path(__file__).with_name("step.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
