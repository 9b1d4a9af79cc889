"""Fine-tune with transformers.Trainer on coresets: 64 of every 128 examples are trained on.

    python finetune/examples/hf_trainer.py                       # a tiny model on generated rows
    torchrun --nproc_per_node 4 finetune/examples/hf_trainer.py arguments.yaml

arguments.yaml holds TrainingArguments, the keys of `Data` below and a colm block (the batch size is the coreset's):

    model: HuggingFaceTB/SmolLM2-135M
    data: train.jsonl                  # prompt, completion, source
    output_dir: out
    per_device_train_batch_size: 4
    gradient_accumulation_steps: 4     # x 4 ranks: b = 64
    max_steps: 1000
    colm: {large_batch_size: 128}

Under DeepSpeed add `deepspeed: ds.json`; `resume_from_checkpoint: out/checkpoint-500` resumes from there.
All of them work as options too (--help), `--colm` as JSON.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import generated
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    TrainingArguments,
)

from colm_ds.integrations.transformers import CoLMArguments, CoLMTrainer


@dataclass
class Data:
    """Model and data."""

    model: str | None = field(default=None, metadata={"help": "model to start from; default: a tiny random one"})
    data: str | None = field(default=None, metadata={"help": "JSON lines with prompt, completion and source"})
    max_length: int = field(default=1024, metadata={"help": "maximum tokens of an example"})


def main(arguments: list[str]) -> None:
    """Train as a YAML file or the command line says."""
    parser = HfArgumentParser((Data, TrainingArguments, CoLMArguments), description=__doc__)
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        data, args, colm = parser.parse_yaml_file(arguments[0])
    elif arguments:
        data, args, colm = parser.parse_args_into_dataclasses(arguments)
    else:
        sizes = {**generated.SMALL_SIZES, "output_dir": "runs/examples/hf_trainer", "report_to": "none"}
        data, args, colm = parser.parse_dict({**sizes, "colm": {"large_batch_size": 16}})
    data.model, data.data = generated.find(data.model, data.data)
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_pretrained(data.model)

    def tokenise(row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        return {key: values[: data.max_length] for key, values in row.items()}

    rows = load_dataset("json", data_files=data.data, split="train").map(tokenise)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = CoLMTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, data_collator=collator, colm=colm
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
