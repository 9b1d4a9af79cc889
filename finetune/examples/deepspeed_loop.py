"""Fine-tune in the usual DeepSpeed loop on coresets; beside the imports, initialize is what differs from DeepSpeed's.

    python finetune/examples/deepspeed_loop.py                   # a tiny model on generated rows
    deepspeed --num_gpus 4 finetune/examples/deepspeed_loop.py --model HuggingFaceTB/SmolLM2-135M --data train.jsonl \
        --output out --deepspeed_config ds.json --epochs 1

The data has prompt, completion and source; ds.json a "colm" section. A run that was ended resumes from its checkpoints.
"""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import generated
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import colm_ds
from colm_ds.distributed.agreement import single_process_environment

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1000,
    "colm": {"large_batch_size": 16},
}
"""Used where there is no --deepspeed_config."""


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model to start from; default: a tiny random one")
    parser.add_argument("--data", help="JSON lines with prompt, completion and source; default: generated")
    parser.add_argument("--output", default="runs/examples/deepspeed_loop", help="folder of the checkpoints")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--local_rank", type=int, default=-1, help="from the launcher")
    args = deepspeed.add_config_arguments(parser).parse_args()
    single_process_environment()  # for a start without a launcher
    model_name, data = generated.find(args.model, args.data)
    tokenizer = AutoTokenizer.from_pretrained(model_name)

    def tokenise(row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = load_dataset("json", data_files=data, split="train").map(tokenise)
    engine, _, loader, _ = colm_ds.initialize(
        args=args,
        model=AutoModelForCausalLM.from_pretrained(model_name),
        training_data=rows,
        config=None if args.deepspeed_config else CONFIG,
    )
    engine.load_checkpoint(args.output)
    for epoch in range(engine.step_count // engine.loader.steps_per_epoch, args.epochs):
        for batch in loader:
            loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
            engine.backward(loss)
            engine.step()
            if engine.is_gradient_accumulation_boundary() and engine.global_rank == 0:
                print(f"epoch {epoch + 1} step {engine.step_count}: loss {engine.last_stats.loss:.4f}", flush=True)
        engine.save_checkpoint(args.output)


if __name__ == "__main__":
    main()
