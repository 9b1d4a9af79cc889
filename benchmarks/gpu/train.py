"""The grids of SmolLM2-135M with its weights: many runs at once on one device, and accuracy on questions.

    python -m benchmarks.gpu.train                     # as many runs as fit into --seconds, seed by seed
    python -m benchmarks.gpu.train --seeds 1 2 --at-once 12
    python -m benchmarks.gpu.train --dry               # two arms of a tiny random model, on the CPU

Each run is what `colm-ds sweep` would start, a process of its own. Numbers of every run come back in the rows, its
metrics and configuration in `train_runs.tar.gz`: `colm-ds sweep` makes its tables where they are unpacked.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import PACK, ROOT, WORK, Part, parser_of
from benchmarks.gpu.shared_device import shared_device
from benchmarks.step import REAL_DATA
from colm_ds.run_folder.contents import EVALUATION, RESULTS, SUMMARY
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.read import is_finished
from colm_ds.sweep import jobs_of, load_grid
from colm_ds.sweep.grid import SweepJob

MODEL = WORK / "smollm2"
"""Where `run.sh` puts the weights that `pack.sh` gathered."""

GRIDS = ROOT / "finetune" / "grids"


@dataclass(frozen=True)
class Setting:
    """How the runs of a grid are called, and what they need.

    Attributes:
        name: in front of their rows' keys; grids of one name share runs.
        gib: memory of a run on the device, generously.
        math: whether they train on the mixture; else on SuperGLUE.
    """

    name: str
    gib: float
    math: bool = True


SETTINGS = {
    "table7_multirc_smollm2": Setting("MultiRC", 12.0, math=False),
    "smollm2_tokens_b64": Setting("b 64", 9.0),
    "table7_sst2_smollm2": Setting("SST-2", 5.0, math=False),
    "smollm2_tokens": Setting("b 8", 4.0),
    "table1_smollm2": Setting("b 8", 4.0),
    "table2_smollm2": Setting("b 8", 4.0),
    "table5_smollm2": Setting("b 8", 4.0),
}
"""Grids, the longest runs first."""

QUESTIONS_GIB = 8.0
DEVICE_GIB = 70.0
"""Memory of the device that runs may take together."""

MEASURED = ("plain 8", "tokens 8 of 32", "plain 16")
"""Arms whose models, of the first seed, are asked questions."""

BASE = WORK / "base"
"""Folder of the answers of the model before training."""

QUESTIONS = (
    *("--tasks", "gsm8k,svamp,MATH", "--limit", "200", "--max-new-tokens", "256"),
    *("--max-tokens", "131072", "--max-examples", "200"),
)

LENGTHS = {"b 8": 192, "b 64": 256}
"""Tokens of an example, by the settings that train on the mixture."""

PACKING_S = 12.0
"""Seconds for stopping runs and packing what they wrote, before the clock runs out."""

LARGEST = 4 << 20
"""Bytes of the largest file of a run that comes back."""


@dataclass(frozen=True)
class Task:
    """A process to run.

    Attributes:
        key: key of its row.
        command: what to run.
        folder: folder of the run that it makes or measures.
        after: key of the task that has to be done first; empty if none.
        gib: memory that it may need on the device.
    """

    key: str
    command: tuple[str, ...]
    folder: Path
    after: str = ""
    gib: float = 4.0

    @property
    def log(self) -> Path:
        """File of the output."""
        kind = "evaluation" if self.after or "evaluate" in self.command else "run"
        return self.folder.with_name(f"{self.folder.name}.{kind}.log")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes at once")
    parser.add_argument(
        "--grids", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), help="names of grids (all)"
    )
    parser.add_argument("--without", nargs="*", default=[], help="without arms whose name contains one of these")
    parser.add_argument("--no-questions", action="store_true", help="without accuracy on questions")
    options = parser.parse_args(arguments)
    part = Part("train", options)
    if not part.dry and not MODEL.is_dir():
        part.note("no weights: carry both halves of the weights and the data (README.md)")
        return part.close()
    os.chdir(ROOT)  # folders of runs are relative to the project
    tasks = dry_tasks() if part.dry else tasks_of(options)
    for task in tasks:  # finished by an earlier call, which was ended before it could say so
        if "train" in task.command and is_finished(task.folder) and part.known(task.key) is None:
            part.add(task.key, row_of(task) or {})
    wanted = [task for task in tasks if part.known(task.key) is None]
    done = {task.key for task in tasks if task not in wanted}
    wanted = [task for task in wanted if not task.after or task.after not in done or is_finished(task.folder)]
    print(f"train: {len(wanted)} of {len(tasks)} processes to run, {options.at_once} at once", flush=True)
    if not part.dry and any("train" in task.command for task in wanted):
        names = {task.key.partition(":")[0] for task in wanted}
        tokenise(MODEL, mixture(), [length for name, length in LENGTHS.items() if name in names])
    with shared_device(WORK / "mps") as shared:
        if part.device.type == "cuda":
            part.note(shared)
        run(part, wanted, options.at_once)
    pack(sorted({task.folder for task in tasks}), options.out / f"{'dry_' if part.dry else ''}train_runs.tar.gz")
    return part.close()


def tasks_of(options: Any) -> list[Task]:
    """Return all runs, seed by seed, and the questions to the runs of `MEASURED` with the first seed."""
    data = PACK / "data"
    shared = ["model.name_or_path=" + _shown(MODEL), "model.gguf_file=null", "optimizer.torch_adam=true"]
    shared += ["data.cache_dir=" + _shown(WORK / "tokens")]
    math = [*shared, f"data.train={_shown(mixture())}", "data.holdout_per_source=24"]
    math += ["evaluation.every=25", "evaluation.max_tokens=32768"]
    choices = [*shared, f"data.folder={_shown(data / 'superglue')}", "evaluation.max_tokens=32768"]
    tasks = []
    for seed in options.seeds:
        for name, setting in SETTINGS.items():
            if name not in options.grids or not (setting.math or seed == options.seeds[0]):
                continue
            grid = load_grid(GRIDS / f"{name}.yaml", math if setting.math else choices, [seed])
            named = [job for job in jobs_of(grid) if not any(word in job.arm for word in options.without)]
            tasks += [run_of(job, setting) for job in named]
        if seed == options.seeds[0] and not options.no_questions:
            asked = [task for task in tasks if task.key in [f"b 8: {arm}, seed {seed}" for arm in MEASURED]]
            tasks.append(questions_of("base", [_shown(MODEL), "--out", _shown(BASE)], BASE))
            tasks += [questions_of(task.key, [str(task.folder)], task.folder, task.key) for task in asked]
    return list({task.key: task for task in tasks}.values())


def mixture() -> Path:
    """Return the training data."""
    packed = PACK / "data" / "train.jsonl.gz"
    return packed if packed.exists() else REAL_DATA


def run_of(job: SweepJob, setting: Setting) -> Task:
    """Return a run of a grid."""
    command = (sys.executable, "-W", "ignore", "-m", "colm_ds.cli", "train", *job.arguments)
    return Task(f"{setting.name}: {job.arm}, seed {job.seed}", command, job.folder, gib=setting.gib)


def questions_of(name: str, words: list[str], folder: Path, after: str = "") -> Task:
    """Return the evaluation of a run or a model."""
    command = [sys.executable, "-W", "ignore", "-m", "colm_ds.cli", "evaluate", *words]
    command += [*QUESTIONS, "--data", _shown(PACK / "data" / "math_eval")]
    return Task(f"questions: {name}", tuple(command), folder, after, QUESTIONS_GIB)


def dry_tasks() -> list[Task]:
    """Return two runs of a tiny random model on generated data, and one's questions."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    from colm_ds.data.generated.mixture import write_mixture

    folder = WORK / "dry"
    data, model, questions = folder / "data", folder / "model", folder / "math_eval"
    write_mixture(data, scale=0.02)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=2, vocab_size=len(tokenizer))
    set_seed(0)  # a second call continues with the same model
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    questions.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3)]
    with gzip.open(questions / "svamp.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    place = _shown(WORK / "dry_train")
    changes = [f"model.name_or_path={_shown(model)}", "model.gguf_file=null", "optimizer.torch_adam=true", "steps=2"]
    changes += [f"data.train={_shown(data / 'train.jsonl')}", "data.cache_dir=null", "data.max_length=64"]
    changes += ["data.holdout_per_source=1", "lora={rank: 2, alpha: 4, targets: [q_proj]}"]
    grid = load_grid(GRIDS / "smollm2_tokens.yaml", changes, [0]).model_copy(update={"runs": place, "out": place})
    runs = [run_of(job, SETTINGS["smollm2_tokens"]) for job in jobs_of(grid) if job.arm in MEASURED[:2]]
    asked = questions_of(runs[0].key, [str(runs[0].folder)], runs[0].folder, runs[0].key)
    short = ["--tasks", "svamp", "--limit", "2", "--max-new-tokens", "4", "--data", _shown(questions)]
    return [*runs, replace(asked, command=(*asked.command[: asked.command.index("--tasks")], *short))]


def tokenise(model: Path, data: Path, lengths: Sequence[int]) -> None:
    """Fill the token cache, so that the processes find it."""
    from transformers import AutoTokenizer

    from colm_ds.data import load_examples
    from colm_ds.models.families import set_pad_token

    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)
    set_pad_token(tokenizer)
    for length in lengths:
        load_examples(str(data), tokenizer, length, cache_dir=WORK / "tokens")
    print(f"train: data tokenised in {time.monotonic() - start:.1f} s", flush=True)


