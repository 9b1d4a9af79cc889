"""Memory added by probe and selection at Phi-2's sizes, by counted CPU allocations: no replay, LoRA rank 128, bf16.

    python benchmarks/probe_memory.py

The model has Phi-2's shapes but two layers, as the probe keeps nothing of the others. A rank's share of the paper's
large batch is 32 of 128 examples. Per estimator: what stays allocated from step to step (history, directions); the
probe's own peak above the model's weights, which passes before training's activations are there; and by how much the
peak of a whole step (probe, selection, one training micro-batch) exceeds that of the training micro-batch alone.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.config.colm import CoLMSection
from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.memory.counted import counted_allocations
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.run_folder.environment import describe_environment
from colm_ds.types import Example, LargeBatch

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=32, help="examples of this rank (32: 128 on 4 devices)")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example, the last half labelled (128)")
    parser.add_argument("--micro", type=int, default=4, help="examples of the training micro-batch (4)")
    parser.add_argument("--probe-tokens", type=int, default=512, help="tokens of a micro-batch of the probe (512)")
    parser.add_argument("--out", type=Path, default=RESULTS / "probe_memory.json", help="result file")
    options = parser.parse_args()
    model = phi()
    training = counted_allocations(lambda: train(model, large_batch(options), options.micro))
    rows = [measure(model, estimator, options, training.peak) for estimator in ("spsa", "sketch", "exact")]
    print(f"{'estimator':10} {'held MiB':>10} {'probe peak MiB':>15} {'extra peak of a step MiB':>25}")
    for row in rows:
        print(f"{row['estimator']:10} {row['held_mib']:10.1f} {row['peak_mib']:15.1f} {row['extra_mib']:25.1f}")
    print(f"training, one micro-batch of {options.micro}, 2 layers: peak {training.peak / MIB:.1f} MiB")
    result = {
        "benchmark": "probe_memory",
        **describe_environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "rows": rows,
        "training_peak_mib": training.peak / MIB,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def phi() -> Any:
    """Make a model of Phi-2's shapes in bf16 with LoRA rank 128, two layers, random weights."""
    set_seed(0)
    config = AutoConfig.for_model(
        "phi", hidden_size=2560, intermediate_size=10240, num_hidden_layers=2, num_attention_heads=32, vocab_size=51200
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=128, lora_alpha=512, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])
    return peft.get_peft_model(model, lora)


def large_batch(options: argparse.Namespace, step: int = 1) -> LargeBatch:
    """Return random tokens of one source; labels on the second half."""
    generator = torch.Generator().manual_seed(step)
    examples = {}
    for position in range(options.examples):
        ids = torch.randint(0, 51200, (options.length,), generator=generator)
        labels = torch.where(torch.arange(options.length) < options.length // 2, -100, ids)
        examples[position] = Example(ids, labels, 0, position)
    lengths = torch.full((options.examples,), options.length)
    return LargeBatch(
        step=step,
        indices=torch.arange(options.examples),
        sources=torch.zeros(options.examples, dtype=torch.int64),
        lengths=lengths,
        num_label_tokens=lengths - options.length // 2,
        home=torch.zeros(options.examples, dtype=torch.int64),
        examples=examples,
    )


def measure(model: Any, estimator: str, options: argparse.Namespace, training_peak: int) -> dict[str, Any]:
    """Measure the allocations of a step after the first, which leaves a history."""
    config = CoLMSection.model_validate(
        {
            "large_batch_size": options.examples,
            "coreset_size": options.examples // 2,
            "small_sources": "none",
            "probe": {"estimator": estimator, "precision": "float32", "max_tokens": options.probe_tokens},
            "replay": "off",
        }
    )
    selectors: list[CoresetSelector] = []

    def first_step() -> None:
        selector = CoresetSelector(model, config, {"one": options.examples}, device=torch.device("cpu"))
        selector(large_batch(options, 1))
        selectors.append(selector)

    held = counted_allocations(first_step).held  # bytes held from now on
    probing = counted_allocations(lambda: selectors[0](large_batch(options, 2)))

    def whole_step() -> None:
        batch = large_batch(options, 3)
        coreset = selectors[0](batch)
        assert coreset.size == options.examples // 2
        train(model, batch, options.micro)

    step = counted_allocations(whole_step)
    return {
        "estimator": estimator,
        "held_mib": held / MIB,
        "peak_mib": (held + probing.peak) / MIB,
        "extra_mib": (held + step.peak - training_peak) / MIB,
    }


def train(model: Any, batch: LargeBatch, micro: int) -> None:
    """Run forward and backward of one micro-batch without activation checkpointing."""
    model.train()
    examples = make_micro_batch([batch.examples[position] for position in range(micro)])
    example_loss_sums(model, find_loss_head(model), examples).sum().backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
