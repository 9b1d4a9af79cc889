"""What is fuzzed: an example of everything that others may send, and how each is read, as the program reads it."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from colm_ds.batching.loader import source_counts
from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.manifest import read_manifest, write_manifest
from colm_ds.config.resolve import resolve_config
from colm_ds.data import load_examples
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.data.pretraining.token_store import MANIFEST, PARTS, TokenStore, write_part
from colm_ds.engine.coreset_selector import small_source_ids
from colm_ds.errors import CheckpointError
from colm_ds.evaluation.model_source import find_model
from colm_ds.evaluation.question_log import EvaluationFolder
from colm_ds.export.model_card import write_model_card
from colm_ds.export.run import export_run
from colm_ds.models.architecture import find_architecture
from colm_ds.planner.job import job_of_recipe
from colm_ds.recipes.model import load_model, load_tokenizer
from colm_ds.recipes.recipe import load_recipe
from colm_ds.recipes.sections import ModelConfig
from colm_ds.report import format_table, load_run
from colm_ds.report.watch import WatchedRun, line, watch
from colm_ds.training.run import deepspeed_config
from colm_ds.training.start_or_resume import may_restart, where_to_start
from colm_ds.untrusted.printable import visible
from tests.tiny_models import tiny_model
from tests.training.test_bad_input import ROOT, recipe_of
from tests.untrusted.mutations import changed_text

Work = Callable[[], str]


@dataclass(frozen=True)
class Target:
    """Something that is read.

    Attributes:
        file: path of the file that is changed, in the folder of all examples.
        kind: "bytes", "json", "jsonl" or "yaml".
        read: reads it as the program does, given the folder; returns what there is to compare.
        share: how often it is drawn.
        same: whether reading must give what the unchanged one gives, or say that it is not used.
    """

    file: str
    kind: str
    read: Callable[[Path], str]
    share: int = 1
    same: bool = False


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
    _make_run(folder)
    _make_store(folder / "store")
    evaluation = EvaluationFolder(folder / "evaluation")
    evaluation.start({"base": "x"}, {"gsm8k": {"n": 2}}, overwrite=False)
    evaluation.write_json("results.json", {"sets": {}})
    (folder / "evaluation" / "gsm8k.jsonl").write_text('{"index": 0, "right": true}\n{"index": 1, "right": false}\n')


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


STEP = "run/checkpoints/step_4"
TARGETS = [
    Target("recipe.yaml", "yaml", read_recipe, 6),
    Target("ds.json", "json", read_recipe, 4),
    Target("data/train.jsonl", "jsonl", read_data, 3),
    Target("model/config.json", "json", read_model, 3),
    Target("model/tokenizer.json", "json", read_model, 1),
    Target("model/tokenizer_config.json", "json", read_model, 1),
    Target("model/generation_config.json", "json", read_model, 1),
    Target("model/model.safetensors", "bytes", read_model, 2),
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


def inputs(examples: Path, seed: int, number: int) -> Iterator[tuple[int, Target, bytes]]:
    """Yield so many changed files, each with its number and target; the same for the same seed."""
    weights = [target.share for target in TARGETS]
    for index in range(number):
        draw = random.Random(f"{seed} {index}")
        target = draw.choices(TARGETS, weights)[0]
        yield index, target, changed_text((examples / target.file).read_bytes(), draw, target.kind)
