"""Sweeps: every arm with every seed, finished ones skipped, failing ones survived, and a table that is right."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds import sweep
from colm_ds.data.generated import write_mixture
from colm_ds.errors import ConfigError
from colm_ds.sweep import MEASURES, format_markdown, jobs_of, load_grid, run_sweep, table_rows
from tests.test_bad_input import ROOT, recipe_of

GRIDS = sorted((ROOT / "finetune" / "grids").glob("*.yaml"))


def write_grid(folder: Path, **changes: Any) -> Path:
    """A grid of two arms and a failing one."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("steps: 1\n")
    grid = {
        "recipe": "recipe.yaml",
        "out": str(folder / "out"),
        "seeds": [0, 1, 2],
        "baseline": "plain",
        "common": ["steps=2"],
        "arms": {"plain": ["colm.selector=random"], "CoLM": [], "broken": ["colm.selector=none"]},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid | changes, sort_keys=False))
    return folder / "grid.yaml"


def fake_run(grid: Any, job: Any, number: int, devices: str | None) -> str:
    """Stands in for a launched run: a summary whose numbers follow from arm and seed."""
    if job.arm == "broken":
        return "failed with exit code 2: ConfigError"
    job.folder.mkdir(parents=True)
    loss = (1.0 if job.arm == "plain" else 0.9) + 0.1 * job.seed**2 - (0.02 * job.seed if job.arm == "CoLM" else 0)
    summary = {"status": "finished", "heldout": {"overall": loss}, "step_s": {"median": 2.0}}
    (job.folder / "summary.json").write_text(json.dumps(summary))
    (job.folder / "devices").write_text(str(devices))
    return ""


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are faked; the list says which were started."""
    started: list[str] = []

    def run(grid: Any, job: Any, number: int, devices: str | None) -> str:
        started.append(f"{job.arm} {job.seed}")
        return fake_run(grid, job, number, devices)

    monkeypatch.setattr(sweep, "_run", run)
    monkeypatch.setattr(sweep, "load_run", lambda folder: None)
    monkeypatch.setattr(sweep, "compare", lambda runs, out: None)
    return started


def test_table(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    result = run_sweep(grid, say=lambda line: None)
    assert len(faked) == 9
    assert result["failures"] == {f"broken, seed {seed}": "failed with exit code 2: ConfigError" for seed in range(3)}
    plain, colm, broken = table_rows(grid, jobs_of(grid))
    losses = {"plain": [1.0, 1.1, 1.4], "CoLM": [0.9, 0.98, 1.26]}
    for row in (plain, colm):
        cell = row["held-out loss"]
        assert cell["mean"] == pytest.approx(statistics.mean(losses[row["arm"]]))
        assert cell["std"] == pytest.approx(statistics.stdev(losses[row["arm"]]))
    differences = [ours - theirs for ours, theirs in zip(losses["CoLM"], losses["plain"], strict=True)]
    found = colm["held-out loss"]["difference"]
    assert found["mean"] == pytest.approx(statistics.mean(differences))
    assert found["standard_error"] == pytest.approx(statistics.stdev(differences) / 3**0.5)
    assert "difference" not in plain["held-out loss"]
    assert broken == {"arm": "broken", "num_seeds": 0}
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| CoLM | 3 | **1.047 ± 0.189** (-0.120 ± 0.012) |" in text
    assert "| plain | 3 | 1.167 ± 0.208 |" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][1]["arm"] == "CoLM"


def test_finished_runs_are_skipped(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    run_sweep(grid, say=lambda line: None)
    faked.clear()
    said: list[str] = []
    run_sweep(grid, say=said.append)
    assert faked == ["broken 0", "broken 1", "broken 2"]
    assert said[0] == "9 runs, 6 finished already"


def test_device_groups(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, launch={"device_groups": ["0,1", "2,3"]}, arms={"plain": [], "CoLM": []}))
    run_sweep(grid, say=lambda line: None)
    used = {(job.folder / "devices").read_text() for job in jobs_of(grid)}
    assert used <= {"0,1", "2,3"}
    assert len(faked) == 6


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, seeds=[4], arms={"plain": [], "CoLM": []}))
    for job in jobs_of(grid):
        fake_run(grid, job, 0, None)
    rows = table_rows(grid, jobs_of(grid))
    assert rows[1]["held-out loss"]["std"] is None
    assert rows[1]["held-out loss"]["difference"]["standard_error"] is None
    assert "±" not in format_markdown(rows, "plain").split("\n\n")[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "none"}, "baseline = 'none': not an arm. Choose one of 'plain', 'CoLM', 'broken'."),
        ({"recipe": "nowhere.yaml"}, "recipe = 'nowhere.yaml': no such file."),
        ({"arm": {}}, "arm: unknown key. Did you mean 'arms'?"),
        ({"seeds": []}, "seeds = []"),
    ],
)
def test_bad_grids(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_grid(write_grid(tmp_path, **changes))
    assert said in str(error.value)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_are_valid(path: Path) -> None:
    """And every arm of theirs is a recipe that can be run."""
    from colm_ds.config import resolve_config
    from colm_ds.recipe import load_recipe
    from colm_ds.training import deepspeed_config

    grid = load_grid(path)
    for job in jobs_of(grid):
        if job.seed == grid.seeds[0]:
            anywhere = [f"data.train={path}", f"data.heldout={path}"]
            resolve_config(deepspeed_config(load_recipe(job.arguments[0], [*job.arguments[1:], *anywhere])), 2)


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_real_runs(tmp_path: Path) -> None:
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    recipe = recipe_of(tmp_path)
    recipe["data"] = {**recipe["data"], "heldout": str(tmp_path / "data" / "heldout.jsonl")}
    path = write_grid(tmp_path, seeds=[0], arms={"plain": ["colm.selector=random"], "broken": ["colm.selector=none"]})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grid = load_grid(path)
    result = run_sweep(grid, say=lambda line: None)
    assert list(result["failures"]) == ["broken, seed 0"]
    assert "colm.selector = 'none': unknown" in (tmp_path / "out" / "broken" / "seed_0.log").read_text()
    assert set(result["rows"][0]) >= {"arm", *list(MEASURES)[:2], "step s", "peak GiB"}
    assert (tmp_path / "out" / "report.html").exists()
