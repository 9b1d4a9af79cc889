"""What a run says of itself: its summary at the start, its progress in a terminal and in a log, and its last words."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from colm_ds.checkpoints.atomic import Checkpoint
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.planner.job import job_of_recipe, model_configuration
from colm_ds.planner.plan import Planner
from colm_ds.process.exit_codes import ExitCode
from colm_ds.recipes.recipe import BaseRecipe, load_recipe
from colm_ds.training.run import held_back
from colm_ds.training.start_summary import Start, _data, start_summary
from tests.finetune.test_entry import ROOT, recipe_of
from tests.terminal import in_terminal, screen

PROGRAM = "tests/training/ending_badly.py"
LABELS = ("model", "trained", "data", "batch", "selector", "memory", "ranks", "steps", "output")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_mixture(folder / "data", seed=1, scale=0.02)
    return folder


def command(folder: Path, what: str, **changes: Any) -> list[str]:
    path = folder / f"{what}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, overwrite=False, **changes)))
    return [sys.executable, PROGRAM, what, "0", str(path)]


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def labels(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_terminal_and_resumed_in_a_log(folder: Path) -> None:
    program = command(folder, "stop", steps=4, save_every=1, output_dir=str(folder / "stopped"))
    raw, code = in_terminal(program, columns=120, environment=environment(), cwd=ROOT)
    assert code == ExitCode.STOPPED, raw
    assert "\x1b[?25l" not in raw
    lines = screen(raw, columns=120)
    bar, last = lines[-2:]
    assert re.fullmatch(r"[━╸╺]+ test: 2 of 4 steps, loss \d\.\d{3}, [\d.]+ examples/s, [\d.]+ GiB, \d+ s left", bar)
    assert last == "test: stopped after step 2 (signal SIGTERM)."
    at = lines.index("test: starts")
    expected = {
        "model": r"llama, [\d.]+ K parameters, random weights",
        "trained": r"[\d.]+ K parameters \(all\)",
        "data": r"\d+ examples: generated/sort \d+, .*; \* small, kept whole",
        "batch": "r = 16 looked at, b = 8 trained on, micro-batches of 3 on a rank",
        "selector": r"colm with spsa: a step at 1\.\d\d times the price of plain training on b",
        "memory": r"0\.\d\d GiB planned on a rank \(largest in \w+, for examples of 96 tokens\)",
        "ranks": "1 on cpu, ZeRO-0, float32",
        "steps": r"4, 0\.\d\d epochs looked at",
        "output": re.escape(str(folder / "stopped")),
    }
    said = dict(line.split(maxsplit=1) for line in lines[at + 1 : at + 10] if line.startswith("  "))
    assert said.keys() == expected.keys()
    for label, text in said.items():
        assert re.fullmatch(expected[label], text), f"{label}: {text}"
    program[2] = "nothing"
    again = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert not {"\r", "\x1b"} & set(again.stdout + again.stderr)
    start = f"test: resumed after step 2, from {folder / 'stopped' / 'checkpoints' / 'step_2'}\n  model "
    assert again.stderr.count(start) == 1
    logged = [line for line in again.stderr.splitlines() if "of 4 steps" in line]
    assert len(logged) == 1
    assert re.fullmatch(r"test: 4 of 4 steps, loss \d\.\d{3}, [\d.]+ examples/s, [\d.]+ GiB, took \d+ s", logged[0])
    assert again.stdout.startswith(f"test: 4 steps done, written to {folder / 'stopped'}\n")


def test_messages_of_a_run_in_a_terminal(folder: Path) -> None:
    """Each on a line of its own, also that about the end."""
    program = command(folder, "gradients", steps=2, output_dir=str(folder / "diverged"))
    raw, code = in_terminal(program, columns=250, environment=environment(), cwd=ROOT)
    assert code == ExitCode.DIVERGED, raw
    *before, bar, last = screen(raw, columns=250)
    skipped = "the gradient is not finite, nothing was changed"
    assert before[-2:] == [f"step 1: {skipped} (1 so far)", f"step 2: {skipped} (2 so far)"]
    assert "test: 1 of 2 steps" in bar
    assert last.startswith("DivergenceError: ")


class Data:
    """As much of a dataset as is looked at."""

    lengths = np.array([40, 60])
    num_label_tokens = np.array([20, 30])

    def __len__(self) -> int:
        return len(self.lengths)


def recipe(folder: Path, **changes: Any) -> BaseRecipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, **changes)))
    return load_recipe(path, needs_files=False)


def start(folder: Path, **changes: Any) -> Start:
    made = recipe(folder, **changes)
    described = {
        "num_parameters": 2_780_000_000,
        "num_trainable": 4_700_000,
        "sources": {f"source {number}": 1000 - number for number in range(40)},
        "small_sources": ["source 0", "source 38", "source 39"],
        "world_size": 2,
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "colm": {**made.colm.model_dump(), "coreset_size": 8},
        "why_not_replay": None,
    }
    return Start(made, described, Data(), model_configuration(made), "cpu", None)  # type: ignore[arg-type]


def test_many_sources_take_one_line(folder: Path) -> None:
    lines = start_summary(start(folder, lora={"rank": 4, "alpha": 8}))
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 120
    assert "  trained   4.7 M parameters (0.17%), LoRA of rank 4" in lines
    (data,) = [line for line in lines if line.startswith("  data")]
    first, rest = r"  data      39,220 examples: source 0 1,000\*", r", \d+ more with [\d,]+, 2 of them small"
    assert re.fullmatch(first + r"(, source \d+ \d+)+" + rest + r"; \* small, kept whole", data), data
    for plain in ({"selector": "random", "coreset_size": 8}, {"selector": "full", "coreset_size": 16}):
        summed = "\n".join(start_summary(start(folder, colm={"large_batch_size": 16, **plain})))
        assert "source 0 1,000" in summed
        assert "small" not in summed
    without = _data({"big": 9_000} | {f"source {'x' * 80} {n}": 1 for n in range(9)}, [f"source {'x' * 80} 1"])
    assert without == "9,009 examples: big 9,000, 9 more with 9, 1 of them small; small ones are kept whole"


TOKENS = {"probe": {"estimator": "tokens"}}


@pytest.mark.parametrize(
    ("colm", "said"),
    [
        (TOKENS, "importance with tokens: a step at 1.00 times the price of plain training on b"),
        ({"selector": "random"}, "random: a step at 1.00 times the price of plain training on b"),
        ({"selector": "full", "coreset_size": 16}, "full: plain training on all r"),
    ],
)
def test_selectors_and_their_prices(folder: Path, colm: dict[str, Any], said: str) -> None:
    section = {"large_batch_size": 16, "coreset_size": 8, **colm}
    assert f"  selector  {said}" in start_summary(start(folder, colm=section))


def test_the_price_is_that_of_the_average_step(folder: Path) -> None:
    def price(**section: Any) -> float:
        lines = start_summary(start(folder, colm={"large_batch_size": 16, "coreset_size": 8, **section}))
        return float(next(re.findall(r"a step at ([\d.]+) times", line)[0] for line in lines if "selector" in line))

    assert price(schedule={"every": 2}) == pytest.approx(1 + (price() - 1) * 2 / 3, abs=0.01)  # in 1 and 3 of 3 steps


def test_nothing_that_is_not_known_stops_a_run(folder: Path) -> None:
    whole = start(folder)
    broken = replace(whole, described={}, data=None, model_config=None)  # type: ignore[arg-type]
    assert start_summary(broken)[0] == "test: starts"
    assert labels(start_summary(broken)[1:]) == ["output"]
    resumed = replace(broken, resumed=Checkpoint(Path("run/checkpoints/step_7"), 7, 1, {}))
    assert start_summary(resumed)[0] == "test: resumed after step 7, from run/checkpoints/step_7"


def test_planning_draws_no_random_numbers_and_ends_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    before = torch.get_rng_state()
    monkeypatch.setattr("colm_ds.training.start_summary._PLANNING_S", 60.0)
    assert any("planned on a rank (largest in " in line for line in start_summary(start(folder, lora=lora)))
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr("colm_ds.training.start_summary._PLANNING_S", 0.0)
    lines = start_summary(start(folder, lora=lora))
    assert labels(lines[1:]) == list(LABELS)
    assert "times the price" in lines[5]
    assert "for weights, gradients and optimizer" in lines[6]
    job = job_of_recipe(recipe(folder), 1)
    with pytest.raises(TimeoutError):
        Planner(limit_s=0.0).memory(job)


def test_warnings_of_the_engine_come_after_the_lines_about_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("colm_ds.engine.coreset_selector")
    with held_back("colm_ds") as kept:
        logger.warning("no forward replay: %s", "it is off")
        logger.info("nobody asked for this")
        assert caplog.messages == []
    assert caplog.messages == []
    kept.say()
    kept.say()
    assert caplog.messages == ["no forward replay: it is off"]
    assert logging.getLogger("colm_ds").propagate

    def fail() -> None:
        with held_back("colm_ds"):
            logger.warning("why it fails")
            raise SystemExit(2)

    with pytest.raises(SystemExit):
        fail()
    assert caplog.messages[1:] == ["why it fails"]
