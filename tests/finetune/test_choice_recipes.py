"""The recipes of classification tasks: valid for every task, and run from a tiny model, also with a proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.data.choices import WRITERS
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.errors import ConfigError
from colm_ds.recipes.recipe import ChoiceRecipe, load_recipe
from tests.finetune.test_entry import ROOT
from tests.finetune.test_recipes import SHAPE

pytest.importorskip("sklearn")

RECIPES = sorted((ROOT / "finetune" / "recipes").glob("*_choices*.yaml"))
LABELS = ("entailment", "contradiction", "neutral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and CB: the real one where it is beside the repository."""
    folder = tmp_path_factory.mktemp("choices")
    write_mixture(folder, seed=1, scale=0.02)
    real = ROOT.parent / "shared" / "data" / "superglue"
    if real.is_dir():
        (folder / "superglue").symlink_to(real)
        return folder
    for split, count in (("train", 60), ("validation", 20)):
        rows = [
            {"premise": f"Box {n} holds {n % 7} pens.", "hypothesis": f"it holds {n % 5}", "label": LABELS[n % 3]}
            for n in range(count)
        ]
        path = folder / "superglue" / "cb" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overrides_of(folder: Path, output: Path) -> list[str]:
    """What lets the recipe run on a small machine: a tiny model of its family, few steps."""
    model = SHAPE | {"num_key_value_heads": 4, "model_type": "phi", "partial_rotary_factor": 0.5}
    return [
        "model.name_or_path=null",
        f"model.config={json.dumps(model)}",
        f"tokenizer={folder / 'tokenizer'}",
        f"data.folder={folder / 'superglue'}",
        "data.task=cb",
        "data.cache_dir=null",
        "data.heldout_limit=20",
        "lora.rank=4",
        "colm.mask.size=16",
        "colm.large_batch_size=16",
        "colm.coreset_size=8",
        "steps=4",
        f"output_dir={output}",
    ]


def run(folder: Path, output: Path, *changes: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and metrics of a run of the Phi-2 recipe."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    recipe = ROOT / "finetune" / "recipes" / "phi2_choices.yaml"
    command = [sys.executable, "finetune/train.py", str(recipe), *overrides_of(folder, output), *changes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return json.loads((output / "summary.json").read_text()), [json.loads(line) for line in lines]


@pytest.mark.parametrize("task", WRITERS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, task: str, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"finetune/recipes/{path.name}" in text.split("\n")[0]  # the command that runs it
    recipe = load_recipe(path, [f"data.task={task}", f"data.folder={tmp_path}", "model.name_or_path=elsewhere"])
    assert isinstance(recipe, ChoiceRecipe)
    assert recipe.data.limit == 3000
    if path.stem.endswith("_tokens"):
        assert recipe.clusters is None
        assert recipe.colm.probe.estimator == "tokens"
        return
    assert recipe.clusters is not None
    assert recipe.clusters.steps(recipe.steps) == [20, 32, 44, 56, 68]
    assert recipe.colm_of_run.schedule.start_step == 20
    assert (recipe.steps, recipe.colm.large_batch_size, recipe.colm.coreset_size) == (80, 128, 64)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_training_and_a_proxy(folder: Path, tmp_path: Path) -> None:
    clusters = ["clusters.warmup_steps=1", "clusters.refreshes=1", "clusters.num=[2, 3]"]
    summary, metrics = run(folder, tmp_path / "first", *clusters)
    assert summary["status"] == "finished"
    for when in ("heldout_before", "heldout"):
        assert 0 <= summary[when]["accuracy"] <= 1
    assert metrics[0]["heldout"] == summary["heldout_before"]
    assert [entry["step"] for entry in metrics if "clusters" in entry] == [2, 3]
    assert [entry.get("selected") for entry in metrics] == [None, False, True, True, True]
    made = metrics[2]["clusters"]
    assert list(metrics[2]["coreset"]["per_source"]) == list(made["counts"])
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["why_not_replay"] is None  # checkpointing is on, so the probe's forward is replayed
    proxy = [f"clusters.features_from={tmp_path / 'first'}", "clusters.warmup_steps=0", "clusters.refreshes=0"]
    summary, metrics = run(folder, tmp_path / "second", *proxy, "clusters.num=3", "steps=2")
    assert summary["status"] == "finished"
    assert [entry["step"] for entry in metrics if "clusters" in entry] == [1]
    assert metrics[1]["selected"]


def test_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "cb.jsonl").write_text("{}\n")
    values = yaml.safe_load(RECIPES[0].read_text())
    values |= {"model": {"name_or_path": "elsewhere"}, "deepspeed": {}}
    values["data"] = {"task": "cb", "folder": str(tmp_path), "train": str(tmp_path / "cb.jsonl")}
    values["clusters"] = {"num": [4, 3], "warmup_steps": 80, "refresh_steps": [90]}
    values["colm"] |= {"small_sources": ["cluster 1"], "probe": {"token_sample": 0.5}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="6 problems") as caught:
        load_recipe(path)
    wrong = ["either data.folder or data.train", "clusters.num", "warmup_steps = 80", "refresh_steps", "small_so"]
    for part in (*wrong, "colm.probe.token_sample = 0.5: candidates are compared as wholes"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"clusters.refresh_steps = \[90\]: a proxy's clusters do not change"):
        load_recipe(path, ["clusters.features_from=x", "clusters.num=3"])
