"""What is fuzzed: an example of everything that others may send, and how each is read, as the program reads it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import peft
import torch
import yaml

import colm_ds
from colm_ds.batching.loader import source_counts
from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.manifest import read_manifest, write_manifest
from colm_ds.config.resolve import resolve_config
from colm_ds.data import load_examples
from colm_ds.data.formats import read_rows
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.data.pretraining.token_store import MANIFEST, PARTS, TokenStore, write_part
from colm_ds.data.subset import read_subset, write_subset
from colm_ds.data.token_dataset import TokenDataset
from colm_ds.distributed.agreement import meet, single_process_environment
from colm_ds.engine.coreset_selector import small_source_ids
from colm_ds.engine.initialization import prepare_deepspeed
from colm_ds.engine.reference_losses import read_reference_losses, write_reference_losses
from colm_ds.engine.token_table import mean_table
from colm_ds.errors import CheckpointError, DataError
from colm_ds.evaluation.model_source import find_model
from colm_ds.evaluation.question_log import EvaluationFolder
from colm_ds.export.model_card import write_model_card
from colm_ds.export.run import export_run
from colm_ds.models.architecture import find_architecture
from colm_ds.planner.job import job_of_recipe
from colm_ds.recipes.model import load_model, load_tokenizer
from colm_ds.recipes.recipe import Recipe, load_recipe
from colm_ds.recipes.sections import ModelConfig
from colm_ds.report import format_table, load_run
from colm_ds.report.watch import WatchedRun, line, watch
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.sweep.grid import jobs_of, load_grid
from colm_ds.training.run import deepspeed_config, threads_of_rank
from colm_ds.training.start_or_resume import may_restart, where_to_start
from colm_ds.training.tasks.instructions import load_target
from colm_ds.untrusted.printable import visible
from tests.ports import worker_port
from tests.tiny_models import tiny_model
from tests.training.test_bad_input import ROOT, recipe_of
from tests.untrusted.mutations import changed_text

Work = Callable[[], str]


@dataclass(frozen=True)
class Target:
    """Something that is read.

    Attributes:
        file: path of the file that is changed, in the folder of all examples; `*` stands for a name made of digits.
        kind: "bytes", "json", "jsonl", "yaml", "safetensors" or "npy"; "values": JSON whose values alone
            are changed.
        read: reads it as the program does, given the folder; returns what there is to compare.
        share: how often it is drawn.
        same: whether reading must give what the unchanged one gives, or say that it is not used.
    """

    file: str
    kind: str
    read: Callable[[Path], str]
    share: int = 1
    same: bool = False

    def path(self, folder: Path) -> Path:
        """Return the file in a folder of examples."""
        (path,) = sorted(folder.glob(self.file))[:1] or [folder / self.file]
        return path


def make_examples(folder: Path) -> None:
    """Write a recipe with data, model and tokenizer, a run with two checkpoints, a token store, an evaluation."""
    write_mixture(folder / "data", seed=1, scale=0.005)
    model = folder / "model"
    tiny_model("llama", vocab_size=512).save_pretrained(model)
    for path in (folder / "data" / "tokenizer").iterdir():
        shutil.copy(path, model)
    shutil.copy(ROOT / "ds_configs" / "zero2.json", folder / "ds.json")
    recipe = recipe_of(folder) | {"model": {"name_or_path": str(model)}, "deepspeed": str(folder / "ds.json")}
    recipe["optimizer"] = {"lr": 1e-3, "betas": [0.9, 0.95]}
    del recipe["tokenizer"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _make_more(folder)
    _make_run(folder)
    _make_store(folder / "store")
    evaluation = EvaluationFolder(folder / "evaluation")
    evaluation.start({"base": "x"}, {"gsm8k": {"n": 2}}, overwrite=False)
    evaluation.write_json("results.json", {"sets": {}})
    (folder / "evaluation" / "gsm8k.jsonl").write_text('{"index": 0, "right": true}\n{"index": 1, "right": false}\n')


def _make_more(folder: Path) -> None:
    """Write what a recipe may name besides: an adapter, a grid, a whole DeepSpeed file, targets, tables, caches."""
    base: Any = tiny_model("llama", vocab_size=512)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(
        folder / "adapter"
    )
    grid = {"recipe": "recipe.yaml", "out": str(folder / "sweep"), "seeds": [0, 1], "baseline": "plain"}
    grid |= {"controls": ["other"], "common": ["steps=3"], "arms": {"plain": ["colm.selector=random"], "other": []}}
    grid |= {"launch": {"num_gpus": 1, "parallel": 2}, "prepare": {str(folder / "data"): "-m nothing"}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    (folder / "whole.json").write_text(json.dumps(WHOLE_DEEPSPEED), encoding="utf-8")
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {
        "MASTER_PORT": str(worker_port(88)),
        "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
    }
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    rows = [{"source": "x", "instruction": f"Say {number}.", "output": str(number)} for number in range(9)]
    (folder / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read_cache(folder)
    data = load_cached(folder)
    write_reference_losses(folder / "table.pt", torch.arange(float(len(data))), "digest", {"recipe": "r"})
    write_subset(folder / "subset.json", list(range(0, len(data), 2)), data.digest(), {"method": "test"})
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    datasets.Dataset.from_list(rows).to_csv(str(folder / "rows.csv"))
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


WHOLE_DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 2, "total_num_steps": 10},
    },
    "bf16": {"enabled": False},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": 1000000,
        "offload_optimizer": {"device": "none", "pin_memory": False, "ratio": 1.0},
        "offload_param": {"device": "none"},
    },
    "data_types": {"grad_accum_dtype": "fp32"},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
    "aio": {"block_size": 1048576, "queue_depth": 8, "thread_count": 1},
    "tensor_parallel": {"autotp_size": 0},
    "csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"},
    "tensorboard": {"enabled": False},
    "checkpoint": {"tag_validation": "Warn", "load_universal": False},
    "comms_logger": {"enabled": False, "verbose": False},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "hybrid_engine": {"enabled": False},
    "data_efficiency": {"enabled": False},
    "sequence_parallel_size": 1,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "comment": "nothing",
    "colm": {"large_batch_size": 16, "coreset_size": 8},
}


def load_cached(folder: Path) -> TokenDataset:
    """The training data through its token cache."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder / "model")))
    return load_examples(str(folder / "data" / "train.jsonl"), tokenizer, 96, cache_dir=folder / "cache")


