"""LLaMA-Factory's and axolotl's own training on the rows, the model and the adapter of `peers.py`, as two more arms.

    python benchmarks/peers.py --llamafactory FOLDER --axolotl FOLDER

The folders are environments with those packages, each with versions of its own; they are made where they are missing,
by the interpreter that PYTHON names (minutes, 2 to 8 GB; axolotl wants Python 3.12). Rows travel tokenised and in their
order. A framework is run by its own command line in a process of its environment, in which a callback of transformers'
Trainer notes begin, end and loss of every step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peer_clock import Clock  # noqa: E402
from benchmarks.peer_environment import (  # noqa: E402
    UNFIT,
    VARIABLES,
    make_environment,
    stand_in_for_torchaudio,
    versions_in,
)

FRAMEWORKS = {"plain, LLaMA-Factory": "llamafactory", "plain, axolotl": "axolotl"}
"""Names of the arms, and of the options and packages."""

PACKAGES = {
    "llamafactory": ("torch==2.13.0", "llamafactory==0.9.5"),
    "axolotl": ("axolotl==0.21.0",),  # with the torch that it wants
}

ROWS, MODEL, ADAPTER, CONFIG, MEASURED = "rows.json", "model", "adapter", "config.yaml", "arm.json"


def environment(framework: str, folder: Path) -> Path:
    """Return the interpreter of a framework's environment, made where it is missing."""
    return make_environment(folder, PACKAGES[framework], without=UNFIT if framework == "llamafactory" else ())


def versions(framework: str, python: Path) -> dict[str, str]:
    """Return the versions of a framework, transformers and torch in its environment."""
    return versions_in(python, (framework, "transformers", "torch"))


def write_inputs(
    framework: str, folder: Path, model: Any, tokenizer: Any, rows: Iterable[Any], settings: dict[str, Any]
) -> None:
    """Write everything that a framework is run with.

    Args:
        framework: its package.
        folder: where it will run.
        model: a `PeftModel`.
        tokenizer: names special tokens.
        rows: examples in the order in which they are trained on.
        settings: `TrainingArguments` that all arms share, and `max_length`, the maximum tokens of a row.
    """
    import yaml

    model.save_pretrained(folder / ADAPTER)
    model.unload().save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    kept = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in rows]
    for row in kept:
        row["attention_mask"] = [1] * len(row["input_ids"])
    (folder / ROWS).write_text("\n".join(map(json.dumps, kept)) + "\n", encoding="utf-8")
    config = _llamafactory(settings) if framework == "llamafactory" else _axolotl(settings)
    (folder / CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")


def _llamafactory(settings: dict[str, Any]) -> dict[str, Any]:
    ours = {key: value for key, value in settings.items() if key != "max_length"}
    return {
        **ours,
        "model_name_or_path": MODEL,
        "adapter_name_or_path": ADAPTER,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "template": "empty",
        "dataset": "rows",
        "tokenized_path": "tokenized",
        "cutoff_len": settings["max_length"],
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
    }


def _axolotl(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "base_model": MODEL,
        "adapter": "lora",
        "lora_model_dir": ADAPTER,
        "lora_target_linear": False,
        "datasets": [{"path": ROWS, "ds_type": "json", "type": None}],
        "dataset_prepared_path": "prepared",
        "dataset_num_proc": 1,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in the order of the file
        "sequence_len": settings["max_length"],
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "micro_batch_size": settings["per_device_train_batch_size"],
        "optimizer": settings["optim"],
        "lr_scheduler": settings["lr_scheduler_type"],
        "num_epochs": 1,
        "val_set_size": 0,
        "bf16": settings["bf16"],
        **{
            key: settings[key]
            for key in (
                "output_dir",
                "gradient_accumulation_steps",
                "max_steps",
                "seed",
                "learning_rate",
                "weight_decay",
                "max_grad_norm",
                "logging_steps",
                "save_strategy",
            )
        },
        **dict.fromkeys(("fp16", "tf32", "gradient_checkpointing", "flash_attention"), False),
    }


def run(framework: str, python: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Train in a framework's environment; return seconds, losses and memory as `peers.py` has them.

    Raises:
        SystemExit: if it fails, with the end of its output, or takes another number of steps.
    """
    variables = {**VARIABLES, "DS_ACCELERATOR": "cpu", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HOME": str(folder / "cache")}
    command = [str(python), __file__, framework]
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    if not (folder / MEASURED).exists():
        raise SystemExit(f"{framework} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    if len(measured["losses"]) != steps:
        raise SystemExit(f"{framework} took {len(measured['losses'])} of {steps} steps.")
    return measured


def _inside(framework: str) -> None:
    """Run a framework's command line in its environment, and note its steps."""
    import torch
    from transformers import Trainer, TrainerCallback

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    clock = Clock()

    class Timer(TrainerCallback):
        """Note begin, end and loss of every step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    train = Trainer.train

    def timed(self: Any, *arguments: Any, **more: Any) -> Any:
        clock.watch(self.model)
        self.add_callback(Timer())
        return train(self, *arguments, **more)

    Trainer.train = timed
    if framework == "llamafactory":
        from datasets import Dataset, DatasetDict

        rows = [json.loads(line) for line in Path(ROWS).read_text(encoding="utf-8").split("\n") if line]
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk("tokenized")
        stand_in_for_torchaudio()
        from llamafactory.cli import main

        sys.argv = ["llamafactory-cli", "train", CONFIG]
        main()
    else:
        import runpy

        sys.argv = ["axolotl.cli.train", CONFIG]
        runpy.run_module("axolotl.cli.train", run_name="__main__")
    Path(MEASURED).write_text(json.dumps(clock.measured()), encoding="utf-8")


if __name__ == "__main__":
    _inside(sys.argv[1])
