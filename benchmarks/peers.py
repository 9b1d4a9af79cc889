"""A step of ours beside that of the tools people use: the same model, rows, b and optimizer, one process an arm.

    python benchmarks/peers.py                    # a small Llama under LoRA, ragged lengths of the math mixture
    python benchmarks/peers.py --smollm2 --coreset 16 --micro 4 --max-length 192
    python benchmarks/peers.py --arms "plain loop,ours"

Arms take turns, each time in a process of its own. Of every process the median over its steps but the first two counts,
and of those the median over rounds, as a ratio to the plain PyTorch loop of the same round; so with the seconds of the
CPU, which other work on the machine changes less, and with the positions that went through the model, padding and
passes for choosing included. Plain arms train on the same rows in the same order with the mean
over all tokens of the b, so that their losses must agree; the largest relative difference to the plain loop's is in
the table. Peak memory is the process's resident peak over what it held
before the first step. LLaMA-Factory and axolotl are two more arms (`--llamafactory FOLDER --axolotl FOLDER`, see
`peers_frameworks.py`). DataFlex has an environment and a script of its own (`peers_dataflex.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peers_frameworks  # noqa: E402
from benchmarks.peer_clock import KINDS, Clock  # noqa: E402
from benchmarks.peers_frameworks import FRAMEWORKS  # noqa: E402
from benchmarks.result_file import write_result  # noqa: E402
from benchmarks.step import REAL_DATA, add_model_arguments, make_model, make_records  # noqa: E402

LR = 1e-4
PLAIN_LOOP, PLAIN = "plain loop, PyTorch", "plain"
Rows = list[dict[str, Any]]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(
        parser,
        ("rank", 16, "LoRA rank; 0: full training"),
        ("coreset", 32, "b"),
        ("micro", 8, "examples of a micro-batch"),
        ("max-length", 256, "maximum tokens of an example"),
        ("steps", 7, "steps of a process"),
        ("rounds", 3, "processes of every arm"),
    )
    parser.add_argument("--arms", default="", help="only arms whose name contains one of these, separated by commas")
    parser.add_argument("--data", type=Path, default=REAL_DATA, help="instruction data whose lengths are used")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json", help="result file")
    for framework in FRAMEWORKS.values():
        about = "folder of its environment, made where it is missing: its own training is an arm too"
        parser.add_argument(f"--{framework}", type=Path, metavar="FOLDER", help=about)
    parser.add_argument("--run-arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.pretraining = False
    if options.run_arm:
        _run_arm(options)
        return
    wanted = [part.strip() for part in options.arms.split(",") if part.strip()]
    theirs = {name: getattr(options, package) for name, package in FRAMEWORKS.items() if getattr(options, package)}
    arms = [name for name in (*ARMS, *theirs) if not wanted or any(part in name for part in wanted)]
    interpreters = {
        name: peers_frameworks.environment(FRAMEWORKS[name], theirs[name]) for name in arms if name in theirs
    }
    versions = {name: peers_frameworks.versions(FRAMEWORKS[name], python) for name, python in interpreters.items()}
    rounds: list[dict[str, dict[str, Any]]] = []
    not_run: dict[str, str] = {}
    for turn in range(options.rounds):
        rounds.append({})
        for name in [name for name in arms if name not in not_run]:
            try:
                rounds[-1][name] = _in_a_process(name, interpreters.get(name), options.steps)
            except SystemExit as failure:
                if name not in theirs:
                    raise
                not_run[name] = str(failure).strip().rpartition("\n")[2]
                print(f"round {turn + 1}: {name}: not run: {not_run[name]}", flush=True)
                continue
            print(f"round {turn + 1}: {name}: {rounds[-1][name]['step_s']:.2f} s", flush=True)
        rows = summarise([{name: arm for name, arm in each.items() if name not in not_run} for each in rounds])
        _write(options, rows, versions, not_run)
    print(format_rows(rows))


def _in_a_process(name: str, python: Path | None, steps: int) -> dict[str, Any]:
    """Run an arm; a framework's has its inputs written by a first process and runs by its own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--run-arm", name, "--out", f"{folder}/arm.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        if python is not None:
            return peers_frameworks.run(FRAMEWORKS[name], python, Path(folder), steps)
        return json.loads(Path(folder, "arm.json").read_text(encoding="utf-8"))


