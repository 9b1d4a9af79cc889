"""A run from its recipe: build, train, evaluate, save. What `finetune/train.py` and `pretrain/train.py` call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from colm_ds.config import load_config, resolve_config
from colm_ds.data import InstructionDataset, load_instructions, split_holdout
from colm_ds.data.loader import source_counts
from colm_ds.distributed.agreement import single_process_environment, together
from colm_ds.distributed.exchange import make_exchange
from colm_ds.engine import CoLMEngine, initialize, prepare_deepspeed
from colm_ds.errors import ConfigError
from colm_ds.evaluation.exact_match import exact_match, load_questions
from colm_ds.evaluation.heldout import heldout_loss
from colm_ds.export import save_trained
from colm_ds.models import load_model, load_tokenizer, precision_sections, quiet_libraries
from colm_ds.probe.architecture import find_architecture
from colm_ds.recipe import LrScheduleConfig, Recipe, load_recipe
from colm_ds.tracking import RunFolder, describe_environment, summarise
from colm_ds.types import StepStats


def run(recipe_path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train as a recipe says, under a launcher or alone; bad input ends all ranks with one message and exit code 2.

    Args:
        recipe_path: the YAML file.
        overrides: `key=value` changes to it.
    """
    single_process_environment()
    prepare_deepspeed()
    quiet_libraries()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))))
    accelerator = deepspeed.get_accelerator()
    if torch.cuda.is_available():
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)
    device = torch.device(accelerator.current_device_name())
    recipe = together(lambda: load_recipe(recipe_path, overrides), device)
    Run(recipe, device).train()
    dist.destroy_process_group()


