"""Peak of every phase on the device against the plan of `colm-ds plan`, for twelve configurations; the goal is 10%.

    python -m benchmarks.gpu.memory          # about 70 s
    python -m benchmarks.gpu.memory --dry    # two small ones on the CPU, allocations counted instead

Each trains three steps in a real engine; the third one's peaks are the allocator's. What was allocated before the model
came is taken off. The plan knows the configuration only. Where it misses by more than the goal, the row is measured
again with the allocator's history, and keeps the largest blocks at the peak with the lines that allocated them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.rows import GIB, Part, parser_of, release
from benchmarks.memory import Configuration, ds_config, lora_config
from benchmarks.memory import records as records_of
from colm_ds.config.resolve import resolve_config
from colm_ds.planner.activations import ModelSpec
from colm_ds.planner.job import Job
from colm_ds.planner.plan import Planner
from colm_ds.planner.zero_states import zero_settings
from colm_ds.recipes.model import DTYPES, add_lora

PHASES = ("probe", "forward", "backward", "step", "total")

GOAL = 0.1
"""Largest error of a plan."""

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FEW_KEYS = {"num_key_value_heads": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 500}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}

LARGE, CORESET, STEPS = 32, 16, 3
BF16: dict[str, Any] = {"dtype": "bfloat16", "bucket": 20_000_000, "length": 512, "micro": 8}

CONFIGURATIONS = (
    Configuration("llama", stage=2, lora=True, checkpointing=True, replay="on", **BF16),
    Configuration("llama", stage=2, estimator="exact", model=FEW_KEYS, **BF16),
    Configuration("llama", stage=3, **BF16),
    Configuration("phi", stage=2, lora=True, checkpointing=True, replay="on", **BF16),
    Configuration("llama", length=512, micro=8),
    Configuration("llama", stage=3, lora=True, checkpointing=True, replay="on", model=FEW_KEYS, **BF16),
    Configuration("llama", lora=True, estimator="exact", **{**BF16, "bucket": 1_000_000}),
    Configuration("mistral", stage=3, lora=True, estimator="sketch", model=FEW_KEYS, **BF16),
    Configuration("phi", stage=2, checkpointing=True, **BF16),
    Configuration("qwen2", stage=2, selector="full", model=FEW_KEYS, **BF16),
    Configuration("phi3", stage=2, lora=True, checkpointing=True, **{**BF16, "length": 1024, "micro": 4}),
    Configuration("stablelm", stage=2, lora=True, **{**BF16, "length": 256, "micro": 16}),
)

DRY = (
    Configuration("llama", stage=0, lora=True, length=48, micro=2),
    Configuration("phi", stage=3, lora=True, checkpointing=True, replay="on", length=48, micro=2),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = parser_of(__doc__).parse_args(arguments)
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    part = Part("memory", options)
    planner = Planner()
    for configuration in DRY if part.dry else CONFIGURATIONS:

        def work(configuration: Configuration = configuration) -> dict[str, Any]:
            row = {"name": configuration.name} | compared(configuration, measure(configuration, part), planner, part)
            if part.device.type == "cuda" and any(abs(error) > GOAL for error in row["error"].values()):
                try:
                    row["live_at_peak"] = live_at_peak(configuration, part)
                except Exception as error:  # the measurement is there without it
                    part.note(f"{configuration.name}: no blocks at the peak: {error!r}")
            return row

        part.measure(configuration.name, work, 0.0 if part.dry else 9.0)
    for row in part.rows:
        errors = " ".join(f"{phase} {error:+.1%}" for phase, error in row["error"].items())
        print(f"{row['key'][:96]:96} {row['measured_bytes']['total'] / GIB:6.2f} GiB {errors}")
    return part.close()


def settings_of(configuration: Configuration, part: Part) -> dict[str, Any]:
    """Return the DeepSpeed configuration, with PyTorch's AdamW, which needs no compiler."""
    settings = ds_config(configuration, count=part.device.type == "cpu")
    settings["optimizer"]["params"]["torch_adam"] = True
    coreset = LARGE if configuration.selector == "full" else CORESET
    settings["colm"] |= {"large_batch_size": LARGE, "coreset_size": coreset}
    return settings