def _run_arm(options: argparse.Namespace) -> None:
    """Train with one arm and write its seconds, losses and memory."""
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    records, _ = make_records(options)
    records = records[: options.coreset * 4 * options.steps * 2]
    torch.manual_seed(0)
    model = make_model(options).train()
    if options.rank:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets)
        model = peft.get_peft_model(model, lora)
    if options.run_arm in FRAMEWORKS:
        if not options.rank:
            raise SystemExit("--rank 0: LLaMA-Factory and axolotl are measured with LoRA alone.")
        ordered = [row for rows in batches(options, records) for row in rows]
        settings = {**training_arguments(options), "max_length": options.max_length}
        package = FRAMEWORKS[options.run_arm]
        peers_frameworks.write_inputs(package, Path.cwd(), model, _tokenizer(options), ordered, settings)
        return
    clock = Clock()
    clock.watch(model)
    ARMS[options.run_arm](options, model, records, clock)
    options.out.write_text(json.dumps(clock.measured()), encoding="utf-8")


def batches(options: argparse.Namespace, records: Rows) -> Iterator[Rows]:
    """Yield the b rows of every step, in the order of colm_ds's plain training with seed 0."""
    from colm_ds.batching.mixture import MixtureSampler

    sampler = MixtureSampler(len(records), options.coreset, 0)
    for step in range(1, options.steps + 1):
        yield [records[index] for index in sampler.indices(step).tolist()]


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest of them."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def _micro_batches(options: argparse.Namespace, rows: Rows) -> list[dict[str, torch.Tensor]]:
    return [collate(rows[start : start + options.micro]) for start in range(0, len(rows), options.micro)]


def _num_labels(rows: Rows) -> int:
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def plain_loop(options: argparse.Namespace, model: Any, records: Rows, clock: Clock) -> None:
    """Train with PyTorch alone, as nanoGPT's loop does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    for rows in batches(options, records):
        clock.begin()
        total, loss = _num_labels(rows), 0.0
        for batch in _micro_batches(options, rows):
            part = model(**batch, num_items_in_batch=total).loss
            part.backward()
            loss += float(part.detach())
        optimizer.step()
        optimizer.zero_grad()
        clock.end(loss)


def deepspeed_loop(options: argparse.Namespace, model: Any, records: Rows, clock: Clock) -> None:
    """Train with DeepSpeed's engine in its usual loop."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a single process waits for its compilation
    engine, *_ = deepspeed.initialize(model=model, config=_deepspeed_config(options))
    count = -(-options.coreset // options.micro)
    for rows in batches(options, records):
        clock.begin()
        total, loss = _num_labels(rows), 0.0
        for batch in _micro_batches(options, rows):
            part = engine(**batch, num_items_in_batch=total).loss
            engine.backward(part * count)  # which divides by the accumulation steps
            engine.step()
            loss += float(part.detach())
        clock.end(loss)


def _deepspeed_config(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "train_batch_size": options.coreset,
        "train_micro_batch_size_per_gpu": options.micro,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": options.dtype == "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0, "torch_adam": True}},
        "steps_per_print": 10**9,
    }


def training_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the `TrainingArguments` of all arms that have them."""
    return {
        "output_dir": "out",
        "per_device_train_batch_size": options.micro,
        "gradient_accumulation_steps": options.coreset // options.micro,
        "max_steps": options.steps,
        "seed": 0,  # of the order of rows, as in `batches`
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.dtype == "bfloat16",
        "optim": "adamw_torch",
    }


def _trainer(kind: str) -> Callable[..., None]:
    """Return the arm of a Trainer: `transformers`, `trl`, or `ours` with its section."""

    def run(options: argparse.Namespace, model: Any, records: Rows, clock: Clock) -> None:
        from datasets import Dataset, disable_progress_bars
        from transformers import TrainerCallback, TrainingArguments

        disable_progress_bars()

        class Timer(TrainerCallback):
            """Note begin and end of every step."""

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.end()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    clock.losses.append(float(logs["loss"]))

        ordered = [row for rows in batches(options, records) for row in rows]
        common = {**training_arguments(options), "output_dir": tempfile.mkdtemp()}
        if kind == "trl":
            from trl import SFTConfig, SFTTrainer

            kept = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in ordered]
            settings = SFTConfig(
                **common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False
            )
            settings.train_sampling_strategy = "sequential"
            trainer = SFTTrainer(
                model,
                args=settings,
                train_dataset=Dataset.from_list(kept),
                data_collator=_collate_lists,
                processing_class=_tokenizer(options),
                callbacks=[Timer()],
            )
        elif kind == "transformers":
            from transformers import Trainer

            kept = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in ordered]
            trainer = Trainer(
                model,
                TrainingArguments(**common, train_sampling_strategy="sequential"),
                data_collator=_collate_lists,
                train_dataset=Dataset.from_list(kept),
                callbacks=[Timer()],
            )
        else:
            from colm_ds.integrations.transformers import CoLMConfig, CoLMTrainer

            names = ("input_ids", "labels", "source")
            kept = [{name: row[name] if name == "source" else row[name].tolist() for name in names} for row in records]
            b = options.coreset
            plain = {"large_batch_size": b, "selector": "full", "loss_normalization": "token"}
            chosen = {"large_batch_size": 4 * b, "probe": {"estimator": "tokens"}}
            trainer = CoLMTrainer(
                model=model,
                args=TrainingArguments(**common),
                data_collator=_collate_lists,
                train_dataset=Dataset.from_list(kept),
                colm=CoLMConfig(**(plain if kind == "ours, plain" else chosen)),
                callbacks=[Timer()],
            )
        trainer.train()

    return run


def _collate_lists(rows: Rows) -> dict[str, torch.Tensor]:
    return collate([{name: torch.as_tensor(row[name]) for name in ("input_ids", "labels")} for row in rows])


def _tokenizer(options: argparse.Namespace) -> Any:
    """Return a tokenizer that names special tokens; nothing is tokenised."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")


