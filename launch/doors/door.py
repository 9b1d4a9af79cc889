"""Write what `launch/doors/run.sh` trains on, and compare what came of it.

python launch/doors/door.py write NAME      # model, rows and configurations, into the working directory
python launch/doors/door.py compare NAME    # fails unless the three runs agree
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "finetune" / "examples"))

NAMES = ("sums", "differences", "larger")
CORESET, LARGE, STEPS = 8, 16, 4
RUNS = {"whole": 1, "rest": 1, "two": 2}
"""Ranks by run; "rest" resumes "whole" at half of its steps."""

ROUND_OFF = 1e-4


def configurations(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the configuration of each run, as the framework writes it."""
    for run, ranks in RUNS.items():
        config: dict[str, Any] = {
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "logging_steps": 1,
        }
        config |= {"output_dir": run, "gradient_accumulation_steps": 2 // ranks}
        if run == "rest":
            config["resume_from_checkpoint"] = f"whole/checkpoint-{STEPS // 2}"
        yield run, {**config, **FRAMEWORKS[name], "colm": {"large_batch_size": LARGE, "log": "all"}}


TRAINER = {
    "per_device_train_batch_size": CORESET // 2,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "seed": 3,
}

FRAMEWORKS: dict[str, dict[str, Any]] = {
    "llamafactory": {
        **TRAINER,
        "model_name_or_path": "model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "template": "empty",
        "dataset": ",".join(NAMES),
        "dataset_dir": ".",
        "cutoff_len": 64,
    },
    "axolotl": {
        "base_model": "model",
        "plugins": ["colm_ds.integrations.axolotl.CoLMPlugin"],
        "datasets": [{"path": f"{name}.json", "ds_type": "json", "type": "alpaca"} for name in NAMES],
        "dataset_prepared_path": "prepared",
        "dataset_num_proc": 1,
        "sequence_len": 64,
        "micro_batch_size": CORESET // 2,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "val_set_size": 0,
        "seed": 3,
        "special_tokens": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        **dict.fromkeys(("bf16", "fp16", "tf32", "gradient_checkpointing", "flash_attention"), False),
    },
    "trl": {
        **TRAINER,
        "model_name_or_path": "model",
        "datasets": [{"path": "json", "data_files": f"{name}.json"} for name in NAMES],
        "bf16": False,
    },
}


def write(name: str) -> None:
    """Write model, rows and configurations."""
    import generated

    folder = Path.cwd()
    generated.write(folder)
    for source in NAMES:
        rows = [row for row in generated.rows() if row["source"] == source]
        if name == "trl":
            pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
        else:
            pairs = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in rows]
        (folder / f"{source}.json").write_text(json.dumps(pairs), encoding="utf-8")
    files = {source: {"file_name": f"{source}.json"} for source in NAMES}
    (folder / "dataset_info.json").write_text(json.dumps(files), encoding="utf-8")
    for run, config in configurations(name):
        (folder / f"{run}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def compare(name: str) -> None:
    """Compare the weights of the runs, and what was chosen of each source.

    Raises:
        SystemExit: if they differ by more than they may.
    """
    from safetensors.torch import load_file

    chosen: dict[str, list[dict[str, int]]] = {}
    runs = [run for run in RUNS if (Path(run) / "model.safetensors").exists()]  # axolotl has no two ranks on a CPU
    for run in runs:
        steps = re.findall(r"\{'loss'.*?\}", Path(f"{run}.log").read_text(encoding="utf-8"))
        pattern = r"'colm/chosen/(\w+)': '?([0-9.]+)"
        chosen[run] = [{source: int(float(count)) for source, count in re.findall(pattern, step)} for step in steps]
        print(f"{run}: chosen {chosen[run]}")
    weights = {run: load_file(Path(run) / "model.safetensors") for run in runs}
    apart = {
        run: max(float((weights[run][key] - value).abs().max()) for key, value in weights["whole"].items())
        for run in runs
    }
    versions = {package: importlib.metadata.version(package) for package in (name, "transformers", "torch")}
    two = f"{apart['two']:.1e}" if "two" in apart else "not run"
    print(f"{versions}: resumed differs by {apart['rest']:.1e}, two ranks: {two}")
    alike = chosen["whole"] == chosen.get("two", chosen["whole"]) and chosen["whole"][STEPS // 2 :] == chosen["rest"]
    counted = all(sum(step.values()) == CORESET and set(step) == set(NAMES) for step in chosen["whole"])
    near = apart["rest"] == 0 and max(apart.values()) < ROUND_OFF
    if not (alike and counted and near and len(chosen["whole"]) == STEPS):
        sys.exit(f"doors: the runs of {name} do not agree")


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](sys.argv[2])
