"""The plan against counted allocations: the same configurations planned without data and run on this CPU.

    python benchmarks/memory.py                 # about 4 minutes on 2 cores; rewrites the table in docs/MEMORY.md

Every configuration trains three steps in a real engine; in the third PyTorch's profiler counts every allocation. The
plan knows the configuration only. Models are small; every part of a peak matters somewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
DOCUMENT = ROOT / "docs" / "MEMORY.md"
BEGIN, END = "<!-- accuracy: written by benchmarks/memory.py -->", "<!-- accuracy ends -->"
PHASES = ("probe", "forward", "backward", "step", "save", "total")


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    family: str
    lora: bool = False
    checkpointing: bool = False
    replay: str = "off"
    stage: int = 0
    dtype: str = "float32"
    length: int = 128
    micro: int = 4
    ranks: int = 1
    selector: str = "colm"
    estimator: str = "spsa"
    attention: str = "sdpa"
    model: dict[str, Any] = field(default_factory=dict)
    bucket: int = 1_000_000
    max_live: int = 0
    candidates: tuple[int, ...] = ()
    recipe: str = ""

    @property
    def name(self) -> str:
        """Description in words."""
        words = [
            f"{self.recipe}: {self.family}" if self.recipe else self.family,
            "LoRA" if self.lora else "full",
            self.dtype,
            f"ZeRO-{self.stage}",
        ]
        words += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        words += [self.attention] if self.attention != "sdpa" else []
        words += ["checkpointing"] if self.checkpointing else []
        words += ["replay"] if self.replay == "on" else []
        words += [self.estimator if self.selector == "colm" else self.selector]
        words += ["weights layer by layer"] if self.max_live else []
        words += [f"bucket {self.bucket:.0e}".replace("+0", "")] if self.bucket != 1_000_000 else []
        size = f"{self.micro} x {self.length} tokens"
        return ", ".join([*words, f"{size}, candidates of {self.candidates}" if self.candidates else size])


CONFIGURATIONS = (
    Configuration("llama"),
    Configuration("llama", estimator="tokens"),
    Configuration("llama", stage=1),
    Configuration("llama", stage=2, ranks=2, micro=2),
    Configuration("llama", stage=3, ranks=2, micro=2),
    Configuration("llama", stage=2, ranks=2, dtype="bfloat16", micro=2, length=256),
    Configuration("llama", checkpointing=True, length=256),
    Configuration("llama", checkpointing=True, replay="on", lora=True, length=384),
    Configuration("llama", lora=True, dtype="bfloat16", estimator="exact", length=256),
    Configuration("mistral", lora=True, stage=2, estimator="sketch", length=256),
    Configuration("qwen2", selector="full", length=256),
    Configuration("phi", lora=True, length=256),
    Configuration("phi", lora=True, checkpointing=True, replay="on", stage=2, dtype="bfloat16", length=256),
    Configuration("phi", attention="eager", length=256),
    Configuration("phi3", lora=True, stage=1, dtype="bfloat16", length=384, micro=2),
    Configuration("phi3", checkpointing=True, stage=2, length=256),
    Configuration("stablelm", lora=True, length=384, micro=2),
    Configuration("stablelm", stage=2, dtype="bfloat16", selector="big_loss", length=256),
    Configuration("llama", stage=1, ranks=2, micro=2, bucket=20_000_000),
    Configuration("llama", lora=True, stage=2, ranks=2, micro=2, bucket=20_000_000),
    Configuration("llama", stage=2, bucket=20_000_000),
    Configuration("llama", stage=3, ranks=2, micro=2, max_live=1000),
    Configuration("llama", lora=True, stage=3, ranks=2, micro=2, max_live=1000),
    Configuration("llama", recipe="classification", lora=True, stage=2, length=257, candidates=(1, 1, 1)),
    Configuration("phi", recipe="classification", lora=True, dtype="bfloat16", length=192, candidates=(6, 4)),
    Configuration("llama", recipe="pretraining", length=256, micro=8),
)

LARGE, CORESET = 16, 8


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=29644, help="for the process groups (29644)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0; the document is left")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    from colm_ds.run_folder.environment import describe_environment

    start = time.perf_counter()
    chosen = options.only if options.only else list(range(len(CONFIGURATIONS)))
    measured: dict[int, dict[str, float]] = {}
    for ranks in (1, 2):
        numbers = [number for number in chosen if CONFIGURATIONS[number].ranks == ranks]
        if numbers:
            measured |= launch(numbers, ranks, options.port)
    rows = []
    for number in chosen:
        row = {
            **asdict(CONFIGURATIONS[number]),
            "name": CONFIGURATIONS[number].name,
            **compared(number, measured[number]),
        }
        rows.append(row)
        errors = " ".join(f"{phase} {row['error'][phase]:+.1%}" for phase in row["error"])
        print(f"{row['name']}: {errors}", flush=True)
    if options.only:
        return
    result = {
        "benchmark": "memory",
        **describe_environment(),
        "rows": rows,
        "largest_error": max(abs(row["error"]["total"]) for row in rows),
        "meter_ms_per_micro_batch": meter_cost_ms(),
        "wall_s": time.perf_counter() - start,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_table(result)


def launch(numbers: list[int], ranks: int, port: int) -> dict[int, dict[str, float]]:
    """Run configurations in their own process group; return counted bytes by phase."""
    environment = {**os.environ, "LOCAL_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    command += [str(Path(__file__)), "--worker", json.dumps(numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*{port}*"):
        left.unlink(missing_ok=True)
    results = [line for line in done.stdout.split("\n") if line.startswith("RESULT ")]
    if done.returncode or len(results) != 1:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {int(key): value for key, value in json.loads(results[0].removeprefix("RESULT ")).items()}


def work(numbers: list[int]) -> None:
    """Train and count, in a rank."""
    import torch.distributed as dist

    measured = {}
    for number in numbers:
        start = time.perf_counter()
        measured[number] = run(CONFIGURATIONS[number])
        print(f"{CONFIGURATIONS[number].name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(measured), flush=True)
    dist.destroy_process_group()


def model_config(configuration: Configuration) -> Any:
    """Return a small model configuration of the family."""
    from transformers import AutoConfig

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 2 if configuration.family in ("llama", "mistral", "qwen2") else 8}
    shape |= {"vocab_size": 4000, "max_position_embeddings": 512, "pad_token_id": 0, "tie_word_embeddings": False}
    return AutoConfig.for_model(configuration.family, **{**shape, **configuration.model})


def ds_config(configuration: Configuration, count: bool = True) -> dict[str, Any]:
    """Return DeepSpeed's configuration with its `"colm"` section."""
    half = configuration.dtype != "float32"
    zero: dict[str, Any] = {"stage": configuration.stage, "reduce_bucket_size": configuration.bucket}
    if configuration.max_live:
        zero |= {"stage3_max_live_parameters": configuration.max_live, "stage3_prefetch_bucket_size": 1000}
        zero |= {"stage3_max_reuse_distance": 0}
    return {
        "train_micro_batch_size_per_gpu": configuration.micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32" if half and configuration.stage else None},
        "steps_per_print": 10**9,
        "colm": {
            "large_batch_size": LARGE,
            "coreset_size": LARGE if configuration.selector == "full" else CORESET,
            "selector": configuration.selector,
            "small_sources": "none",
            "replay": configuration.replay,
            "probe": {"estimator": configuration.estimator, "num_probes": "auto"},
            "memory": {"count_steps": [3] if count else []},
        },
    }