def config_of(configuration: Configuration, part: Part) -> Any:
    """Return the model's configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(configuration.family, **{**SHAPE, **configuration.model, **(SMALL if part.dry else {})})


def live_at_peak(configuration: Configuration, part: Part) -> list[str]:
    """Train three steps with the allocator's history, and return its largest blocks at the peak as lines of text."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            measure(configuration, part, {"snapshot": True, "snapshot_step": STEPS, "folder": folder})
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        (text,) = Path(folder).glob("*.txt")
        return text.read_text().splitlines()


def measure(configuration: Configuration, part: Part, memory: dict[str, Any] | None = None) -> dict[str, float]:
    """Train three steps, and return the bytes of the third by phase.

    Args:
        configuration: what is trained.
        part: the part.
        memory: further keys of `"colm.memory"`.
    """
    from transformers import AutoModelForCausalLM, set_seed

    import colm_ds

    release(part.device)
    linear = functional.linear  # DeepSpeed replaces it for stage 3, for good
    on_gpu = part.device.type == "cuda"
    if on_gpu:  # libraries take their workspaces once, tens of MiB
        start_products(part.device)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    set_seed(0)
    with torch.device(part.device):
        model: Any = AutoModelForCausalLM.from_config(
            config_of(configuration, part), dtype=DTYPES[configuration.dtype], attn_implementation="sdpa"
        )
        lora = lora_config(configuration)
        model = add_lora(model, lora) if lora else model
    if configuration.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    data = records_of(configuration)
    if part.dry:
        data = [
            {**record, **{key: [token % 500 for token in record[key]] for key in ("input_ids", "labels")}}
            for record in data
        ]
    settings = settings_of(configuration, part)
    settings["colm"]["memory"] = {**settings["colm"].get("memory", {}), **(memory or {})}
    engine = colm_ds.initialize(model=model, config=settings, training_data=data * 2)[0]
    try:
        for _ in range(STEPS):
            stats = engine.train_batch()
    finally:
        engine.destroy()
        functional.linear = linear
    peaks = stats.memory_gib if on_gpu else stats.counted_gib
    assert peaks is not None
    total = "peak" if on_gpu else "total"
    wanted = {
        phase: peaks[total if phase == "total" else phase] for phase in PHASES if phase in peaks or phase == "total"
    }
    return {phase: value * GIB - before for phase, value in wanted.items() if value > 0}


def start_products(device: torch.device) -> None:
    """Multiply matrices forward and backward, in the types that are used."""
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (weight @ weight).sum().backward()


def compared(configuration: Configuration, measured: dict[str, float], planner: Planner, part: Part) -> dict[str, Any]:
    """Return plan and measurement in bytes by phase, and the plan's relative error."""
    on_gpu = part.device.type == "cuda"
    resolved = resolve_config(settings_of(configuration, part), 1)
    spec = ModelSpec(
        config_of(configuration, part),
        DTYPES[configuration.dtype],
        "sdpa",
        lora_config(configuration),
        configuration.checkpointing,
        part.device.type,
    )
    zero = zero_settings(resolved.deepspeed, 1, on_gpu=on_gpu)
    length = configuration.length
    job = Job(spec, zero, resolved.colm, configuration.micro, length, length)
    plan = planner.memory(replace(job, mean_length=job.padded_length))
    planned = {**plan.peaks, "total": plan.peak}
    phases = [phase for phase in PHASES if phase in measured and phase in planned]
    return {
        "measured_bytes": {phase: measured[phase] for phase in phases},
        "planned_bytes": {phase: planned[phase] for phase in phases},
        "planned_parts": plan.phases[plan.peak_phase],
        "error": {phase: planned[phase] / measured[phase] - 1 for phase in phases},
    }


if __name__ == "__main__":
    sys.exit(main())
