"""Run a recipe: build, train, evaluate, save. `finetune/train.py` and `pretrain/train.py` call it."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from colm_ds.batching.loader import source_counts
from colm_ds.checkpoints.atomic import Checkpoint
from colm_ds.checkpoints.engine_state import on_all_ranks
from colm_ds.checkpoints.weights import save_trained
from colm_ds.config.resolve import ResolvedConfig, load_config, resolve_config
from colm_ds.distributed.agreement import meet, single_process_environment, together, wait_for_ranks
from colm_ds.distributed.exchange import make_exchange
from colm_ds.engine.engine import CoLMEngine
from colm_ds.engine.initialization import initialize, prepare_deepspeed
from colm_ds.errors import CheckpointError, CoLMError, ConfigError, DeviceMemoryError, DivergenceError, SelectionError
from colm_ds.evaluation.exact_match import room_for_prompts
from colm_ds.export.model_card import write_model_card
from colm_ds.memory.meter import GIB
from colm_ds.memory.recorder import PEAKS
from colm_ds.models.architecture import find_architecture
from colm_ds.planner.advice import planned_advice
from colm_ds.process.cores import local_ranks, usable_cores
from colm_ds.process.exit import end_all, said_code
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.progress import Progress
from colm_ds.process.stop_request import StopRequest
from colm_ds.randomness import seed_global_generators
from colm_ds.recipes.data_check import check_data
from colm_ds.recipes.model import load_model, load_tokenizer, precision_sections, quiet_libraries
from colm_ds.recipes.recipe import BaseRecipe, Recipe, load_recipe
from colm_ds.recipes.sections import LrScheduleConfig
from colm_ds.run_folder.contents import (
    ADAPTER,
    CHECKPOINTS,
    DIVERGED,
    EVALUATION_ERROR,
    FINISHED,
    METRICS,
    MODEL,
    NOT_EVALUATED,
    STOPPED,
    UNFINISHED,
)
from colm_ds.run_folder.environment import describe_environment
from colm_ds.run_folder.lock import RunLock
from colm_ds.run_folder.metrics import events
from colm_ds.run_folder.read import number, numbers, read_metrics
from colm_ds.run_folder.summary import summarise
from colm_ds.run_folder.write import RunFolder
from colm_ds.training.monitors import monitor_sections, set_environment
from colm_ds.training.start_or_resume import (
    check_same_data,
    check_same_settings,
    may_restart,
    where_to_start,
)
from colm_ds.training.start_summary import Start, start_summary
from colm_ds.training.tasks import InTraining, TrainingTask, check_reference, load_task, with_steps
from colm_ds.types import StepStats
from colm_ds.untrusted.printable import visible


def run(recipe: BaseRecipe | str | Path, overrides: Sequence[str] = ()) -> None:
    """Train as a recipe says, under a launcher or alone.

    The process ends with an `ExitCode`.

    Args:
        recipe: the YAML file; or the recipe, read already.
        overrides: `key=value` changes to the file.
    """
    stop = StopRequest()
    single_process_environment()
    prepare_deepspeed()
    quiet_libraries()
    torch.set_num_threads(threads_of_rank())
    accelerator = deepspeed.get_accelerator()
    if torch.cuda.is_available():
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    meet(lambda: deepspeed.init_distributed(verbose=False))
    if not os.environ.get("DEEPSPEED_TIMEOUT"):
        wait_for_ranks()
    device = torch.device(accelerator.current_device_name())
    place = recipe
    read = together(lambda: place if isinstance(place, BaseRecipe) else load_recipe(place, overrides), device)
    if place is not read:  # else the data was checked then
        together(lambda: check_data(read) if dist.get_rank() == 0 else None, device)
    with crashes_explained():
        code = TrainingRun(read, device, stop).train()
    dist.barrier()  # the launcher ends the others once one is gone
    dist.destroy_process_group()
    if code:
        sys.exit(code)


def threads_of_rank() -> int:
    """Return this rank's share of the cores that may be used, or fewer by OMP_NUM_THREADS."""
    share = max(1, usable_cores() // local_ranks())
    return min(share, int(os.environ.get("OMP_NUM_THREADS") or share))


@contextmanager
def crashes_explained() -> Iterator[None]:
    """End with one line for what is not a fault of this rank: a full disk, or another rank that is gone."""
    try:
        yield
    except DeviceMemoryError as error:
        end_all(f"{type(error).__name__}: {error}", ExitCode.OUT_OF_MEMORY)
    except torch.OutOfMemoryError as error:  # outside a step: evaluating, saving
        end_all(f"rank {dist.get_rank()}: {error}\nTry a smaller evaluation.max_tokens.", ExitCode.OUT_OF_MEMORY)
    except ConfigError as error:
        end_all(f"{type(error).__name__}: {error}", ExitCode.BAD_INPUT)
    except CoLMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except (OSError, SafetensorError) as error:
        sys.exit(f"rank {dist.get_rank()}: {visible(error)}. Restarting resumes from the last checkpoint.")
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection")):
            raise
        if (code := said_code()) is not None:
            sys.exit(code)
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        lost = f"rank {dist.get_rank()}: lost the other ranks ({reason})."
        sys.exit(f"{lost} Restarting resumes from the last checkpoint.")
    except Exception as error:
        if "No space left on device" not in str(error):  # as tokenizers says it
            raise
        sys.exit(f"rank {dist.get_rank()}: {visible(error)}. Restarting resumes from the last checkpoint.")


class HeldBack(logging.Handler):
    """Keeps log records for later."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self._records.append(record)

    def say(self) -> None:
        """Log what was kept."""
        for record in self._records:
            logging.getLogger(record.name).handle(record)
        self._records = []


@contextmanager
def held_back(name: str) -> Iterator[HeldBack]:
    """Keep what a logger and those below it say, so that it can be said after the lines about the run.

    Where the block fails, it is said at once.
    """
    logger, kept = logging.getLogger(name), HeldBack()
    propagate = logger.propagate
    logger.addHandler(kept)
    logger.propagate = False
    failed = True
    try:
        yield kept
        failed = False
    finally:
        logger.removeHandler(kept)
        logger.propagate = propagate
        if failed:
            kept.say()


def learning_rate_factor(config: LrScheduleConfig, steps: int) -> Callable[[int], float]:
    """Return the factor of the peak learning rate by 0-based step: linear warm-up, then cosine, linear or constant."""
    warmup = math.ceil(config.warmup_fraction * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = {
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "linear": 1.0 - progress,
            "constant": 1.0,
        }[config.kind]
        return config.final_fraction + (1.0 - config.final_fraction) * shape

    return factor


def deepspeed_config(recipe: BaseRecipe) -> dict[str, Any]:
    """Fill batch size, optimizer, precision, monitors and `"colm"` into the DeepSpeed JSON of a recipe.

    Returns:
        What `resolve_config` takes; `"colm"` is the recipe's `CoLMSection` itself.

    Raises:
        ConfigError: if the JSON already has what the recipe says.
    """
    config, where = load_config(recipe.deepspeed)
    for key in ("colm", "optimizer", "scheduler"):
        if key in config:
            if isinstance(recipe.deepspeed, str):
                raise ConfigError(f"{where}: {key!r} is the recipe's to say. Remove it here.")
            raise ConfigError(f"{recipe.where}: deepspeed.{key}: the recipe has keys of its own for it. Remove it.")
    optimizer = recipe.optimizer.model_dump()
    if not optimizer["torch_adam"]:
        del optimizer["torch_adam"]  # `initialize` prefers it on a CPU
    return {
        **config,
        **precision_sections(recipe.model.dtype, config, where),
        **monitor_sections(recipe, config),
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "optimizer": {"type": "AdamW", "params": {**optimizer, "betas": list(recipe.optimizer.betas)}},
        "colm": recipe.colm_of_run,
        "steps_per_print": config.get("steps_per_print", 10**9),
    }


class TrainingRun:
    """One run of a recipe on this rank; creating it checks and loads everything."""

    def __init__(self, recipe: BaseRecipe, device: torch.device, stop: StopRequest) -> None:
        self.recipe = recipe
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.stop = stop
        self.exchange = make_exchange(device)
        self.config = together(self._checked_config, device)
        self.lock = together(lambda: RunLock(recipe.output_dir) if self.rank == 0 else None, device)
        if self.lock is not None:
            atexit.register(self.lock.release)  # a folder that was made for it alone goes again
        self.resumed = together(lambda: where_to_start(recipe) if self.rank == 0 else None, device)
        self.tokenizer = together(lambda: load_tokenizer(recipe.model, recipe.tokenizer_place), device)
        self.task = self._load_task()
        together(lambda: check_reference(recipe, self.task), device)
        self.recipe = recipe = together(lambda: with_steps(recipe, self.task.train), device)
        seed_global_generators(recipe.seed)
        self.model = together(self._checked_model, device)
        with held_back("colm_ds") as self.held_back:
            self.engine = self._make_engine()
        self.in_training = InTraining(self.engine, self.tokenizer, device, self.exchange, self.rank)
        self._earlier_s = 0.0  # of training before the resume, until its checkpoint
        self._started = time.perf_counter()
        self.first_step = together(lambda: self._resume(self.resumed), device)
        self.folder = together(self._make_folder, device)
        self.engine.monitor.open()
        self.last_heldout: dict[str, Any] | None = None
        self.weights: Path | None = None
        self.engine.memory.folder = Path(recipe.output_dir)
        self._peaks: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._take_up_peaks()

    def train(self) -> int:
        """Run all steps, then evaluate and write the summary and the weights; return the process's exit code."""
        recipe, self._started = self.recipe, time.perf_counter()
        self.stop.listen()
        if self.folder:
            described = self._describe()
            self.folder.write_config(described)
            start = Start(recipe, described, self.task.train, self.model.config, self.device.type, self.resumed)
            print(visible("\n".join(start_summary(start))), file=sys.stderr, flush=True)
            for line in self.task.losses_of_data():
                print(visible(f"{recipe.name}: {line}"), file=sys.stderr)
        self.held_back.say()
        if self.stop.agreed(self.device):
            return self._stopped(self.first_step - 1, f"before step {self.first_step}")
        if self.first_step == 1:
            self._log({"step": 0, **self._heldout(True)})
        done = self.first_step - 1
        with Progress(recipe.name, recipe.steps, "steps", done=done, shown=self.rank == 0) as bar:
            for step in range(self.first_step, recipe.steps + 1):
                facts = self.task.begin_step(self.in_training, step)
                try:
                    stats = self.engine.train_batch()
                except DeviceMemoryError as error:
                    raise error.with_advice(planned_advice(self.engine, error, recipe)) from error
                except (DivergenceError, SelectionError) as error:
                    bar.close()
                    return self._diverged(error)
                if step == recipe.steps:
                    try:
                        self._write_weights()
                    except DivergenceError as error:
                        self._record(stats, step, facts, measures=False)
                        bar.close()
                        return self._diverged(error)
                self._record(stats, step, facts)
                rate = stats.examples_trained / stats.time_s["total"]
                loss = "-" if stats.loss is None else f"{stats.loss:.3f}"
                bar.advance(note=f"loss {loss}, {rate:.1f} examples/s, {stats.memory_gib['peak']:.2f} GiB")
                with self.engine.watchdog.watching(f"agreeing after step {step} whether to stop"):
                    stopping = self.stop.agreed(self.device) and step < recipe.steps
                if stopping or (recipe.save_every and (step % recipe.save_every == 0 or step == recipe.steps)):
                    saved = self._save()
                if stopping:
                    bar.close()
                    return self._stopped(step, "without a checkpoint" if not saved else f"after step {step}", saved)
        try:
            with self.engine.watchdog.watching("the end of the run"):
                self._finish()
        except DivergenceError as error:  # resumed after a last step that was skipped as all before it
            return self._diverged(error)
        return 0

    def _record(self, stats: StepStats, step: int, facts: dict[str, Any], measures: bool = True) -> None:
        """Keep a step's numbers, with the held-out loss where it is due, unless nothing is to be measured."""
        self._note_peaks(stats.memory_gib, stats.memory_parts_gib)
        every = self.recipe.evaluation.every
        due = measures and (step == self.recipe.steps or (every > 0 and step % every == 0))
        try:
            with self._measuring_the_end() if step == self.recipe.steps else nullcontext():
                heldout = self._heldout(due)
        except BaseException:
            self._log({**stats.as_dict(), **facts})
            raise
        self._log({**stats.as_dict(), **facts, **heldout})
        if self.folder and stats.skipped:
            so_far = f"{self.engine.skipped.total} so far"
            print(f"step {step}: the gradient is not finite, nothing was changed ({so_far})", file=sys.stderr)
        if self.folder:
            for example in stats.coreset["nonfinite_examples"]:
                what = f"the {example['what']} of example {example['index']} ({example['source']}) is not finite"
                print(visible(f"step {step}: {what}; it is left out"), file=sys.stderr)

    def _note_peaks(self, peaks_gib: Mapping[str, float], parts_gib: Mapping[str, float]) -> None:
        """Keep the largest peak of each phase, and the parts of the largest of all."""
        for name, peak in peaks_gib.items():
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)
        if "peak" in peaks_gib and peaks_gib["peak"] == self._peaks["peak"]:
            self._parts = dict(parts_gib)

    def _take_up_peaks(self) -> None:
        """Note the peaks of the steps before a resume, which metrics.jsonl has of rank 0 alone."""
        for entry in read_metrics(self.folder.path / METRICS) if self.folder else ():
            if entry.get("memory_kind") == self.engine.memory.kind:
                self._note_peaks(numbers(entry.get("memory_gib")), numbers(entry.get("memory_parts_gib")))

    def _wall_s(self) -> float:
        """Return the seconds since training began, with those before the checkpoint that it was resumed from."""
        return self._earlier_s + time.perf_counter() - self._started

    def _save(self) -> bool:
        """Write a checkpoint; return whether it was written. Where it cannot be, say so and let training continue."""
        if self.folder:
            self.folder.sync()
        client_state = {
            "sources": source_counts(self.task.train),
            "data": self.task.identity(),
            "recipe": json.dumps(self.recipe.model_dump(), default=str),
            "deepspeed": json.dumps(self.engine.config.deepspeed, default=str),
            "wall_s": self._wall_s(),
        }
        try:
            folder = str(Path(self.recipe.output_dir) / CHECKPOINTS)
            self.engine.save_checkpoint(folder, client_state=client_state, keep_last=self.recipe.keep_last)
        except CheckpointError as error:
            if self.folder:
                print(f"CheckpointError: {error}", file=sys.stderr)
            return False
        return True

    def _stopped(self, step: int, where: str, saved: bool = True) -> int:
        if self.folder:
            self.folder.write_summary({"status": STOPPED, "steps": step})
            reason = self.stop.reason or "asked on another rank"
            print(visible(f"{self.recipe.name}: stopped {where} ({reason})."), file=sys.stderr)
        return ExitCode.STOPPED if saved else ExitCode.FAILED

    def _diverged(self, error: CoLMError) -> int:
        self._save()
        if self.folder:
            self.folder.write_summary({"status": DIVERGED, "steps": self.engine.step_count})
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ExitCode.DIVERGED

    def _write_weights(self) -> None:
        """Write what was trained, before anything is measured that could fail.

        Raises:
            DivergenceError: if no step changed anything, so that there is nothing to write.
        """
        self.engine.skipped.check_any_applied(self.engine.step_count)
        with self.engine.watchdog.watching("writing the trained weights"):
            folder = Path(self.recipe.output_dir)
            self.weights = save_trained(self.engine, self.tokenizer, folder, is_main=self.rank == 0)

    @contextmanager
    def _measuring_the_end(self) -> Iterator[None]:
        """Say where the trained weights are if measuring them fails, whatever the reason, and end all ranks."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):
                (Path(self.recipe.output_dir) / EVALUATION_ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            if self.folder:
                self.folder.write_summary({"status": NOT_EVALUATED, "steps": self.recipe.steps})
            where = f"The trained weights are in {self.weights}; finetune/evaluate.py measures them."
            reason = str(error).strip().split("\n")[0]
            end_all(
                f"the final evaluation failed: {type(error).__name__}: {reason} (more in {EVALUATION_ERROR})\n{where}",
                ExitCode.EVALUATION_FAILED,
            )

    def _finish(self) -> None:
        if self.weights is None:  # resumed after the last step
            self._write_weights()
        folder = Path(self.recipe.output_dir)
        with self.engine.watchdog.watching("the evaluation"), self._measuring_the_end():
            if self.last_heldout is None:
                self._heldout(True)
            results = self.task.finish(self.in_training)
        peaks, by_rank = self._largest_peaks()
        if self.folder:
            self.folder.close()
            entries = read_metrics(self.folder.path / METRICS)
            steps = [entry for entry in entries if "loss" in entry]
            summary = {"status": UNFINISHED, **summarise(steps, peaks, self._small_sources())}
            summary |= {"heldout": self.last_heldout}
            summary |= {"heldout_before": next((entry["heldout"] for entry in entries if entry["step"] == 0), None)}
            summary |= {"memory_kind": self.engine.memory.kind, "peak_memory_gib_by_rank": by_rank}
            summary |= {"peak_memory_parts_gib": self._parts}
            summary |= {"lost_data": self.task.describe().get("lost")}
            summary |= {**results, "wall_s": self._wall_s()}
            self.folder.write_summary(summary)
            assert self.weights is not None
            write_model_card(self.weights, folder, kind=ADAPTER if self.recipe.lora else MODEL)
            self.folder.write_summary({**summary, "status": FINISHED})  # the last file of a run
            print(visible(f"{self.recipe.name}: {self.recipe.steps} steps done, written to {self.recipe.output_dir}"))
            if summary["coherence"]:
                print(visible(f"{self.recipe.name}: {summary['coherence']['verdict']}"))

    def _resume(self, start: Checkpoint | None) -> int:
        """Load the checkpoint that rank 0 found whole, if it found one; return the step that comes next."""
        checkpoint = on_all_ranks(start)
        if checkpoint is None:
            return 1
        state = self.engine.resume(checkpoint)
        check_same_data(str(checkpoint.path), state.get("data", {}), self.task.identity())
        check_same_settings(str(checkpoint.path), state, self.recipe, self.engine.config.deepspeed)
        counts = source_counts(self.task.train)
        if state["sources"] != counts:
            raise ConfigError(
                f"{checkpoint.path}: was trained on {sum(state['sources'].values())} examples of "
                f"{len(state['sources'])} sources, the recipe's data has {sum(counts.values())} of {len(counts)}. "
                "Resume with the same data."
            )
        if start:
            for reason in start.passed_over:
                print(visible(f"not used: {reason}"), file=sys.stderr)
        self._earlier_s = number(state.get("wall_s")) or 0.0  # checkpoints of earlier versions lack it
        return self.engine.step_count + 1

    def _make_folder(self) -> RunFolder | None:
        if self.rank != 0:
            return None
        recipe, done = self.recipe, self.first_step - 1
        restart = recipe.overwrite or (done == 0 and may_restart(recipe))
        begun = self.resumed.path.parent.parent if self.resumed else None
        folder = RunFolder(
            recipe.output_dir, overwrite=restart, resumed_step=done if done else None, resumed_from=begun
        )
        set_environment(recipe)
        return folder

    def _checked_config(self) -> ResolvedConfig:
        recipe = self.recipe
        return resolve_config(
            deepspeed_config(recipe), self.world_size, where=recipe.where, prefix=recipe.deepspeed_prefix
        )

    def _small_sources(self) -> list[str]:
        selector = self.engine.coreset_selector
        return [selector.source_names[source] for source in selector.small]

    def _checked_model(self) -> nn.Module:
        model = load_model(self.recipe.model, self.recipe.lora, self.tokenizer)
        if self.recipe.colm.probes_model or self.recipe.colm.stores_sketches:
            find_architecture(model, self.recipe.colm.probe.layer)
        if isinstance(self.recipe, Recipe) and self.recipe.evaluation.exact_match:  # asked after the last step
            room_for_prompts(model, self.recipe.evaluation.max_new_tokens)
        return model

    def _load_task(self) -> TrainingTask:
        """Load the data; rank 0 reads first, so that the others find its cache."""

        def load() -> TrainingTask:
            return load_task(self.recipe, self.tokenizer)

        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            loaded = together(load, self.device)
            together(lambda: None, self.device)
            return loaded
        together(lambda: None, self.device)
        return together(load, self.device)

    def _make_engine(self) -> CoLMEngine:
        schedule = learning_rate_factor(self.recipe.lr_schedule, self.recipe.steps)
        engine, _, _, _ = initialize(
            model=self.model,
            config=self.config,
            training_data=self.task.train,
            target_data=self.task.target,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        )
        return engine

    def _heldout(self, due: bool) -> dict[str, Any]:
        with self.engine.watchdog.watching(f"the held-out loss after step {self.engine.step_count}"):
            heldout = self.task.heldout(self.in_training) if due else None
        if heldout is None:
            return {}
        self.last_heldout = heldout
        self.engine.monitor.write_events(events({"heldout": heldout}, self.engine.num_samples))
        return {"heldout": heldout}

    def _largest_peaks(self) -> tuple[dict[str, float], list[float]]:
        """Return the largest peak of each phase over steps and ranks, and the largest of each rank, in GiB."""
        save = self.engine.memory.save  # of the checkpoint after the last step
        saved = save.peak_bytes["save"] / GIB if save else 0.0
        mine = [max(self._peaks.get(name, 0.0), saved if name in ("save", "peak") else 0.0) for name in PEAKS]
        largest = torch.tensor(mine, device=self.device)
        ranks = [torch.empty_like(largest) for _ in range(self.world_size)]
        dist.all_gather(ranks, largest)
        rows = torch.stack(ranks)
        largest_of_all = dict(zip(PEAKS, rows.amax(dim=0).tolist(), strict=True))
        return largest_of_all, rows[:, PEAKS.index("peak")].tolist()

    def _log(self, entry: dict[str, Any]) -> None:
        if self.folder and len(entry) > 1:
            self.folder.log(entry)

    def _describe(self) -> dict[str, Any]:
        counts = source_counts(self.task.train)
        parameters = list(self.model.parameters())
        sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        return {
            "name": self.recipe.name,
            **describe_environment(),
            "seed": self.recipe.seed,
            "world_size": self.world_size,
            "num_parameters": sum(sizes),
            "num_trainable": sum(size for p, size in zip(parameters, sizes, strict=True) if p.requires_grad),
            "sources": counts,
            "small_sources": self._small_sources(),
            **self.task.describe(),
            "recipe": self.recipe.model_dump(),
            "deepspeed": self.engine.config.deepspeed,
            "colm": self.engine.config.colm.model_dump(),
            "why_not_replay": self.engine.coreset_selector.why_not_replay,
            "first_step": self.first_step,
        }
