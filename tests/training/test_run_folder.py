"""A run's folder: only a run's own files are removed, one run at a time, and a resume knows what it resumes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.errors import CheckpointError, ConfigError
from colm_ds.process.exit_codes import ExitCode
from colm_ds.recipes.recipe import load_recipe
from colm_ds.run_folder.contents import own_entries
from colm_ds.run_folder.lock import RunLock
from colm_ds.run_folder.write import RunFolder
from colm_ds.training.start_or_resume import check_same_data, check_same_settings, where_to_start
from colm_ds.training.train_command import _read
from tests.finetune.test_entry import ROOT, recipe_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was killed before its first checkpoint, among files of its user's."""
    run = RunFolder(tmp_path / "run")
    run.write_config({"recipe": {}})
    run.log({"step": 1, "loss": 2.0})
    run.close()
    for name in ("notes.md", "data/train.jsonl", "recipe.yaml", "models/mine.safetensors"):
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    return tmp_path / "run"


def test_a_new_start_leaves_what_is_not_a_runs(folder: Path) -> None:
    RunFolder(folder, overwrite=True).close()
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == ["data/train.jsonl", "metrics.jsonl", "models/mine.safetensors", "notes.md", "recipe.yaml"]
    assert (folder / "metrics.jsonl").read_text() == ""
    assert not (folder / "checkpoints").exists()


def test_a_link_is_removed_and_not_what_it_points_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("mine")
    (folder / "model").symlink_to(tmp_path / "elsewhere")
    RunFolder(folder, overwrite=True).close()
    assert not (folder / "model").exists()
    assert (tmp_path / "elsewhere" / "weights").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_called_as_a_runs_without_a_run(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds model and no metrics.jsonl of a run"):
        RunFolder(tmp_path / "run", overwrite=overwrite)
    assert (tmp_path / "run" / "model" / "mine").exists()


def recipe_file(folder: Path, **changes: Any) -> Path:
    recipe = recipe_of(folder, overwrite=False, **changes)
    recipe["data"] = {**recipe["data"], "train": str(folder / "data.jsonl")}  # type: ignore[dict-item]
    recipe["tokenizer"] = str(folder)
    (folder / "data.jsonl").write_text("{}")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_run_that_continues_another_takes_over_what_that_logged(tmp_path: Path) -> None:
    """Up to the step of the checkpoint, once, whether or not the continuation was killed before one of its own."""

    def entries(run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().split("\n") if line]

    first = RunFolder(tmp_path / "first")
    for step in range(6):
        first.log({"step": step, "loss": float(step)})
    first.close()
    (tmp_path / "second").mkdir()
    for _ in range(2):
        second = RunFolder(tmp_path / "second", resumed_step=3, resumed_from=tmp_path / "first")
        second.log({"step": 4, "loss": 40.0})
        second.close()
        assert [(entry["step"], entry["loss"]) for entry in entries("second")] == [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 3),
            (4, 40),
        ]
    own = RunFolder(tmp_path / "second", resumed_step=4, resumed_from=tmp_path / "second")
    own.close()
    assert entries("second")[-1]["loss"] == 40.0
    assert len(entries("first")) == 6


