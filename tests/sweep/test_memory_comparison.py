"""The arms of the memory report: both protocols, batch sizes that can be had, finished runs skipped, bad input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds import cli
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.recipes.recipe import BaseRecipe, load_recipe
from colm_ds.sweep import Grid, check_arms, jobs, memory_comparison
from colm_ds.sweep.memory_comparison import plan_arms
from tests.finetune.test_entry import ROOT, recipe_of
from tests.report.run_folders import write_run

GRID = [  # large, coreset, micro-batch, selects; two ranks, four micro-batches each
    (16, 16, 2, False),
    (32, 16, 2, True),
    (32, 32, 4, False),
    (32, 32, 2, False),
    (64, 16, 2, False),  # chosen by tokens
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory_arms")
    write_mixture(folder / "data", seed=1, scale=0.02)
    return folder


def recipe_file(folder: Path, data: Path, **changes: Any) -> Path:
    recipe = recipe_of(data, micro_batch_size=2, overwrite=False, **changes)
    recipe["colm"] = {"large_batch_size": 32, "coreset_size": 16, "mask": {"size": 32}} | changes.get("colm", {})
    recipe["data"] |= {"heldout": str(data / "data" / "heldout.jsonl")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> BaseRecipe:
    return load_recipe(recipe_file(tmp_path, data))


def test_both_protocols(recipe: BaseRecipe) -> None:
    plans = plan_arms(recipe, 2, [])
    assert [(plan.large, plan.coreset, plan.micro_batch, plan.selects) for plan in plans] == GRID
    assert [plan.name for plan in plans][:2] == ["plain 16", "CoLM 16 of 32"]
    assert len({plan.name for plan in plans}) == len(plans)


def test_batch_sizes(recipe: BaseRecipe) -> None:
    plans = [plan for plan in plan_arms(recipe, 2) if plan.is_sized]
    # plain 16 is there already, under both protocols
    found = [(plan.large, plan.coreset, plan.micro_batch, plan.selects) for plan in plans]
    assert found == [
        (16, 8, 1, True),
        (16, 8, 2, True),
        (64, 32, 4, True),
        (64, 32, 2, True),
        (64, 64, 8, False),
        (64, 64, 2, False),
    ]


def test_changes_are_what_a_recipe_takes(recipe: BaseRecipe, tmp_path: Path) -> None:
    for plan in plan_arms(recipe, 2):
        made = load_recipe(tmp_path / "recipe.yaml", plan.changes(recipe))
        assert (made.colm.large_batch_size, made.colm.coreset_size) == (plan.large, plan.coreset)
        assert made.micro_batch_size == plan.micro_batch
        assert made.colm.selector == ("importance" if plan.by_tokens else "colm" if plan.selects else "full")
        assert (made.colm.probe.estimator == "tokens") == plan.by_tokens
        assert (getattr(made, "data").heldout is None) == plan.is_sized  # noqa: B009


def test_arms_of_a_recipe_with_settings_of_its_choice(tmp_path: Path, data: Path) -> None:
    """What says how medoids are weighed or compared has no place in the arms that choose none."""
    path = recipe_file(tmp_path, data)
    for own in (
        ["colm.weights=matched", "colm.probe={estimator: exact}"],
        ["colm.micro_batch_tokens=64", "colm.memory.count_steps=[2, 3]"],
    ):
        recipe = load_recipe(path, own)
        plans = plan_arms(recipe, 2)
        arms = {plan.name: plan.changes(recipe) for plan in plans}
        check_arms(Grid(recipe=str(path), out=str(tmp_path), baseline=plans[0].name, common=own, arms=arms))
        made = [load_recipe(path, [*own, *changes]).colm for changes in arms.values()]
        assert {tuple(colm.memory.count_steps) for colm in made} == {tuple(recipe.colm.memory.count_steps)}
        assert {colm.micro_batch_tokens for colm in made} == {recipe.colm.micro_batch_tokens}
        assert {colm.seed for colm in made} == {recipe.colm.seed}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["colm.options={spread: 3}"], "options"),
        (["colm.selector=full", "colm.coreset_size=32"], "there is nothing to compare"),
        (["--sizes", "7"], "7 cannot be had: CoLM would train on 3.5 of them on 2 ranks. Choose multiples of 2"),
        (["steps=0"], "steps"),
    ],
)
def test_bad_input(
    arguments: list[str], said: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, data)
    assert cli.main(["memory-report", str(path), *arguments, "--num-gpus", "2", "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_allocations_are_counted_in_every_arm_without_a_gpu(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, list[int]] = {}

    def fake_run(grid: Any, job: Any, place: Any) -> str:
        counted[job.arm] = load_recipe(job.arguments[0], job.arguments[1:]).colm.memory.count_steps
        return "not run"

    monkeypatch.setattr(jobs, "_run", fake_run)
    monkeypatch.setattr(memory_comparison, "_has_gpu", lambda: False)
    path = recipe_file(tmp_path, data)
    assert (
        cli.main(["memory-report", str(path), "--num-gpus", "2", "--out", str(tmp_path / "out"), "--sizes", "16"]) == 2
    )
    assert len(counted) > 4
    assert set(map(tuple, counted.values())) == {tuple(memory_comparison.COUNTED_STEPS)}


def test_what_is_finished_is_skipped(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def fake_run(grid: Any, job: Any, place: Any) -> str:
        started.append(job.arm)
        made = load_recipe(job.arguments[0], job.arguments[1:])
        config = {"recipe": json.loads(json.dumps(made.model_dump())), "colm": made.colm.model_dump(), "world_size": 2}
        config["deepspeed"] = {"train_micro_batch_size_per_gpu": made.micro_batch_size}
        write_run(job.folder, job.arm, arm="colm-spsa", num_steps=4, config=config)
        return ""

    monkeypatch.setattr(jobs, "_run", fake_run)
    monkeypatch.setattr(memory_comparison, "_has_gpu", lambda: True)
    path, out = recipe_file(tmp_path, data), tmp_path / "out"
    arguments = ["memory-report", str(path), "--num-gpus", "2", "--out", str(out), "--sizes", "16"]
    assert cli.main(arguments) == 0
    assert started == [*(plan.name for plan in plan_arms(load_recipe(path), 2, [16]))]
    assert "## Memory against batch size" in (out / "report.md").read_text()
    assert cli.main(arguments) == 0
    assert len(started) == 7  # nothing anew
    capsys.readouterr()
    assert cli.main([*arguments[:2], "steps=7", *arguments[2:]]) == 2
    said = capsys.readouterr().err
    assert "holds a finished run of another recipe" in said
    assert "steps: 3 there, 7 here" in said


def test_the_script_refuses_bad_input(tmp_path: Path) -> None:
    script = ROOT / "launch" / "memory_report.sh"
    for arguments, said in (
        ([], "give RECIPE"),
        (["none.yaml"], "no such recipe"),
        ([str(script), "steps"], "key=value"),
    ):
        done = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, check=False)
    assert "MASTER_PORT" in done.stdout
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_real_runs(tmp_path: Path, data: Path) -> None:
    path, out = recipe_file(tmp_path, data), tmp_path / "out"
    assert (
        cli.main(["memory-report", str(path), "--num-gpus", "2", "--port", "29645", "--out", str(out), "--sizes"]) == 0
    )
    table = json.loads((out / "report.json").read_text())["tables"]["protocols"]
    row = dict(zip(table["columns"], next(row for row in table["rows"] if row[0] == "16 of 32"), strict=True))
    assert 0 < row["equal steps: × plain peak"] < row["equal micro-batch: × plain peak"]
