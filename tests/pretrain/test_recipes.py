"""Every recipe of pretraining is valid; those of Llama-60M train when shrunk, in bf16 under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from colm_ds.recipes.recipe import PretrainingRecipe, load_recipe
from tests.pretrain.runs import ROOT, SHAPE, WEIGHTS, Prepared, read_metrics, read_summary, train

FOLDER = ROOT / "pretrain" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
LLAMA60M = {  # r, b, micro-batch
    "llama60m_pile5_plain128": (128, 128, 4),
    "llama60m_pile5_colm128": (256, 128, 4),
    "llama60m_pile5_plain256": (256, 256, 8),
}
TABLE_8 = {"EuroParl": 2.8, "Github": 28.2, "HackerNews": 5.0, "NIH ExPorter": 3.4, "Wikipedia (en)": 60.6}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, PretrainingRecipe)
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#"))
    by_tokens = "_tokens" in path.stem
    assert recipe.colm.probe.estimator == ("tokens" if by_tokens else "spsa")
    assert f"pretrain/recipes/{path.name}" in head or (path.stem == "demo" and "launch/pretrain.sh" in head)


@pytest.mark.parametrize("name", LLAMA60M)
def test_setting_of_the_paper(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert isinstance(recipe, PretrainingRecipe)
    colm = recipe.colm
    assert (colm.large_batch_size, colm.coreset_size, recipe.micro_batch_size) == LLAMA60M[name]
    assert colm.coreset_size == 4 * 8 * recipe.micro_batch_size  # 4 GPUs, 8 micro-batches
    assert colm.selector == ("colm" if "colm" in name else "full")
    assert (recipe.steps, recipe.data.chunk_tokens, recipe.data.weights) == (10_000, 1024, TABLE_8)
    assert (recipe.model.dtype, recipe.prepare.vocabulary_size) == ("bfloat16", 32_000)
    assert (recipe.optimizer.weight_decay, recipe.lr_schedule.kind) == (0.0, "cosine")
    assert (recipe.lr_schedule.warmup_fraction, recipe.lr_schedule.final_fraction) == (0.1, 0.1)
    config = recipe.model.config
    assert config is not None
    hidden, layers, inner = (config[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    norms = (2 * layers + 1) * hidden
    assert 2 * 32_000 * hidden + layers * (4 * hidden**2 + 3 * hidden * inner) + norms == 58_073_600


def test_arms_differ_in_the_batch_alone() -> None:
    values = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in LLAMA60M]
    for recipe in values:
        for key in ("name", "output_dir", "micro_batch_size", "colm"):
            del recipe[key]
    assert values[0] == values[1] == values[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(250)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", LLAMA60M)
def test_shrunk_recipe_trains(name: str, stage: int, prepared: Prepared, tmp_path: Path) -> None:
    large, coreset, _ = LLAMA60M[name]
    shape = {"model_type": "llama", **SHAPE, "max_position_embeddings": 64}
    done = train(
        2 if name.endswith("colm128") else 1,
        str(FOLDER / f"{name}.yaml"),
        f"model.config={json.dumps(shape)}",
        *(f"data.store={prepared.store}", "data.chunk_tokens=64", f"data.weights={json.dumps(WEIGHTS)}"),
        *(f"colm.large_batch_size={large // 8}", f"colm.coreset_size={coreset // 8}"),
        *("steps=4", "save_every=2", "evaluation.every=2", "evaluation.chunks_per_source=3"),
        *(f"deepspeed=ds_configs/zero{stage}.json", f"output_dir={tmp_path / 'run'}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["skipped_steps"]) == ("finished", 0)
    assert summary["examples_trained"] == 4 * coreset // 8
    heldout = [row["heldout"]["overall"] for row in read_metrics(tmp_path / "run") if "heldout" in row]
    assert heldout[0] == pytest.approx(math.log(400), abs=0.3)
    assert heldout[-1] < heldout[0]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    assert checkpoints == ["step_2", "step_4"]