def run(part: Part, tasks: Sequence[Task], at_once: int) -> None:
    """Run the processes, add the rows of those that end well, and stop the others when time is up."""
    waiting, running = list(tasks), dict[Task, tuple[subprocess.Popen[bytes], float]]()
    failed: set[str] = set()
    while waiting or running:
        undone = {task.key for task in (*waiting, *running)}
        for task in [task for task in waiting if task.after in failed]:
            waiting.remove(task)
            part.failed(task.key, RuntimeError(f"{task.after} failed"))
        ready = [task for task in waiting if task.after not in undone]
        for task in ready:
            if len(running) >= at_once or task.gib + sum(one.gib for one in running) > DEVICE_GIB:
                break
            waiting.remove(task)
            running[task] = (start(task), time.monotonic())
        for task, (process, begun) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[task]
            seconds = time.monotonic() - begun
            row = row_of(task) if code == 0 else None
            if row is None:
                failed.add(task.key)
                end = task.log.read_text(encoding="utf-8", errors="replace")[-2500:]
                part.failed(task.key, RuntimeError(f"exit code {code}: {end}"))
                continue
            part.add(task.key, {**row, "process_s": round(seconds, 1), "at_once": len(running) + 1})
            print(f"train: {task.key}: {seconds:.0f} s, {len(waiting)} waiting, {part.left_s:.0f} s left", flush=True)
        if not part.dry and part.left_s < PACKING_S:
            break
        time.sleep(0.1)
    for process, _ in running.values():
        process.kill()
        process.wait()
    if waiting or running:
        part.note(f"{len(waiting)} processes not started, {len(running)} stopped by the clock")