def _make_run(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    recipe = load_recipe(folder / "recipe.yaml")
    config: dict[str, Any] = {"name": "test", "seed": 0, "sources": {"a": 3, "b": 4}, "small_sources": ["b"]}
    config |= {"recipe": recipe.model_dump(), "versions": {"torch": "2"}, "num_parameters": 9, "num_trainable": 9}
    config["colm"] = {"selector": "colm"}
    (run / "config.json").write_text(json.dumps(config, default=str))
    (run / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 4, "heldout": {"overall": 1.0}}))
    entries: list[dict[str, Any]] = [
        {"step": n, "loss": 3.0 / n, "lr": 1e-3, "grad_norm": 1.0, "examples_trained": 8, "tokens": 99}
        | {"time_s": {"total": 0.1, "probe": 0.02, "train": 0.07}, "memory_gib": {"peak": 0.5}}
        | {"coreset": {"per_source": {"a": 5, "b": 3}}}
        for n in range(1, 5)
    ]
    entries[-1]["heldout"] = {"overall": 2.0, "per_source": {"a": 2.0, "b": 2.0}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    trained = dict(load_model(recipe.model, None, load_tokenizer(recipe.model)).named_parameters())
    for step in (2, 4):
        path = run / "checkpoints" / f"step_{step}"
        path.mkdir(parents=True)
        torch.save({"client_state": {"sources": {"a": 3}}, "history": torch.ones(3) * step}, path / atomic.SHARED)
        torch.save({"random_state": {"torch": torch.get_rng_state()}}, path / "colm_rank_00000.pt")
        torch.save({"module": {n: p.detach() * 2 for n, p in trained.items()}}, path / "mp_rank_00_model_states.pt")
        fit_manifest(path, step, {"stage": 0, "trained": {name: list(value.shape) for name, value in trained.items()}})
    (run / "checkpoints" / "latest").write_text("step_4")


def fit_manifest(path: Path, step: int, facts: dict[str, Any]) -> None:
    """Write a manifest that fits the files of a checkpoint."""
    files = {file.name: (file.stat().st_size, zlib.crc32(file.read_bytes())) for file in path.glob("*.pt")}
    write_manifest(path, 0, step=step, world_size=1, files=files, facts=facts)


def _make_store(folder: Path) -> None:
    segments = {("train", "a"): list(range(50)), ("heldout", "a"): list(range(20))}
    (folder / PARTS).mkdir(parents=True)
    write_part(folder / PARTS, "part_0", segments, "<u2", {"documents": 2})
    part = {"name": "part_0", **json.loads((folder / PARTS / "part_0.json").read_text())}
    manifest = {"version": 1, "dtype": "<u2", "tokenizer": "0" * 64, "vocabulary_size": 512, "sources": {"a": {}}}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"parts": [part]}))


