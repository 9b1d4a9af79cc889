"""SmolLM2-135M with its weights on the math mixture, b = 64: every arm a process of its own, all at once on one device.

    python -m benchmarks.gpu.train          # the next seeds, 100 steps; then 300 steps
    python -m benchmarks.gpu.train --dry    # a tiny random model on generated data, on the CPU

LoRA of rank 16, bf16 with float32 master weights, AdamW 5e-4 after a warm-up of 5 steps, at most 256 tokens; the
held-out loss is over 24 examples of every source. Arms of one seed see the same data in the same order. Runs
stopped by the clock are saved, and resumed by the next call on the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import PACK, ROOT, WORK, Part, estimators, median, parser_of, write_json
from benchmarks.step import REAL_DATA

RECIPE = ROOT / "finetune" / "recipes" / "smollm2_math.yaml"
MODEL = WORK / "smollm2"
"""Where `run.sh` puts the weights that `pack.sh` gathered."""

ROUNDS = [(seed, 100) for seed in range(3)] + [(seed, 300) for seed in range(3)]
"""Seed and steps of the calls, one after the other."""

MATCHED = ["colm.per_source=false", "colm.small_sources=none", "colm.weights=matched"]
SAVING_S = 8.0  # before the clock runs out
EVERY = 25  # steps between two held-out losses


@dataclass(frozen=True)
class Setting:
    """Settings that differ between a real and a dry run.

    Attributes:
        model: folder of weights and tokenizer, in Hugging Face's format.
        data: training records.
        coreset: b.
        rounds: seed and steps.
        overrides: overrides of the recipe.
    """

    model: Path
    data: Path
    coreset: int
    rounds: Sequence[tuple[int, int]]
    overrides: Sequence[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--at-once", type=int, default=6, help="processes at once (6)")
    parser.add_argument("--arms", nargs="*", default=[], help="only arms whose name contains one of these")
    parser.add_argument("--worker", help="(a process of this part) what to train, as JSON")
    options = parser.parse_args(arguments)
    if options.worker:
        return work(**json.loads(options.worker))
    part = Part("train", options)
    if "tokens" not in estimators():
        part.note("no estimator `tokens` in this version: its arms are left out")
    setting = dry_setting() if part.dry else real_setting(part)
    if setting is None:
        return part.close()
    taken_s: float | None = None
    for seed, steps in setting.rounds:
        arms = arms_of(setting.coreset)
        named = [name for name in arms if not options.arms or any(word in name for word in options.arms)]
        wanted = [name for name in named if not done(part, name, seed, steps)]
        if not wanted:
            continue
        if taken_s is not None and taken_s > part.left_s:
            part.note(f"seed {seed}, {steps} steps: left for the next call")
            break
        start = time.monotonic()
        for first in range(0, len(wanted), options.at_once):
            train(part, setting, {name: arms[name] for name in wanted[first : first + options.at_once]}, seed, steps)
        taken_s = time.monotonic() - start
        if part.left_s < 2 * SAVING_S:
            break
    for row in part.rows:
        losses = ", ".join(f"{step}: {loss['overall']:.4f}" for step, loss in row["heldout"].items())
        print(f"{row['key']:44} {row['steps']:4} steps, {row['step_s']:.3f} s each, held out {losses}")
    return part.close()


def arms_of(coreset: int) -> dict[str, list[str]]:
    """Return overrides of the recipe by arm."""
    b, r = coreset, 2 * coreset

    def size(large: int) -> list[str]:
        return [f"colm.large_batch_size={large}", f"colm.coreset_size={b}"]

    arms = {
        f"plain {b}": [f"colm.large_batch_size={b}", f"colm.coreset_size={b}", "colm.selector=full"],
        f"plain {r}": [f"colm.large_batch_size={r}", f"colm.coreset_size={r}", "colm.selector=full"],
        f"keep_random {b} of {r}": [*size(r), "colm.selector=keep_random"],
        f"CoLM {b} of {r}, spsa": [*size(r), "colm.probe.estimator=spsa"],
        f"CoLM {b} of {r}, exact, matched, joint": [*size(r), "colm.probe.estimator=exact", *MATCHED],
    }
    if "tokens" in estimators():
        for large in (r, 2 * r):
            arms[f"CoLM {b} of {large}, tokens"] = [*size(large), "colm.probe.estimator=tokens", *MATCHED]
    return arms


def key_of(arm: str, seed: int) -> str:
    """Return the key of an arm's row."""
    return f"{arm}, seed {seed}"


