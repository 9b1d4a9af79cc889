"""Fine-tune in a plain PyTorch loop on coresets, on one device.

    python finetune/examples/plain_loop.py                       # a tiny model on generated rows
    python finetune/examples/plain_loop.py HuggingFaceTB/SmolLM2-135M train.jsonl out --steps 1000 \
        --large_batch_size 128 --coreset_size 64

The data has prompt, completion and source. On several ranks wrap the model in DDP and let every rank load its part: the
selector then chooses from all of them, and one backward pass a step averages the gradients as it should.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import chain, islice, repeat
from typing import Any

import generated
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import colm_ds


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model to start from; default: a tiny random one")
    parser.add_argument("data", nargs="?", help="JSON lines with prompt, completion and source; default: generated")
    parser.add_argument("output", nargs="?", default="runs/examples/plain_loop", help="folder of the trained model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--large_batch_size", type=int, default=32, help="r")
    parser.add_argument("--coreset_size", type=int, default=16, help="b")
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    options = parser.parse_args()
    options.model, options.data = generated.find(options.model, options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()

    def tokenise(row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = load_dataset("json", data_files=options.data, split="train").map(tokenise)
    counts = Counter(sorted(rows["source"]))
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    sizes = {"large_batch_size": options.large_batch_size, "coreset_size": options.coreset_size}
    selector = colm_ds.CoresetSelector(model, sizes, counts, optimizer=optimizer)
    loader = DataLoader(rows, options.large_batch_size, shuffle=True, drop_last=True, collate_fn=list)
    if not len(loader):
        parser.error(f"{options.data} has {len(rows)} rows, fewer than a large batch of {options.large_batch_size}")
    epochs = chain.from_iterable(repeat(loader))  # every one in another order
    for step, examples in enumerate(islice(epochs, options.steps), start=1):
        chosen, weights = selector.share(selector(examples))
        total = 0.0
        for start in range(0, len(chosen), options.micro_batch_size):
            part = slice(start, start + options.micro_batch_size)
            losses = colm_ds.example_losses(model, [examples[place] for place in chosen[part]])
            loss = (losses * weights[part]).sum()
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {options.steps}: loss {total:.4f}", flush=True)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
