"""Sweeps: every arm with every seed, finished ones skipped, failing ones survived, and a table that is right."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.errors import ConfigError
from colm_ds.report import Run, load_run
from colm_ds.sweep import Grid, Place, SweepJob, jobs_of, load_grid, run_sweep
from colm_ds.sweep import jobs as sweep
from colm_ds.sweep.curves import curves_svg, heldout_points
from colm_ds.sweep.table import MEASURES, Row, format_html, format_markdown, table_rows
from finetune.sweep import main
from tests.training.test_bad_input import ROOT, recipe_of

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


def fake_run(grid: Grid, job: SweepJob, place: Place) -> str:
    """Stands in for a launched run: a summary whose numbers follow from arm and seed."""
    if job.arm == "broken":
        return "failed with exit code 2: ConfigError"
    job.folder.mkdir(parents=True)
    loss = (1.0 if job.arm == "plain" else 0.9) + 0.1 * job.seed**2 - (0.02 * job.seed if job.arm == "CoLM" else 0)
    heldout = {"overall": loss, "per_source": {"web": loss, "code": 2 * loss}, "accuracy": 0.5}
    summary = {"status": "finished", "heldout": heldout, "step_s": {"median": 2.0}}
    (job.folder / "summary.json").write_text(json.dumps(summary))
    counts = {"web": 90, "code": 5}
    (job.folder / "config.json").write_text(json.dumps({"sources": counts, "small_sources": []}))
    (job.folder / "devices").write_text(str(place.devices))
    return ""


def rows_of(grid: Grid) -> list[Row]:
    return table_rows(grid.arms, grid.baseline, {(job.arm, job.seed): job.folder for job in jobs_of(grid)})


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are faked; the list says which were started."""
    started: list[str] = []

    def run(grid: Grid, job: SweepJob, place: Place) -> str:
        started.append(f"{job.arm} {job.seed}")
        return fake_run(grid, job, place)

    monkeypatch.setattr(sweep, "_run", run)
    monkeypatch.setattr(sweep, "load_run", lambda folder: None)
    monkeypatch.setattr(sweep, "compare", lambda runs, out: None)
    monkeypatch.setattr(sweep, "curves_svg", lambda arms: "")
    return started


def test_table(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    result = run_sweep(grid, say=lambda line: None)
    assert len(faked) == 9
    assert result["failures"] == {f"broken, seed {seed}": "failed with exit code 2: ConfigError" for seed in range(3)}
    plain, colm, broken = rows_of(grid)
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
    assert "| CoLM | 3 | **1.047 ± 0.189** (-0.120 ± 0.012) | **2.093 ± 0.378** (-0.240 ± 0.023) |" in text
    assert "| arm | seeds | held-out loss | small sources | big sources | accuracy, % | step s |" in text
    assert "| **50.000 ± 0.000** (+0.000 ± 0.000) |" in text
    page = (tmp_path / "out" / "results.html").read_text()
    assert "<strong>1.047 ± 0.189</strong> (-0.120 ± 0.012)" in page
    assert page.count("<tr>") == 8
    assert "| plain | 3 | 1.167 ± 0.208 |" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][1]["arm"] == "CoLM"


def test_sources_have_a_table_of_their_own(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    result = run_sweep(grid, say=lambda line: None)
    plain = next(row for row in result["sources"] if row["arm"] == "plain")
    assert plain["code"]["mean"] == pytest.approx(2 * plain["web"]["mean"])
    assert "| arm | seeds | web | code |" in (tmp_path / "out" / "results.md").read_text()
    assert 'scope="col">code</th>' in (tmp_path / "out" / "results.html").read_text()


def test_paired_differences_to_controls(faked: list[str], tmp_path: Path) -> None:
    arms = {"plain": [], "CoLM": [], "CoLM too": [], "broken": []}
    grid = load_grid(write_grid(tmp_path, arms=arms, controls=["CoLM", "plain", "broken"]))
    run_sweep(grid, say=lambda line: None)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["measure"] == "accuracy, %"  # what a classification task is judged by
    for folder in (tmp_path / "out").glob("*/seed_*"):
        summary = json.loads((folder / "summary.json").read_text())
        del summary["heldout"]["accuracy"]
        (folder / "summary.json").write_text(json.dumps(summary))
    result = run_sweep(grid, say=lambda line: None)
    assert result["measure"] == "held-out loss"
    differences = [0.1, 0.12, 0.14]
    assert result["differences"][0]["CoLM"]["mean"] == pytest.approx(statistics.mean(differences))
    error = statistics.stdev(differences) / 3**0.5
    assert result["differences"][0]["CoLM"]["standard_error"] == pytest.approx(error)
    text = (tmp_path / "out" / "results.md").read_text().split("\n\n")
    assert text[-1].splitlines() == [
        "| arm | to CoLM | to plain |",
        "|---|---|---|",
        "| plain | **+0.120 ± 0.012** |  |",
        "| CoLM |  | **-0.120 ± 0.012** |",
        "| CoLM too | +0.020 ± 0.012 | **-0.100 ± 0.000** |",
        "| broken |  |  |",
    ]
    assert "<td><strong>-0.120 ± 0.012</strong></td>" in (tmp_path / "out" / "results.html").read_text()


def test_curves_of_perplexity(tmp_path: Path) -> None:
    arms: dict[str, list[Run]] = {}
    for arm, factor in (("plain", 1.0), ("CoLM & co", 2.0)):
        for seed in range(2):
            folder = tmp_path / f"{factor}_{seed}"
            folder.mkdir()
            heldout = [
                {"step": step, "heldout": {"overall": 1.0, "perplexity": {"overall": factor * (20 - step + seed)}}}
                for step in (0, 2, 4)
            ]
            steps = [{"step": step, "tokens": 10, "time_s": {"total": 3.0}} for step in range(1, 5)]
            rows = [heldout[0], *steps[:1], steps[1] | heldout[1], *steps[2:3], steps[3] | heldout[2]]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "config.json").write_text(json.dumps({"name": arm}))
            arms.setdefault(arm, []).append(load_run(folder))
    points = heldout_points(arms["plain"][1])
    assert points["step"] == [0, 2, 4]
    assert points["perplexity"] == [21, 19, 17]
    assert points["tokens"] == [0, 20, 40]
    assert points["seconds"] == [0, 6, 12]
    root = ElementTree.fromstring(curves_svg(arms))
    assert root.tag.endswith("svg")