def read_recipe(folder: Path) -> str:
    """All that a run checks before it loads the model."""
    recipe = load_recipe(folder / "recipe.yaml")
    resolve_config(deepspeed_config(recipe), 2)
    where_to_start(recipe)
    may_restart(recipe)
    return recipe.name


def read_data(folder: Path) -> str:
    """Data as a run reads it."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder / "model")))
    data = load_examples(str(folder / "data" / "train.jsonl"), tokenizer, 96, cache_dir=None)
    config = resolve_config(deepspeed_config(load_recipe(folder / "recipe.yaml")), 2)
    small_source_ids(config.colm, source_counts(data))
    return f"{len(data)} examples"


def read_model(folder: Path) -> str:
    """A model folder as a run, the plan and the evaluation read it."""
    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model)
    find_architecture(load_model(recipe.model, recipe.lora, tokenizer))
    find_model(str(folder / "model"))
    job_of_recipe(recipe, 2)
    return "loaded"


def read_checkpoint(folder: Path) -> str:
    """The newest whole checkpoint and its state: never a changed one."""
    found = atomic.find(folder / "run" / "checkpoints")
    if found is None:
        raise CheckpointError("none there")
    history = atomic.read_state(found, 0)[0]["history"]
    assert history.tolist() == [found.step] * 3
    assert found.step in (2, 4)
    assert (found.step == 2) == bool(found.passed_over), "a checkpoint that is not used is named"
    return f"step {found.step}"


def read_fitted_checkpoint(folder: Path) -> str:
    """A checkpoint whose manifest was made to fit what it holds, as resume and export take it."""
    path = folder / "run" / "checkpoints" / "step_4"
    shutil.rmtree(folder / "run" / "checkpoints" / "step_2")
    fit_manifest(path, 4, read_manifest(path, 0).facts)
    found = atomic.find(path.parent)
    assert found is not None
    try:
        atomic.read_state(found, 0)
    except (OSError, ValueError) as error:  # `load_engine` makes a message of it
        raise CheckpointError(str(error)) from error
    export_run(folder / "run", tag="step_4", out=folder / "exported")
    return "exported"


def read_run(folder: Path) -> str:
    """A run's folder as the report, watch, the model card, resume and export read it."""
    run = load_run(folder / "run")
    text = format_table([run])
    watched = WatchedRun(folder / "run")
    watched.update()
    text += line(watched) if watched.last else ""
    (folder / "out").mkdir(exist_ok=True)
    with (folder / "out" / "watched.txt").open("w", encoding="utf-8") as out:
        watch(folder / "run", once=True, out=out)
    text += (folder / "out" / "watched.txt").read_text(encoding="utf-8")
    text += write_model_card(folder / "out", folder / "run", kind="adapter").read_text(encoding="utf-8")
    assert visible(text) == text, "shown as it is"
    find_model(str(folder / "run")) if (folder / "run" / "model").is_dir() else None
    where_to_start(load_recipe(folder / "recipe.yaml"))
    return "read"