def start(task: Task) -> subprocess.Popen[bytes]:
    """Start a process with one thread."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with task.log.open("wb") as log:
        return subprocess.Popen(task.command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def row_of(task: Task) -> dict[str, Any] | None:
    """Return what a finished process measured; None if it did not finish."""
    if "evaluate" in task.command:
        place = task.folder / EVALUATION if is_finished(task.folder) else task.folder
        tasks = read_object(place / RESULTS).get("tasks")
        return {"questions": tasks} if tasks else None
    if not is_finished(task.folder):
        return None
    summary = read_object(task.folder / SUMMARY)
    arm, seed = arm_and_seed(task.key)
    return {"arm": arm, "seed": seed} | {
        key: summary.get(key) for key in ("heldout", "heldout_before", "step_s", "wall_s", "peak_memory_gib")
    }


def arm_and_seed(key: str) -> tuple[str, int]:
    """Return the two, as a run's key says them."""
    arm, _, seed = key.partition(": ")[2].rpartition(", seed ")
    return arm, int(seed)


def pack(folders: Sequence[Path], file: Path) -> None:
    """Write what runs wrote, but for weights and other large files, into one archive."""
    with tarfile.open(file, "w:gz", compresslevel=6) as archive:
        for folder in folders:
            logs = [log for log in folder.parent.glob(f"{folder.name}.*.log") if log.is_file()]
            for path in [*logs, *sorted(folder.rglob("*"))]:
                whole = path.is_file() and path.stat().st_size <= LARGEST
                if whole and path.suffix in (".json", ".jsonl", ".md", ".txt", ".log") and "adapter" not in path.parts:
                    place = path.resolve()
                    archive.add(path, place.relative_to(ROOT) if place.is_relative_to(ROOT) else path.name)


def _shown(path: Path) -> str:
    """Return a path as it is written in a run's settings, relative to the project where it lies there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
