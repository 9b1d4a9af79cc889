"""TensorBoard, W&B and CSV: what a run writes there, once and by rank 0, and that a resumed one goes on."""

from __future__ import annotations

import csv
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from colm_ds.config.resolve import resolve_config
from colm_ds.engine.monitor import RunMonitor
from colm_ds.errors import ConfigError
from colm_ds.recipes.recipe import Recipe
from colm_ds.run_folder.metrics import events
from colm_ds.training.monitors import monitor_sections, set_environment
from tests.engine.training import CORESET, SOURCES, Case, start
from tests.ranks import RankError, Ranks

CASE = Case("monitored", colm={"probe": {"estimator": "sketch", "num_probes": 8}})
STEPS = 5

# Stands for the package: writes down what it is called with.
WANDB = """
import json, os
def _note(**what):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**arguments): _note(init=arguments, pid=os.getpid())
def log(data, step=None, commit=None):
    _note(data=data, step=step)
"""


def sections(folder: Path) -> dict[str, Any]:
    return {
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"},
        "tensorboard": {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"},
        "wandb": {"enabled": True, "project": "mine"},
    }


def stop_and_go_on(folder: str) -> list[dict[str, Any]]:
    """In a rank: a checkpoint after step 3, a fourth step that is lost, two empty files, and the run resumed."""
    sys.path.insert(0, folder)
    os.environ["FAKE_WANDB"] = str(Path(folder) / f"calls_{os.environ['RANK']}.jsonl")
    config = CASE.config() | sections(Path(folder))
    engine = start(CASE, config=config)
    assert not (Path(folder) / "csv").exists()  # nothing before the first step
    stats = [engine.train_batch() for _ in range(3)]
    engine.save_checkpoint(folder + "/checkpoints")
    engine.train_batch()
    engine.destroy()
    (Path(folder) / "csv" / "Train_Samples_lr.csv").write_bytes(b"")  # as a full disk leaves it
    (Path(folder) / "csv" / "Time_probe_s.csv").write_bytes(bytes(9))  # and a crash
    engine = start(CASE, config=config)
    engine.load_checkpoint(folder + "/checkpoints")
    stats += [engine.train_batch() for _ in range(STEPS - 3)]
    engine.monitor.write_events(events({"heldout": {"overall": 2.5, "per_source": {"a/b": 3.0}}}, engine.num_samples))
    engine.destroy()
    return [found.as_dict() for found in stats]


def unopenable(folder: str) -> None:
    """In a rank: a monitor whose folder is a file."""
    (Path(folder) / "csv").touch()
    engine = start(CASE, config=CASE.config() | {"csv_monitor": sections(Path(folder))["csv_monitor"]})
    engine.train_batch()


@pytest.fixture(scope="module")
def run(pools: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("monitor")
    (folder / "wandb.py").write_text(WANDB)
    return folder, pools[2].run(stop_and_go_on, str(folder))[0]


def column(path: Path) -> list[list[str]]:
    with path.open(newline="") as lines:
        return list(csv.reader(lines))


def test_csv(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, stats = run
    heading, *rows = column(folder / "csv" / "Train_Samples_train_loss.csv")
    assert heading == ["step", "train_loss"]
    assert [int(step) for step, _ in rows] == [CORESET * step for step in range(1, STEPS + 1)]
    assert [float(value) for _, value in rows] == [found["loss"] for found in stats]
    names = {path.name for path in (folder / "csv").iterdir()}
    assert {"Train_Samples_lr.csv", "Time_probe_s.csv", "Memory_peak_gib.csv", "Heldout_a_b.csv"} <= names
    shares = [column(folder / "csv" / f"Share_{name}.csv")[-1][1] for name in SOURCES]
    assert sum(map(float, shares)) == pytest.approx(1)


def test_tensorboard(run: tuple[Path, list[dict[str, Any]]]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, stats = run
    found = events.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    losses = found.Scalars("Train/Samples/train_loss")
    assert [event.step for event in losses] == [CORESET * step for step in range(1, STEPS + 1)]
    assert [event.value for event in losses] == pytest.approx([entry["loss"] for entry in stats])
    assert [event.value for event in found.Scalars("Heldout/overall")] == [2.5]


def test_wandb_hears_of_rank_0_alone(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, stats = run
    calls = [json.loads(line) for line in (folder / "calls_0.jsonl").read_text().splitlines()]
    assert not (folder / "calls_1.jsonl").exists()
    assert [call["init"]["project"] for call in calls if "init" in call] == ["mine", "mine"]
    losses = [call for call in calls if "Train/Samples/train_loss" in call.get("data", {})]
    assert [call["step"] for call in losses] == [CORESET * step for step in (1, 2, 3, 4, 4, 5)]
    assert losses[-1]["data"]["Train/Samples/train_loss"] == stats[-1]["loss"]


def test_one_that_can_not_be_opened_ends_all_ranks(pools: dict[int, Ranks], tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"ConfigError: csv_monitor: cannot be opened \(rank 0: FileExistsError"):
        pools[2].run(unopenable, str(tmp_path))


@pytest.mark.parametrize(("name", "heading"), [("Train_Samples_lr", "lr"), ("Time_probe_s", "probe_s")])
def test_csv_files_that_a_full_disk_left_empty(run: tuple[Path, list[dict[str, Any]]], name: str, heading: str) -> None:
    """Each begins with its heading again."""
    (head, *rows) = column(run[0] / "csv" / f"{name}.csv")
    assert head == ["step", heading]
    assert [int(step) for step, _ in rows] == [CORESET * step for step in range(4, STEPS + 1)]


def test_a_failure_later_on_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def write_events(self, events: Any) -> None:
            raise OSError(28, "No space left on device")

    monitor = RunMonitor({"csv_monitor": {"enabled": True}})
    monitor._master = Full()
    for _ in range(2):
        monitor.write_events([("loss", 1.0, 1)])
    assert capsys.readouterr().err.count("No space left on device") == 1


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"csv_monitor": {"enable": True}}, "csv_monitor.enable: "),
        ({"tensorboard": True}, "tensorboard = True: not a section"),
        ({"comet": {"enabled": True}}, "comet.enabled = True: comet_ml is not installed. Run pip install comet_ml."),
    ],
)
def test_what_can_not_work_is_an_error(section: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        resolve_config({"colm": {"large_batch_size": 8, "coreset_size": 4}, **section}, 1)
    assert said in str(raised.value)


def test_recipes_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"WANDB_NAME": "my own"})
    recipe = cast(Recipe, SimpleNamespace(name="x", output_dir=str(tmp_path), monitor=["csv", "wandb"]))
    found = monitor_sections(recipe, {"wandb": {"team": "ours"}})
    assert found["csv_monitor"] == {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "csv"}
    assert found["wandb"] == {"enabled": True, "project": "colm_ds", "team": "ours"}
    set_environment(recipe)
    run_id = os.environ["WANDB_RUN_ID"]
    assert os.environ["WANDB_NAME"] == "my own"
    del os.environ["WANDB_RUN_ID"]
    set_environment(recipe)  # resumed
    assert os.environ["WANDB_RUN_ID"] == run_id