def done(part: Part, arm: str, seed: int, steps: int) -> bool:
    """Decide whether an arm has been trained that far.

    Half of the steps suffice if the checkpoint was lost with another machine: losses are compared at shared steps.
    """
    row = part.known(key_of(arm, seed))
    if row is None or row["steps"] >= steps:
        return row is not None
    return row["steps"] >= steps // 2 and not (folder_of(part, arm, seed) / "checkpoints").is_dir()


def folder_of(part: Part, arm: str, seed: int) -> Path:
    """Return the folder of an arm's run."""
    return WORK / ("dry_train" if part.dry else "train") / key_of(arm, seed).replace(" ", "_")


def train(part: Part, setting: Setting, arms: dict[str, list[str]], seed: int, steps: int) -> None:
    """Train arms at once and add their rows as they end."""
    until = time.time() + part.left_s - SAVING_S
    folders = {name: folder_of(part, name, seed) for name in arms}
    running: dict[str, subprocess.Popen[bytes]] = {}
    for name, changes in arms.items():
        folders[name].mkdir(parents=True, exist_ok=True)
        (folders[name] / "row.json").unlink(missing_ok=True)
        overrides = [
            f"name={json.dumps(name)}",
            f"seed={seed}",
            f"steps={steps}",
            f"output_dir={json.dumps(str(folders[name]))}",
            f"model.name_or_path={json.dumps(str(setting.model))}",
            f"data.train={json.dumps(str(setting.data))}",
            f"data.cache_dir={json.dumps(str(WORK / 'tokens'))}",
            *setting.overrides,
            *changes,
        ]
        asked = json.dumps({"overrides": overrides, "until": until, "dry": part.dry})
        command = [sys.executable, "-m", "benchmarks.gpu.train", "--worker", asked]
        with (folders[name] / "log.txt").open("wb") as log:
            running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while running:
        time.sleep(0.1)
        for name, process in list(running.items()):
            code = process.poll()
            late = code is None and time.time() > until + 2 * SAVING_S
            if late:
                process.kill()
                process.wait()
            elif code is None:
                continue
            del running[name]
            file = folders[name] / "row.json"
            if file.is_file():
                part.add(key_of(name, seed), {**json.loads(file.read_text(encoding="utf-8")), "at_once": len(arms)})
            else:
                end = (folders[name] / "log.txt").read_text(encoding="utf-8", errors="replace")[-2500:]
                part.failed(
                    key_of(name, seed), RuntimeError(f"{'took too long' if late else f'exit code {code}'}: {end}")
                )