def read_run_for_export(folder: Path) -> str:
    """A run's recorded recipe as export reads it."""
    export_run(folder / "run", out=folder / "exported")
    return "exported"


def read_store(folder: Path) -> str:
    """A token store as pretraining reads it."""
    store = TokenStore(folder / "store")
    for split in ("train", "heldout"):
        for source in store.source_names:
            number = store.num_tokens(split, source)
            if number:
                store.read(split, source, 0, number)
    store.why_not_whole()
    return store.digest


def read_evaluation(folder: Path) -> str:
    """An evaluation's folder as one that is resumed reads it."""
    evaluation = EvaluationFolder(folder / "evaluation")
    evaluation.start({"base": "x"}, {"gsm8k": {"n": 2}}, overwrite=False)
    evaluation.results()
    evaluation.start({"base": "x"}, {"gsm8k": {"n": 2}}, overwrite=True)
    assert (folder / "recipe.yaml").exists(), "a file of nobody's evaluation is gone"
    return str(len(evaluation.collect("gsm8k")))


def read_adapter(folder: Path) -> str:
    """An adapter that a recipe starts from."""
    recipe = load_recipe(folder / "recipe.yaml", [f"lora={{adapter: {folder / 'adapter'}}}"])
    load_model(recipe.model, recipe.lora, load_tokenizer(recipe.model))
    return "loaded"


def read_grid(folder: Path) -> str:
    """A grid as a sweep reads it, with the recipes of its arms."""
    jobs = jobs_of(load_grid(folder / "grid.yaml"))
    for job in jobs[:3]:
        load_recipe(job.arguments[0], job.arguments[1:])
    return f"{len(jobs)} runs"


def read_whole_deepspeed(folder: Path) -> str:
    """A DeepSpeed file of a script, up to an engine of DeepSpeed."""
    single_process_environment()
    prepare_deepspeed()
    meet(lambda: deepspeed.init_distributed(verbose=False))
    rows = [{"input_ids": [1, 2, 3], "source": "a"} for _ in range(20)]
    colm_ds.initialize(model=tiny_model("llama"), training_data=rows, config=str(folder / "whole.json"))
    return "initialized"


def read_environment(folder: Path) -> str:
    """What a launcher sets, as a run takes it."""
    values = json.loads((folder / "environment.json").read_text())
    for name in values if isinstance(values, dict) else ():
        os.environ.pop(name, None)
        with contextlib.suppress(OSError, ValueError):  # what no environment can hold
            os.environ[str(name)] = values[name] if isinstance(values[name], str) else json.dumps(values[name])
    single_process_environment()
    threads_of_rank()
    meet(lambda: torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2)))
    return "met"


def read_target(folder: Path) -> str:
    """The target of a selector that compares with one."""
    changes = ["colm.selector=less", f"colm.target.data={folder / 'target.jsonl'}", "colm.probe.estimator=sketch"]
    recipe = load_recipe(folder / "recipe.yaml", changes)
    assert isinstance(recipe, Recipe)
    target, _ = load_target(recipe, load_tokenizer(recipe.model), load_cached(folder), None)
    return f"{len(target or ())} examples"


def read_losses(folder: Path) -> str:
    """A table of reference losses."""
    return f"{len(read_reference_losses(folder / 'table.pt', len(load_cached(folder))))} losses"


def read_places(folder: Path) -> str:
    """A subset of the data."""
    data = load_cached(folder)
    return f"{len(data.subset(read_subset(folder / 'subset.json', data.digest(), len(data))))} examples"


def read_cache(folder: Path) -> str:
    """Cached tokens, and the table of their mean vectors beside them: never changed ones."""
    data = load_cached(folder)
    vectors = torch.arange(512 * 4, dtype=torch.float32).reshape(512, 4) / 512
    table = mean_table(data, vectors, SINGLE_PROCESS, 0, data.cache)
    assert table is not None
    return f"{data.digest()} {hashlib.sha256(table.numpy().tobytes()).hexdigest()}"