def _ours(section: Callable[[int], dict[str, Any]]) -> Callable[..., None]:
    """Return the arm of `colm_ds.initialize` with a section for a given b."""

    def run(options: argparse.Namespace, model: Any, records: Rows, clock: Clock) -> None:
        import colm_ds

        settings = {**_deepspeed_config(options), "colm": {"seed": 0, **section(options.coreset)}}
        engine, *_ = colm_ds.initialize(model=model, config=settings, training_data=records)
        for _ in range(options.steps):
            clock.begin()
            stats = engine.train_batch()
            clock.end(stats.loss)

    return run


ARMS: dict[str, Callable[..., None]] = {
    PLAIN_LOOP: plain_loop,
    "plain, DeepSpeed": deepspeed_loop,
    "plain, transformers.Trainer": _trainer("transformers"),
    "plain, TRL SFTTrainer": _trainer("trl"),
    "plain, ours": _ours(
        lambda b: {"selector": "full", "large_batch_size": b, "coreset_size": b, "loss_normalization": "token"}
    ),
    "plain, our Trainer": _trainer("ours, plain"),
    "tokens b of 4b, ours": _ours(
        lambda b: {"large_batch_size": 4 * b, "coreset_size": b, "probe": {"estimator": "tokens"}}
    ),
    "tokens b of 4b, our Trainer": _trainer("ours, tokens"),
    "exact b of 2b, ours": _ours(
        lambda b: {"large_batch_size": 2 * b, "coreset_size": b, "probe": {"estimator": "exact"}}
    ),
}
"""Every arm: options, model, rows and clock to a trained model."""


RATIOS = ("to_plain_loop", "cpu_to_plain_loop", "positions_to_plain_loop")
"""Names of the ratios to the plain loop of what the clock measures."""


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each arm: seconds, ratio to the plain loop of the same round, memory, difference of losses."""
    rows = []
    for name in rounds[0]:
        each = [turn[name] for turn in rounds]
        first = [turn.get(PLAIN_LOOP) for turn in rounds]
        pairs = [(arm, base) for arm, base in zip(each, first, strict=True) if base]
        row: dict[str, Any] = {"arm": name}
        for kind, ratio in zip(KINDS, RATIOS, strict=True):
            row[kind] = statistics.median(arm[kind] for arm in each)
            row[ratio] = statistics.median(arm[kind] / base[kind] for arm, base in pairs) if pairs else None
        row |= {
            "peak_gib": statistics.median(arm["peak_gib"] for arm in each),
            "losses": each[0]["losses"],
            "largest_difference": None,
        }
        base = first[0]
        if base and name.startswith(PLAIN):
            losses = zip(each[0]["losses"], base["losses"], strict=False)
            row["largest_difference"] = max(abs(one - other) / abs(other) for one, other in losses)
        rows.append(row)
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table for the terminal."""
    lines = [
        f"{'arm':30} {'s/step':>8} {'to plain loop':>14} {'CPU s':>8} {'to plain loop':>14} {'positions':>10} "
        f"{'to plain loop':>14} {'peak GiB':>9} {'loss differs by':>16}"
    ]
    for row in rows:
        ratio, of_cpu, of_positions = ("" if row[key] is None else f"{row[key]:.2f}" for key in RATIOS)
        differs = "" if row["largest_difference"] is None else f"{row['largest_difference']:.1e}"
        lines.append(
            f"{row['arm']:30} {row['step_s']:8.2f} {ratio:>14} {row['cpu_s']:8.2f} {of_cpu:>14} "
            f"{row['positions']:10,.0f} {of_positions:>14} {row['peak_gib']:9.2f} {differs:>16}"
        )
    return "\n".join(lines)


def _write(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    versions: dict[str, dict[str, str]],
    not_run: dict[str, str],
) -> None:
    unwritten = ("data", "out", "run_arm", *FRAMEWORKS.values())
    settings = {key: value for key, value in vars(options).items() if key not in unwritten}
    trl = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None
    write_result(options.out, "peers", trl=trl, theirs=versions, settings=settings, rows=rows, not_run=not_run)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
