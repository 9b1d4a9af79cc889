"""`pretrain/prepare.py` and `pretrain/train.py` as a user starts them, on a mixture that the project makes itself."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from colm_ds.data.pretraining.token_store import checksum
from tests.pretrain.runs import (
    ENVIRONMENT,
    ROOT,
    WEIGHTS,
    Prepared,
    call,
    curve,
    launcher,
    make_recipe,
    read_metrics,
    read_summary,
    train,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = train(2, str(prepared.recipe), f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_prepare_and_train(prepared: Prepared, whole: Path) -> None:
    assert "generated/articles" in prepared.said
    heldout = [row["heldout"] for row in read_metrics(whole) if "heldout" in row]
    assert len(heldout) == 4  # before, after steps 2, 4 and 6
    assert set(heldout[0]["per_source"]) == set(WEIGHTS)
    assert heldout[0]["overall"] == pytest.approx(math.log(400), abs=0.3)  # nothing learnt yet
    assert read_summary(whole)["status"] == "finished"
    model = AutoModelForCausalLM.from_pretrained(whole / "best_model")
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


@pytest.mark.slow
def test_killed_in_the_middle(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    """`kill -9` of launcher and ranks between two checkpoints, and the same command again: the same curves."""
    run = tmp_path / "run"
    arguments = ("pretrain/train.py", str(prepared.recipe), f"output_dir={run}")
    kill_after(3, run, launcher(2), arguments)
    assert max(row["step"] for row in read_metrics(run)) in (3, 4, 5)
    again = call(*launcher(2), *arguments)
    assert again.returncode == 0, again.stderr
    assert "resumed after step " in again.stderr
    assert curve(run) == curve(whole)
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert (run / "best_model" / "best.json").read_text() == (whole / "best_model" / "best.json").read_text()


def kill_after(step: int, run: Path, start: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Start a run and kill all of its processes as soon as a step is in its metrics."""
    with (run.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *start, *arguments],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    metrics = run / "metrics.jsonl"
    end = time.monotonic() + 200
    while not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
        assert process.poll() is None, (run.parent / "killed.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.005)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        one.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everyone[1:], timeout=30)
    assert not (run / "summary.json").exists()


@pytest.mark.slow
def test_another_store_is_refused(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    """One with as many chunks of every source and other words in one of them; a moved one is the same."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "summary.json").unlink()  # as if it had been stopped there
    other = shutil.copytree(prepared.store, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    tokens = (other / "parts" / "000000.bin").read_bytes()
    swapped = tokens[2:4] + tokens[:2] + tokens[4:]
    assert swapped != tokens
    (other / "parts" / "000000.bin").write_bytes(swapped)
    manifest["parts"][0]["checksum"] = checksum(swapped)
    (other / "manifest.json").write_text(json.dumps(manifest))

    arguments = (str(prepared.recipe), f"output_dir={run}", "steps=8")
    refused = train(1, *arguments, f"data.store={other}")
    assert refused.returncode == 2
    for part in (f"data.store = {other}", str(prepared.store), "step_6", "choose another output_dir"):
        assert part in refused.stderr
    moved = shutil.copytree(prepared.store, tmp_path / "moved")
    again = train(1, *arguments, f"data.store={moved}")
    assert again.returncode == 0, again.stderr
    assert "resumed after step 6" in again.stderr


@pytest.mark.slow
def test_starting_anew_keeps_the_best_of_the_new_run(prepared: Prepared, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, save_every=0, steps=2)
    store = f"data.store={prepared.store}"
    best = tmp_path / "run" / "best_model" / "best.json"
    for change in ("optimizer.lr=0.01", "optimizer.lr=1.0e-6"):  # the second learns nothing
        done = train(1, str(recipe), store, f"output_dir={tmp_path / 'run'}", "overwrite=true", change)
        assert done.returncode == 0, done.stderr
        assert best.exists()