def test_metrics_that_are_gone_beside_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_4").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds checkpoints and no metrics\.jsonl"):
        where_to_start(load_recipe(recipe_file(tmp_path)))


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("status", ["stopped", "finished"])
@pytest.mark.parametrize("place", ["run", "other"])
def test_a_path_to_resume_from_is_no_leave_to_replace_a_run(place: str, status: str, tmp_path: Path) -> None:
    """A finished run is refused, and any run in another folder than the checkpoint's; what is there stays."""
    for name in ("run", "other"):
        run = RunFolder(tmp_path / name)
        run.write_config({"recipe": {}})
        run.log({"step": 1, "loss": 2.0})
        run.write_summary({"status": status})
        run.close()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    path = str(recipe_file(tmp_path, output_dir=str(tmp_path / place)))
    rows = [{"instruction": f"{n} + 1?", "output": str(n + 1)} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(tmp_path)
    resume = f"resume={tmp_path}/other/../run/checkpoints/step_1"
    with pytest.raises(ConfigError if status == "finished" or place == "other" else CheckpointError) as caught:
        where_to_start(load_recipe(path, [resume]))
    said = {
        ("run", "stopped"): "step_1: holds no state of colm_ds",  # it is only looked at
        ("run", "finished"): "holds a finished run. Choose another, or overwrite=true to start over.",
        ("other", "stopped"): f"other: holds another run than the one that {resume.replace('=', ' = ')} is of.",
        ("other", "finished"): "holds a finished run. Choose another, or overwrite=true to start over.",
    }
    assert said[place, status] in str(caught.value)
    assert contents(tmp_path) == before
    assert where_to_start(load_recipe(path, [resume, "overwrite=true"])) is None
    if status == "finished":  # also before torch is imported
        with pytest.raises(ConfigError, match="holds a finished run"):
            _read(argparse.Namespace(recipe=path, overrides=[resume]))


def test_a_checkpoint_of_elsewhere_is_taken_into_a_free_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "before" / "checkpoints" / "step_1"
    path = recipe_file(tmp_path)
    with pytest.raises(CheckpointError, match="step_1: no such checkpoint"):
        where_to_start(load_recipe(path, [f"resume={checkpoint}"]))
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds model and no metrics\.jsonl"):
        where_to_start(load_recipe(path, [f"resume={checkpoint}"]))


def test_the_same_command_resumes_a_run_that_began_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its own newest checkpoint, and while it has none from the one that it began from."""
    whole: list[Path] = []

    def find(folder: Path, tag: str | None = None, *, repair: bool = False) -> Path | None:
        of_folder = [path for path in whole if path.parent == folder and tag in (None, path.name)]
        return of_folder[-1] if of_folder else None

    monkeypatch.setattr("colm_ds.training.start_or_resume.atomic.find", find)
    first = tmp_path / "before" / "checkpoints" / "step_1"
    whole.append(first)
    path = recipe_file(tmp_path)
    recipe = load_recipe(path, [f"resume={first}"])
    assert where_to_start(recipe) == first
    (tmp_path / "run").mkdir()  # as the lock does
    RunFolder(recipe.output_dir, resumed_step=1).close()  # and killed before it wrote its configuration
    assert where_to_start(recipe) == first
    run = RunFolder(recipe.output_dir, resumed_step=1)  # and killed before its first checkpoint
    run.write_config({"recipe": json.loads(json.dumps(recipe.model_dump(), default=str))})
    run.close()
    assert where_to_start(recipe) == first
    whole.append(tmp_path / "run" / "checkpoints" / "step_2")
    assert where_to_start(recipe) == whole[-1]
    again = f"resume={tmp_path}/run/../before/checkpoints/step_1"
    assert where_to_start(load_recipe(path, [again])) == whole[-1]
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        where_to_start(load_recipe(path, [again, "optimizer.lr=0.5"]))
    with pytest.raises(ConfigError, match="holds another run than the one that"):
        where_to_start(load_recipe(path, [f"resume={first.with_name('step_5')}"]))
    assert where_to_start(load_recipe(path, [f"resume={whole[-1]}"])) == whole[-1]


@pytest.mark.slow
def test_a_run_of_elsewhere_continued_twice(tmp_path: Path) -> None:
    """It ends with the weights of the run that nobody stopped, whatever of the continuation is lost."""
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tmp_path, overwrite=False, save_every=1, keep_last=4, steps=4)))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    other = tmp_path / "other"

    def train(*overrides: str) -> str:
        command = [sys.executable, "finetune/train.py", str(path), *overrides]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def weights(run: Path) -> list[bytes]:
        return [file.read_bytes() for file in sorted(run.glob("*/*.safetensors"))]

    train()
    undisturbed = weights(tmp_path / "run")
    assert undisturbed
    taken = tmp_path / "run" / "checkpoints" / "step_2"
    command = [f"resume={taken}", f"output_dir={other}"]
    for left, begins in (([], taken), (["step_3"], other / "checkpoints" / "step_3")):
        if not other.exists():
            train(*command)
        (other / "summary.json").write_text(json.dumps({"status": "stopped"}))
        for checkpoint in (other / "checkpoints").glob("step_*"):
            if checkpoint.name not in left:
                shutil.rmtree(checkpoint)
        if not left:
            (other / "checkpoints" / "latest").unlink()
        assert f"from {begins}" in train(*command)
        assert weights(other) == undisturbed
        steps = [json.loads(line)["step"] for line in (other / "metrics.jsonl").read_text().split("\n") if line]
        assert steps == [*range(min(steps), 5)]  # those before it began are of the run that it continues


def test_one_run_at_a_time(tmp_path: Path) -> None:
    held = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ is writing a run there"):
        RunLock(tmp_path / "run")
    held.release()
    assert not (tmp_path / "run").exists()  # it was made for the lock
    again = RunLock(tmp_path)
    assert own_entries(tmp_path) == []
    again.release()
    assert tmp_path.exists()


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from colm_ds.run_folder.lock import RunLock
        lock = RunLock({str(tmp_path / "run")!r})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=False)
    assert done.returncode == -9
    RunLock(tmp_path / "run").release()


def test_a_checkpoint_knows_its_settings(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    deepspeed = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 0}, "steps_per_print": 5}
    before = {
        "recipe": json.dumps(recipe.model_dump(), default=str),
        "deepspeed": json.dumps(deepspeed | {"steps_per_print": 9}),
    }
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_4")
    check_same_settings(checkpoint, before, recipe, deepspeed)
    with pytest.raises(ConfigError, match="missing or broken, so the recipe of"):
        check_same_settings(checkpoint, {}, recipe, deepspeed)  # of an older version, without a config.json
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": {"steps": 3}}))
    check_same_settings(checkpoint, {}, recipe, deepspeed)  # which was compared already
    other = load_recipe(recipe_file(tmp_path), ["optimizer.lr=0.5", "micro_batch_size=1"])
    with pytest.raises(ConfigError) as caught:
        check_same_settings(checkpoint, before, other, deepspeed | {"gradient_clipping": 0.5})
    said = str(caught.value)
    assert "step_4: was made with other settings.\n  optimizer.lr: 0.001 there, 0.5 here" in said
    assert "deepspeed gradient_clipping: 1.0 there, 0.5 here" in said
    assert "micro_batch_size" not in said


def test_a_checkpoint_knows_its_data() -> None:
    before = {"data.train": {"place": "a.jsonl", "digest": "1"}}
    check_same_data(
        "step_4", before, {"data.train": {"place": "b.jsonl", "digest": "1"}, "data.heldout": before["data.train"]}
    )
    with pytest.raises(
        ConfigError, match=r"data\.train = a\.jsonl: not what the run was trained on\.\n  step_4: a\.jsonl"
    ):
        check_same_data("step_4", before, {"data.train": {"place": "a.jsonl", "digest": "2"}})


@pytest.mark.slow
@pytest.mark.parametrize("change", ["content", "order", "config"])
def test_a_resume_refuses_what_was_changed(change: str, tmp_path: Path) -> None:
    """Rows in another order, one word, and a config.json that is gone beside another learning rate."""
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    values = recipe_of(tmp_path, overwrite=False, save_every=2, steps=4)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def train(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "finetune/train.py", str(path), *overrides]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert train().returncode == 0
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps({"status": "stopped"}))
    data = tmp_path / "data" / "train.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    overrides = []
    if change == "order":
        data.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    elif change == "content":
        record = json.loads(lines[0])
        record["output"] += " ."
        data.write_text("".join([json.dumps(record) + "\n", *lines[1:]]), encoding="utf-8")
    else:
        (tmp_path / "run" / "config.json").unlink()
        overrides = ["optimizer.lr=0.5"]
    done = train(*overrides)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    said = "optimizer.lr: 0.001 there, 0.5 here" if change == "config" else "not what the run was trained on"
    assert said in done.stderr