def test_finished_runs_are_skipped(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    run_sweep(grid, say=lambda line: None)
    faked.clear()
    said: list[str] = []
    run_sweep(grid, say=said.append)
    assert faked == ["broken 0", "broken 1", "broken 2"]
    assert said[0] == "9 runs, 6 finished already"


def test_runs_with_other_settings_are_not_taken_for_these(faked: list[str], tmp_path: Path) -> None:
    """Also where grids share a folder of runs."""
    first = load_grid(write_grid(tmp_path, arms={"plain": [], "CoLM": []}, runs=str(tmp_path / "runs"), seeds=[0]))
    for job in jobs_of(first):
        fake_run(first, job, Place(0, None, 1))
        job.record.write_text(json.dumps(sweep._asked(job)))
    run_sweep(first, say=lambda line: None)
    arms = {"plain": [], "CoLM": ["colm.metric=cosine"]}
    other = load_grid(write_grid(tmp_path, arms=arms, runs=str(tmp_path / "runs"), seeds=[0]))
    result = run_sweep(other, say=lambda line: None)
    assert faked == []
    assert list(result["failures"]) == ["CoLM, seed 0"]
    assert "holds a run with other settings. Remove it" in result["failures"]["CoLM, seed 0"]
    assert [row["num_seeds"] for row in result["rows"]] == [1, 0]


def test_what_can_not_be_prepared(tmp_path: Path) -> None:
    path = tmp_path / "nothing.txt"
    command = "-c \"raise ValueError('no luck')\""
    with pytest.raises(ConfigError, match=r"nothing.txt was not made. failed with exit code 1: .*no luck"):
        run_sweep(load_grid(write_grid(tmp_path, prepare={str(path): command})), say=lambda line: None)


def test_html_escapes_names() -> None:
    page = format_html({"rows": [{"arm": "<b>", "num_seeds": 0}]}, "<b>", "a & b")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "a &amp; b" in page


def test_device_groups(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, launch={"device_groups": ["0,1", "2,3"]}, arms={"plain": [], "CoLM": []}))
    run_sweep(grid, say=lambda line: None)
    used = {(job.folder / "devices").read_text() for job in jobs_of(grid)}
    assert used <= {"0,1", "2,3"}
    assert len(faked) == 6


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, seeds=[4], arms={"plain": [], "CoLM": []}))
    for job in jobs_of(grid):
        fake_run(grid, job, Place(0, None, 1))
    rows = rows_of(grid)
    assert rows[1]["held-out loss"]["std"] is None
    assert rows[1]["held-out loss"]["difference"]["standard_error"] is None
    assert "±" not in format_markdown({"rows": rows}, "plain")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "none"}, "baseline = 'none': not an arm. Choose one of 'plain', 'CoLM', 'broken'."),
        ({"controls": ["CoLM", "none"]}, "controls = 'none': not an arm. Choose of 'plain', 'CoLM', 'broken'."),
        ({"recipe": "nowhere.yaml"}, "recipe = 'nowhere.yaml': no such file."),
        ({"arm": {}}, "arm: unknown key. Did you mean 'arms'?"),
        ({"seeds": []}, "seeds = []"),
        ({"launch": {"parallel": 2, "device_groups": ["0"]}}, "launch.parallel = 2: there are device groups."),
    ],
)
def test_bad_grids(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_grid(write_grid(tmp_path, **changes))
    assert said in str(error.value)


def test_command_line(faked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changes for all arms and another list of seeds come from there."""
    path = str(write_grid(tmp_path, arms={"plain": [], "CoLM": ["colm.metric=cosine"]}))
    assert main([path, "steps=3", "--seeds", "4", "--list"]) == 0
    assert [line.split(":")[0].split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()] == [
        "plain, seed 4",
        "CoLM, seed 4",
    ]
    assert main([path, "steps=3", "--seeds", "4"]) == 0
    assert faked == ["plain 4", "CoLM 4"]
    assert "| CoLM | 1 |" in capsys.readouterr().out
    grid = load_grid(path, ["steps=3"], [4])
    assert [job.arguments[1:4] for job in jobs_of(grid)][1] == ["steps=2", "steps=3", "colm.metric=cosine"]
    assert main([path, "steps"]) == 2
    assert "change = 'steps': not of the form key=value" in capsys.readouterr().err


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_are_valid(path: Path) -> None:
    """And every arm of theirs is a recipe that can be run."""
    from colm_ds.config.resolve import resolve_config
    from colm_ds.recipes.recipe import load_recipe
    from colm_ds.training.run import deepspeed_config

    grid = load_grid(path)
    assert "keep small + random" in grid.arms
    assert f"finetune/grids/{path.name}" in path.read_text(encoding="utf-8").split("\n")[0]  # the command that runs it
    for job in jobs_of(grid):
        if job.seed == grid.seeds[0]:
            recipe = Path(grid.recipe).read_text(encoding="utf-8")
            anywhere = [f"data.train={path}", *([f"data.heldout={path}"] if "  heldout: " in recipe else [])]
            if "task: choices" in recipe:
                anywhere = [f"data.folder={path.parent}"]
            if "smollm2" in grid.recipe:
                anywhere.append("model.name_or_path=elsewhere")  # the package may not be installed
            resolve_config(deepspeed_config(load_recipe(job.arguments[0], [*job.arguments[1:], *anywhere])), 2)


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.slow
def test_real_runs(tmp_path: Path) -> None:
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    recipe = recipe_of(tmp_path)
    recipe["data"] = {**recipe["data"], "heldout": str(tmp_path / "data" / "heldout.jsonl")}
    note = tmp_path / "made" / "note.txt"
    path = write_grid(
        tmp_path,
        seeds=[0],
        arms={"plain": ["colm.selector=random"], "CoLM": [], "broken": ["colm.selector=none"]},
        launch={"num_gpus": 1, "parallel": 2},
        prepare={str(note): f"-c \"open('{note}', 'x').write('made once')\""},
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grid = load_grid(path)
    result = run_sweep(grid, say=lambda line: None)
    assert (tmp_path / "made" / "note.txt").read_text() == "made once"
    assert list(result["failures"]) == ["broken, seed 0"]
    assert "colm.selector = 'none': unknown" in (tmp_path / "out" / "broken" / "seed_0.log").read_text()
    assert set(result["rows"][0]) >= {"arm", *list(MEASURES)[:4], "step s", "peak GiB"}
    assert result["rows"][1]["held-out loss"]["difference"]["seeds"] == [0]
    again = run_sweep(grid, say=lambda line: None)  # what is made is not made anew, what is finished not run
    assert again["rows"] == result["rows"]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_every_arm_of_the_cpu_grids_trains(tmp_path: Path) -> None:
    """All of what they say, from preparation to tables, with two steps a run and one seed."""
    for name in ("finetune", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    whole: dict[str, Any] = {}
    for path in (path for path in GRIDS if path.stem.endswith("_cpu")):
        grid = yaml.safe_load(path.read_text())
        shared = {name: changes for name, changes in grid["arms"].items() if name in whole.get("arms", {})}
        assert all(whole["arms"][name] == changes for name, changes in shared.items())  # they share their runs
        whole = grid | {"arms": whole.get("arms", {}) | grid["arms"]}
    for arm, changes in whole["arms"].items():
        whole["arms"][arm] = [change for change in changes if not change.startswith("steps=")]
    whole["prepare"] = {
        key: f"{command} {'steps=2' if 'train.py' in command else '--scale 0.1'}"
        for key, command in whole["prepare"].items()
    }
    whole |= {"seeds": [0], "common": ["steps=2"], "recipe": str(ROOT / "finetune" / "recipes" / "cpu_lora.yaml")}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "finetune/sweep.py", "grid.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / whole["out"] / "results.json").read_text())["rows"]
    assert [row["arm"] for row in rows if row["num_seeds"] == 1] == list(whole["arms"])
    assert all("big sources" in row and "small sources" in row for row in rows)
    assert (tmp_path / whole["out"] / "results.html").exists()