def lora_config(configuration: Configuration) -> Any:
    """Return the LoRA configuration, or None."""
    from colm_ds.recipes.sections import LoraConfig

    return LoraConfig(rank=32, alpha=64, dropout=0.05) if configuration.lora else None


def run(configuration: Configuration) -> dict[str, float]:
    """Train, and return the counted bytes of the third step by phase."""
    from transformers import AutoModelForCausalLM, set_seed

    import colm_ds
    from colm_ds.memory.meter import GIB
    from colm_ds.recipes.model import DTYPES, add_lora

    set_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        model_config(configuration), dtype=DTYPES[configuration.dtype], attn_implementation=configuration.attention
    )
    lora = lora_config(configuration)
    model = add_lora(model, lora) if lora else model
    if configuration.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = choices(configuration) if configuration.candidates else records(configuration)
    engine, _, _, _ = colm_ds.initialize(model=model, config=ds_config(configuration), training_data=data)
    for _ in range(3):
        stats = engine.train_batch()
    save = counted_save(engine)
    engine.destroy()
    assert stats.counted_gib is not None
    return {phase: value * GIB for phase, value in stats.counted_gib.items()} | {"save": save}


def records(configuration: Configuration) -> list[dict[str, Any]]:
    """Return examples of one length with a label at each token, like chunks of text."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4000, (4 * LARGE, configuration.length), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids, "source": "one"} for ids in tokens]


def choices(configuration: Configuration) -> Any:
    """Return classification examples of one length, whose candidates begin differently."""
    import numpy as np

    from colm_ds.data.choice_dataset import ChoiceDataset

    draw, sizes, count = np.random.default_rng(0), configuration.candidates, 4 * LARGE
    start = configuration.length - max(sizes)
    tokens = [
        np.concatenate([np.concatenate([prompt, [place + 1], draw.integers(1, 4000, size - 1)])])
        for prompt in draw.integers(1, 4000, (count, start))
        for place, size in enumerate(sizes)
    ]
    columns = (np.concatenate(tokens), list(map(len, tokens)), [start] * len(tokens), [len(sizes)] * count, [0] * count)
    return ChoiceDataset(*(np.array(column, dtype=np.int32) for column in columns), num_dropped={})


def counted_save(engine: Any) -> float:
    """Return the bytes while a checkpoint is written: those held, and those that writing allocates."""
    import torch.distributed as dist

    from colm_ds.memory.breakdown import held_bytes, storage_bytes
    from colm_ds.memory.counted import counted_allocations

    device = engine.deepspeed_engine.device
    held = sum(held_bytes(engine.module, engine.optimizer, device).values())
    held += storage_bytes(engine.coreset_selector.kept_tensors(), device)
    folder = Path(tempfile.gettempdir()) / f"colm_ds_memory_{os.environ['MASTER_PORT']}"
    peak = counted_allocations(lambda: engine.save_checkpoint(str(folder))).peak
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return float(held + peak)


def compared(number: int, measured: dict[str, float]) -> dict[str, Any]:
    """Return the planned and the counted bytes, and the relative error."""
    from colm_ds.config.resolve import resolve_config
    from colm_ds.planner.activations import ModelSpec
    from colm_ds.planner.job import Job
    from colm_ds.planner.plan import Planner
    from colm_ds.planner.zero_states import zero_settings
    from colm_ds.recipes.model import DTYPES

    configuration = CONFIGURATIONS[number]
    resolved = resolve_config(ds_config(configuration), configuration.ranks)
    spec = ModelSpec(
        model_config(configuration),
        DTYPES[configuration.dtype],
        configuration.attention,
        lora_config(configuration),
        configuration.checkpointing,
        "cpu",
    )
    zero = zero_settings(resolved.deepspeed, configuration.ranks, on_gpu=False)
    length = configuration.length
    job = Job(spec, zero, resolved.colm, configuration.micro, length, length, candidates=configuration.candidates)
    plan = Planner().memory(replace(job, mean_length=job.padded_length))
    predicted = {**plan.peaks, "total": plan.peak}
    phases = [phase for phase in PHASES if phase in measured and phase in predicted]
    return {
        "measured_bytes": {phase: measured[phase] for phase in phases},
        "predicted_bytes": {phase: predicted[phase] for phase in phases},
        "predicted_parts": plan.phases[plan.peak_phase],
        "error": {phase: predicted[phase] / measured[phase] - 1 for phase in phases},
    }


def meter_cost_ms() -> float:
    """Measure the cost of the always-on meter per micro-batch: two phases of forward and backward, in milliseconds."""
    import torch

    from colm_ds.memory.meter import Meter

    meter = Meter(torch.device("cpu"))
    with meter.phase("train"):
        start = time.perf_counter()
        for _ in range(500):
            with meter.part("forward"):
                pass
            with meter.part("backward"):
                pass
        return (time.perf_counter() - start) * 2.0


def write_table(result: dict[str, Any]) -> None:
    """Write the rows into the document."""
    mib = 2**20
    lines = [
        "| configuration | counted, MiB | planned, MiB | error | probe | forward | backward | step | save |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        phases = [phase for phase in PHASES if phase != "total"]
        others = [f"{row['error'][phase]:+.1%}" if phase in row["error"] else "" for phase in phases]
        measured, predicted = row["measured_bytes"]["total"] / mib, row["predicted_bytes"]["total"] / mib
        cells = [row["name"], f"{measured:.1f}", f"{predicted:.1f}", f"**{row['error']['total']:+.1%}**", *others]
        lines.append(f"| {' | '.join(cells)} |")
    machine = result["machine"]
    lines += [
        "",
        f"Largest error of a peak {result['largest_error']:.1%}. {machine['cpu']}, "
        f"torch {result['versions']['torch']}, {result['wall_s']:.0f} s in all. The meter that is always on adds "
        f"{result['meter_ms_per_micro_batch']:.2f} ms to a micro-batch.",
    ]
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