def work(overrides: list[str], until: float, dry: bool) -> int:
    """Train an arm, in a process, until its steps are done or time is up, and write its row."""
    from transformers import set_seed

    import colm_ds
    from colm_ds.distributed.agreement import single_process_environment
    from colm_ds.distributed.exchange import make_exchange
    from colm_ds.recipes.model import load_model, load_tokenizer, quiet_libraries
    from colm_ds.recipes.recipe import load_recipe
    from colm_ds.training.run import deepspeed_config, learning_rate_factor
    from colm_ds.training.tasks import InTraining, load_task

    begun = time.monotonic()
    single_process_environment()
    quiet_libraries()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    recipe = load_recipe(RECIPE, overrides)
    tokenizer = load_tokenizer(recipe)
    task = load_task(recipe, tokenizer)
    set_seed(recipe.seed)
    settings = deepspeed_config(recipe)
    settings["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed's own would be compiled first
    factor = learning_rate_factor(recipe.lr_schedule, 100)
    engine = colm_ds.initialize(
        model=load_model(recipe, tokenizer),
        config=settings,
        training_data=task.train,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
    )[0]
    device = torch.device(engine.device)
    measuring = InTraining(engine, tokenizer, device, make_exchange(device), 0)
    saved = Path(recipe.output_dir) / "checkpoints"
    _, state = engine.load_checkpoint(str(saved))
    row: dict[str, Any] = {"heldout": {}, "losses": [], "started_s": time.monotonic() - begun, **state.get("row", {})}
    seconds, selecting = [], []
    while engine.step_count < recipe.steps and time.time() < until:
        stats = engine.train_batch()
        row["losses"].append(round(stats.loss, 5))
        seconds.append(stats.time_s["total"])
        selecting.append((stats.time_s["exchange"] + stats.time_s["select"]) / stats.time_s["total"])
        if stats.step % (1 if dry else EVERY) == 0 or stats.step == recipe.steps:
            losses = task.heldout(measuring)
            assert losses is not None
            row["heldout"][str(stats.step)] = {name: losses[name] for name in ("overall", "macro", "per_source")}
    row |= {
        "arm": recipe.name,
        "seed": recipe.seed,
        "r": recipe.colm.large_batch_size,
        "b": recipe.colm.coreset_size,
        "steps": engine.step_count,
        "whole": engine.step_count >= recipe.steps,
        "step_s": median(seconds) if seconds else 0.0,
        "exchange_and_selection_share": median(selecting) if selecting else 0.0,
        "examples": len(task.train),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    engine.save_checkpoint(str(saved), client_state={"row": row}, keep_last=1)
    write_json(Path(recipe.output_dir) / "row.json", row)
    return 0


def real_setting(part: Part) -> Setting | None:
    """Return SmolLM2 and the math mixture; None, with a note, if the weights are missing."""
    data = next((path for path in (PACK / "data" / "train.jsonl.gz", REAL_DATA) if path.exists()), None)
    if not MODEL.is_dir() or data is None:
        part.note(f"{'no weights' if data else 'no data'}: carry both halves of the weights and the data (README.md)")
        return None
    overrides = [
        "model.gguf_file=null",
        "model.dtype=bfloat16",
        "lora.rank=16",
        "lora.alpha=32",
        "lora.dropout=0.0",
        "data.max_length=256",
        "data.holdout_per_source=24",
        "micro_batch_size=32",
        "optimizer.lr=5.0e-4",
        "lr_schedule.kind=constant",
        "lr_schedule.warmup_fraction=0.05",
    ]
    tokenise(MODEL, data)
    return Setting(MODEL, data, 64, ROUNDS, overrides)


def dry_setting() -> Setting:
    """Return a tiny random model on generated data."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from colm_ds.data.generated.mixture import write_mixture

    folder = WORK / "dry"
    data, model = folder / "data", folder / "model"
    write_mixture(data, scale=0.02)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=2, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    overrides = ["model.gguf_file=null", "lora.rank=2", "data.max_length=64", "data.holdout_per_source=1"]
    overrides += ["micro_batch_size=4", "lr_schedule.kind=constant", "lr_schedule.warmup_fraction=0.05"]
    return Setting(model, data / "train.jsonl", 4, [(0, 1), (0, 2)], overrides)


def tokenise(model: Path, data: Path) -> None:
    """Fill the token cache, so that the processes find it."""
    from transformers import AutoTokenizer

    from colm_ds.data import load_examples
    from colm_ds.models.families import set_pad_token

    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)
    set_pad_token(tokenizer)
    load_examples(str(data), tokenizer, 256, source_key="source", cache_dir=WORK / "tokens")
    print(f"train: data tokenised in {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