def learning_rate_factor(config: LrScheduleConfig, steps: int) -> Callable[[int], float]:
    """Factor of the peak learning rate by 0-based step: linear warm-up, then cosine, linear or constant."""
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


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe: its JSON with batch sizes, optimizer, precision and `"colm"` filled in.

    Raises:
        ConfigError: if the JSON already has what the recipe says.
    """
    config, where = load_config(recipe.deepspeed)
    for key in ("colm", "optimizer", "scheduler"):
        if key in config:
            raise ConfigError(f"{where}: {key!r} is the recipe's to say. Remove it here.")
    optimizer = recipe.optimizer.model_dump()
    return {
        **config,
        **precision_sections(recipe.model.dtype),
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "optimizer": {"type": "AdamW", "params": {**optimizer, "betas": list(recipe.optimizer.betas)}},
        "colm": recipe.colm.model_dump(),
        "steps_per_print": config.get("steps_per_print", 10**9),
    }


class Run:
    """One run of a recipe on this rank; making it checks and loads everything."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.exchange = make_exchange(device)
        self.config = together(self._checked_config, device)
        self.tokenizer = together(lambda: load_tokenizer(recipe), device)
        self.train_data, self.heldout_data = self._load_data()
        questions = recipe.data.heldout if recipe.evaluation.exact_match else None
        self.questions = together(
            lambda: load_questions(questions, recipe.data.source_key) if questions else [], device
        )
        from transformers import set_seed

        set_seed(recipe.seed)
        self.model = together(self._checked_model, device)
        self.folder = together(
            lambda: RunFolder(recipe.output_dir, overwrite=recipe.overwrite) if self.rank == 0 else None, device
        )
        self.engine = self._make_engine()
        self.stats: list[StepStats] = []
        self.last_heldout: dict[str, Any] | None = None

    def train(self) -> None:
        """All steps, then the evaluation, the summary and the trained weights."""
        recipe, started = self.recipe, time.perf_counter()
        if self.folder:
            self.folder.write("config.json", self._describe())
        self._log({"step": 0, **self._heldout(True)})
        with tqdm(total=recipe.steps, disable=self.rank != 0, unit="step", desc=recipe.name) as bar:
            for step in range(1, recipe.steps + 1):
                stats = self.engine.train_batch()
                self.stats.append(stats)
                every = recipe.evaluation.every
                due = step == recipe.steps or (every > 0 and step % every == 0)
                self._log({**stats.as_dict(), **self._heldout(due)})
                rate = stats.examples_trained / stats.time_s["total"]
                bar.set_postfix_str(f"loss {stats.loss:.3f}, {rate:.1f} examples/s, {stats.memory_gib['peak']:.2f} GiB")
                bar.update()
                if recipe.save_every and step % recipe.save_every == 0:
                    self.engine.save_checkpoint(str(Path(recipe.output_dir) / "checkpoints"))
        self._finish(started)

    def _finish(self, started: float) -> None:
        answers = self._exact_match()
        save_trained(self.engine, self.tokenizer, Path(self.recipe.output_dir), is_main=self.rank == 0)
        peaks = self._peaks()
        if self.folder:
            summary = {"status": "finished", **summarise(self.stats, peaks), "heldout": self.last_heldout}
            summary |= {"exact_match": answers, "wall_s": time.perf_counter() - started}
            self.folder.write("summary.json", summary)
            self.folder.close()
            print(f"{self.recipe.name}: {self.recipe.steps} steps done, written to {self.recipe.output_dir}")

    def _checked_config(self) -> dict[str, Any]:
        config = deepspeed_config(self.recipe)
        resolve_config(config, self.world_size)
        return config

    def _checked_model(self) -> nn.Module:
        model = load_model(self.recipe, self.tokenizer)
        if self.recipe.colm.selector == "colm":
            find_architecture(model)
        return model

    def _load_data(self) -> tuple[InstructionDataset, InstructionDataset | None]:
        """Training and held-out data; rank 0 tokenises first, so that the others find its cache."""
        recipe = self.recipe

        def load(paths: Any, limit: int | None) -> InstructionDataset:
            data = recipe.data
            cache = None if data.cache_dir is None else Path(data.cache_dir).expanduser()
            return load_instructions(
                paths,
                self.tokenizer,
                data.max_length,
                source_key=data.source_key,
                cache_dir=cache,
                limit=limit,
                seed=recipe.seed,
            )

        def load_all() -> tuple[InstructionDataset, InstructionDataset | None]:
            train = load(recipe.data.train, recipe.data.limit)
            heldout = load(recipe.data.heldout, None) if recipe.data.heldout is not None else None
            if recipe.data.holdout_per_source:
                train, heldout = split_holdout(train, per_source=recipe.data.holdout_per_source, seed=recipe.seed)
            if recipe.colm.large_batch_size > len(train):
                raise ConfigError(
                    f"colm.large_batch_size = {recipe.colm.large_batch_size}: more than the {len(train)} examples of "
                    "data.train. Choose fewer, or add data."
                )
            return train, heldout

        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            loaded = together(load_all, self.device)
            together(lambda: None, self.device)
            return loaded
        together(lambda: None, self.device)
        return together(load_all, self.device)

    def _make_engine(self) -> CoLMEngine:
        schedule = learning_rate_factor(self.recipe.lr_schedule, self.recipe.steps)
        engine, _, _, _ = initialize(
            model=self.model,
            config=self.config,
            training_data=self.train_data,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        )
        return engine

    def _heldout(self, due: bool) -> dict[str, Any]:
        if not due or self.heldout_data is None:
            return {}
        engine = self.engine
        self.last_heldout = heldout_loss(
            engine.deepspeed_engine.module,
            engine.deepspeed_engine.module,
            engine.loss_head,
            self.heldout_data,
            device=self.device,
            exchange=self.exchange,
            rank=self.rank,
            max_tokens=self.recipe.evaluation.max_tokens,
        )
        return {"heldout": self.last_heldout}

    def _exact_match(self) -> dict[str, Any] | None:
        if not self.questions:
            return None
        return exact_match(
            self.engine.deepspeed_engine.module,
            self.tokenizer,
            self.questions,
            device=self.device,
            exchange=self.exchange,
            rank=self.rank,
            max_new_tokens=self.recipe.evaluation.max_new_tokens,
            max_tokens=self.recipe.evaluation.max_tokens,
            synced=self.engine.zero_optimization_stage() == 3,
        )

    def _peaks(self) -> dict[str, float]:
        """Largest peak of each phase over steps and ranks, in GiB."""
        names = ("probe", "train", "peak")
        largest = torch.tensor([max(step.memory_gib[name] for step in self.stats) for name in names])
        largest = largest.to(self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return dict(zip(names, largest.tolist(), strict=True))

    def _log(self, entry: dict[str, Any]) -> None:
        if self.folder and len(entry) > 1:
            self.folder.log(entry)

    def _describe(self) -> dict[str, Any]:
        counts = source_counts(self.train_data)
        names = list(counts)
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
            "small_sources": [names[source] for source in self.engine.coreset_selector.small],
            "num_dropped": self.train_data.num_dropped,
            "num_heldout": 0 if self.heldout_data is None else len(self.heldout_data),
            "recipe": self.recipe.model_dump(),
            "deepspeed": {key: value for key, value in self.config.items() if key != "colm"},
            "colm": self.engine.config.colm.model_dump(),
        }
