"""Runs that are stopped, killed or stuck, as a user meets them: under the launcher, with two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from colm_ds.checkpoints import atomic
from tests.finetune.test_entry import ROOT, metrics, recipe_of, write_mixture
from tests.ports import worker_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

STEPS = 400

PORT = str(worker_port(19))

WAITING = ("phase '", "step ", "reading the batch", "agreeing after step", "saving the checkpoint")
"""What a rank may be at when it waits for another."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data."""
    folder = tmp_path_factory.mktemp("stopping")
    write_mixture(folder / "data", seed=1, scale=0.02)
    return folder


class Started:
    """A run in the background."""

    def __init__(self, folder: Path, output: Path, **changes: Any) -> None:
        recipe = recipe_of(folder, overwrite=False, save_every=5, output_dir=str(output / "run"), **changes)
        path = output / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2", "--master_port", PORT]
        self.log = output / "log.txt"
        with self.log.open("a") as log:
            self.runner = subprocess.Popen(
                [*launcher, "finetune/train.py", str(path)], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        self.output = output

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl holds a step."""
        deadline = time.monotonic() + 120
        file = self.output / "run" / "metrics.jsonl"
        while not (file.exists() and any(entry["step"] >= step for entry in metrics(self.output) if "loss" in entry)):
            assert self.runner.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def family(self) -> tuple[psutil.Process, list[psutil.Process]]:
        """The launcher's inner process and the ranks."""
        (launcher,) = psutil.Process(self.runner.pid).children()
        return launcher, sorted(launcher.children(), key=lambda process: process.cmdline()[3])

    def finish(self) -> int:
        """Its exit code."""
        return self.runner.wait(timeout=120)


def all_end(processes: list[psutil.Process]) -> bool:
    """Whether all end within a minute."""
    return not psutil.wait_procs(processes, timeout=60)[1]


def newest(output: Path) -> int:
    """Steps in the newest checkpoint, which must be whole."""
    found = atomic.find(output / "run" / "checkpoints")
    assert found is not None
    assert found.passed_over == ()
    return found.step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_a_rank(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """The step is finished, a checkpoint written, the exit code tells; the same command goes on from there."""
    run = Started(folder, tmp_path, steps=STEPS)
    run.wait_for_step(7)
    _, ranks = run.family()
    ranks[1].send_signal(number)
    assert run.finish() == 3
    assert all_end(ranks)
    done = max(entry["step"] for entry in metrics(tmp_path))
    assert newest(tmp_path) == done < STEPS
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"status": "stopped", "steps": done}
    assert f"stopped after step {done}" in run.log.read_text()
    if number != signal.SIGTERM:
        return
    again = Started(folder, tmp_path, steps=STEPS)
    again.wait_for_step(done + 1)
    assert f"resumed after step {done}" in again.log.read_text()
    again.family()[1][0].send_signal(signal.SIGTERM)
    assert again.finish() == 3
    steps = [entry["step"] for entry in metrics(tmp_path) if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))  # none twice, none missing


def kill_runner(run: Started) -> None:
    """What the user started."""
    run.runner.kill()


def kill_launcher(run: Started) -> None:
    """Its inner process, the ranks' parent."""
    run.family()[0].kill()


def kill_rank(run: Started) -> None:
    """One rank."""
    run.family()[1][0].kill()


@pytest.mark.parametrize(
    "kill", [kill_rank, *(pytest.param(kill, marks=pytest.mark.slow) for kill in (kill_runner, kill_launcher))]
)
def test_nobody_stays_behind(kill: Callable[[Started], None], folder: Path, tmp_path: Path) -> None:
    """Kill -9 of any process: all end by themselves, and at most the steps since the last checkpoint are lost."""
    run = Started(folder, tmp_path, steps=STEPS)
    run.wait_for_step(7)
    launcher, ranks = run.family()
    kill(run)
    assert all_end([launcher, *ranks])
    run.finish()
    done = max(entry["step"] for entry in metrics(tmp_path))
    assert newest(tmp_path) >= (done - 1) // 5 * 5
    if kill is not kill_rank:  # the ranks were alive and had time to save
        assert newest(tmp_path) == done < STEPS
    assert "Traceback" not in run.log.read_text(), run.log.read_text()


@pytest.mark.slow
def test_a_stuck_rank(folder: Path, tmp_path: Path) -> None:
    """A rank that hangs: the other ends with the name of the phase, and so does the launcher."""
    colm = {"large_batch_size": 16, "coreset_size": 8, "phase_timeout_s": 4.0}
    run = Started(folder, tmp_path, steps=STEPS, colm=colm)
    run.wait_for_step(7)
    launcher, ranks = run.family()
    ranks[1].suspend()
    deadline = time.monotonic() + 60
    while "has lasted more than 4 s" not in run.log.read_text():
        assert time.monotonic() < deadline, run.log.read_text()[-2000:]
        time.sleep(0.1)
    message = next(line for line in run.log.read_text().splitlines() if "has lasted" in line)
    assert message.rpartition("rank 0: ")[2].startswith(WAITING)
    ranks[1].resume()
    assert run.finish() != 0
    assert all_end([launcher, *ranks])
    assert newest(tmp_path) >= 5