def read_places_of_rows(folder: Path) -> str:
    """Rows of every other format, a saved data set among them."""
    counts = []
    for name in ("saved", "rows.parquet", "rows.csv", "rows.json"):
        rows = [row for some in read_rows(folder / name) for _, row in some]
        counts.append(sum(not isinstance(row, DataError) for row in rows))
    return f"{counts} rows"


STEP = "run/checkpoints/step_4"
TARGETS = [
    Target("recipe.yaml", "yaml", read_recipe, 6),
    Target("ds.json", "json", read_recipe, 4),
    Target("data/train.jsonl", "jsonl", read_data, 3),
    Target("model/config.json", "json", read_model, 3),
    Target("model/tokenizer.json", "json", read_model, 1),
    Target("model/tokenizer_config.json", "json", read_model, 1),
    Target("model/generation_config.json", "json", read_model, 1),
    Target("model/model.safetensors", "safetensors", read_model, 3),
    Target("adapter/adapter_config.json", "json", read_adapter, 3),
    Target("adapter/adapter_model.safetensors", "safetensors", read_adapter, 2),
    Target("grid.yaml", "yaml", read_grid, 3),
    Target("whole.json", "json", read_whole_deepspeed, 5),
    Target("environment.json", "values", read_environment, 2),
    Target("target.jsonl", "jsonl", read_target, 1),
    Target("table.pt", "bytes", read_losses, 2),
    Target("subset.json", "json", read_places, 2),
    Target("cache/*/tokens.npy", "npy", read_cache, 1),
    Target("cache/*/means.npy", "npy", read_cache, 1),
    Target("cache/*/offsets.npy", "npy", read_cache, 1),
    Target("cache/*/meta.json", "json", read_cache, 2),
    Target("saved/state.json", "json", read_places_of_rows, 1),
    Target("saved/dataset_info.json", "json", read_places_of_rows, 1),
    Target("saved/data-00000-of-00001.arrow", "bytes", read_places_of_rows, 1),
    Target("rows.parquet", "bytes", read_places_of_rows, 1),
    Target("rows.csv", "bytes", read_places_of_rows, 1),
    Target("rows.json", "json", read_places_of_rows, 1),
    Target(f"{STEP}/manifest_00000.json", "json", read_checkpoint, 4, same=True),
    Target(f"{STEP}/colm.pt", "bytes", read_checkpoint, 3, same=True),
    Target(f"{STEP}/colm_rank_00000.pt", "bytes", read_checkpoint, 1, same=True),
    Target(f"{STEP}/colm.pt", "bytes", read_fitted_checkpoint, 2),
    Target(f"{STEP}/mp_rank_00_model_states.pt", "bytes", read_fitted_checkpoint, 2),
    Target("run/metrics.jsonl", "jsonl", read_run, 5),
    Target("run/config.json", "json", read_run, 5),
    Target("run/summary.json", "json", read_run, 2),
    Target("run/config.json", "json", read_run_for_export, 2),
    Target(f"store/{MANIFEST}", "json", read_store, 3),
    Target("evaluation/settings.json", "json", read_evaluation, 1),
    Target("evaluation/gsm8k.jsonl", "jsonl", read_evaluation, 1),
    Target("evaluation/results.json", "json", read_evaluation, 1),
]


def inputs(examples: Path, seed: int, number: int, word: str = "") -> Iterator[tuple[int, Target, bytes]]:
    """Yield so many changed files, each with its number and target; the same for the same seed and word.

    With a word only those whose path has it.
    """
    targets = [target for target in TARGETS if word in target.file]
    weights = [target.share for target in targets]
    for index in range(number):
        draw = random.Random(f"{seed} {index}")
        target = draw.choices(targets, weights)[0]
        yield index, target, changed_text(target.path(examples).read_bytes(), draw, target.kind)
