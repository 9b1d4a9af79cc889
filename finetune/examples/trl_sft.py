"""Fine-tune with TRL's SFTTrainer on coresets, the loss on completions only.

    python finetune/examples/trl_sft.py                          # a tiny model on generated rows
    torchrun --nproc_per_node 4 finetune/examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M --data train.jsonl \
        --output_dir out --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --max_steps 1000 \
        --large_batch_size 128 --lora_rank 16

The data has prompt, completion and source. Every option of SFTConfig and CoLMConfig works; 4 x 4 x 4 ranks is b = 64.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import generated
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig

from colm_ds.integrations.trl import CoLMConfig, CoLMSFTTrainer


@dataclass
class Data:
    """Model and data."""

    model: str | None = field(default=None, metadata={"help": "model to start from; default: a tiny random one"})
    data: str | None = field(default=None, metadata={"help": "JSON lines with prompt, completion and source"})
    lora_rank: int = field(default=0, metadata={"help": "train a LoRA adapter of this rank; 0: all weights"})


def main() -> None:
    """Train as the command line says."""
    parser = HfArgumentParser((Data, SFTConfig, CoLMConfig), description=__doc__)
    if sys.argv[1:]:
        data, args, colm = parser.parse_args_into_dataclasses()
    else:
        sizes = {**generated.SMALL_SIZES, "output_dir": "runs/examples/trl_sft", "report_to": "none", "bf16": False}
        data, args, colm = parser.parse_dict({**sizes, "large_batch_size": 16})
    data.model, data.data = generated.find(data.model, data.data)
    lora = LoraConfig(r=data.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM") if data.lora_rank else None
    trainer = CoLMSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(data.model),
        args=args,
        train_dataset=load_dataset("json", data_files=data.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(data.model),
        peft_config=lora,
        colm=colm,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
