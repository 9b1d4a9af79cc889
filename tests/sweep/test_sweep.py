"""Sweeps: every arm with every seed, finished ones skipped, failing ones survived, and a table that is right."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds import report
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.errors import ConfigError
from colm_ds.recipes.recipe import load_recipe
from colm_ds.report import compare
from colm_ds.sweep import Grid, Place, SweepJob, jobs_of, load_grid, run_sweep
from colm_ds.sweep import jobs as sweep
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
    counts = {"web": 90, "code": 5}
    config = {"name": job.arm, "seed": job.seed, "sources": counts, "small_sources": [], "colm": {}}
    (job.folder / "config.json").write_text(json.dumps(config))
    (job.folder / "devices").write_text(str(place.devices))
    (job.folder / "summary.json").write_text(json.dumps(summary))  # the last file, as of a run
    return ""


def tables_of(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables by their keys, cells by column; errors as `± COLUMN`."""
    found = {}
    for table in result["tables"]:
        errors = table.get("standard_errors", [[None] * len(table["columns"])] * len(table["rows"]))
        heads = [*table["columns"], *(f"± {label}" for label in table["columns"])]
        pairs = zip(table["rows"], errors, strict=True)
        found[table["key"]] = [dict(zip(heads, [*row, *error], strict=True)) for row, error in pairs]
    return found


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are faked; the list says which were started."""
    started: list[str] = []

    def run(grid: Grid, job: SweepJob, place: Place) -> str:
        started.append(f"{job.arm} {job.seed}")
        return fake_run(grid, job, place)

    monkeypatch.setattr(sweep, "_run", run)
    monkeypatch.setattr(report, "compare", lambda runs, out, against: None)
    return started


def test_tables(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    result = run_sweep(grid, say=lambda line: None)
    assert len(faked) == 9
    assert result["failures"] == {f"broken, seed {seed}": "failed with exit code 2: ConfigError" for seed in range(3)}
    tables = tables_of(result)
    plain, colm = tables["results"]
    losses = {"plain": [1.0, 1.1, 1.4], "CoLM": [0.9, 0.98, 1.26]}
    for row in (plain, colm):
        mine = losses[row["arm"]]
        assert row["seeds"] == 3
        assert row["held-out loss"] == pytest.approx(statistics.mean(mine), rel=1e-5)
        assert row["± held-out loss"] == pytest.approx(statistics.stdev(mine) / 3**0.5, rel=1e-5)
        assert row["small sources"] == pytest.approx(2 * row["held-out loss"], rel=1e-5)  # by the |V|/c rule
    differences = [ours - theirs for ours, theirs in zip(losses["CoLM"], losses["plain"], strict=True)]
    (found,) = tables["differences"]  # the baseline has none to itself
    assert (found["arm"], found["against"]) == ("CoLM", "plain")
    assert found["Δ held-out loss"] == pytest.approx(statistics.mean(differences), rel=1e-5)
    assert found["± Δ held-out loss"] == pytest.approx(statistics.stdev(differences) / 3**0.5, rel=1e-5)
    assert found["accuracy is"] == "not measurably different"  # what a classification task is judged by
    by_source = {row["source"]: row for row in tables["sources"]}
    assert by_source["code (small)"]["plain"] == pytest.approx(2 * by_source["web"]["plain"], rel=1e-5)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| CoLM | 3 | – | **1.0467 ± 0.1091** | **1.5700 ± 0.1637** | **2.0933 ± 0.2183** |" in text
    assert "± is the standard error of the mean over seeds." in text
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (written["tables"], written["runs"]) == (result["tables"], result["runs"])
    by_run = {(run["arm"], run["seed"]): run["numbers"]["heldout.overall"] for run in written["runs"]}
    assert by_run == {(arm, seed): values[seed] for arm, values in losses.items() for seed in range(3)}


def test_paired_differences_to_controls(faked: list[str], tmp_path: Path) -> None:
    arms = {"plain": [], "CoLM": [], "CoLM too": [], "broken": []}
    grid = load_grid(write_grid(tmp_path, arms=arms, controls=["CoLM", "plain", "broken"]))
    run_sweep(grid, say=lambda line: None)
    for folder in (tmp_path / "out").glob("*/seed_*"):
        summary = json.loads((folder / "summary.json").read_text())
        del summary["heldout"]["accuracy"]
        (folder / "summary.json").write_text(json.dumps(summary))
    rows = tables_of(run_sweep(grid, say=lambda line: None))["differences"]
    assert [(row["arm"], row["against"]) for row in rows] == [
        ("plain", "CoLM"),
        ("CoLM", "plain"),
        ("CoLM too", "plain"),
        ("CoLM too", "CoLM"),
    ]
    assert [row["held-out loss is"] for row in rows] == ["worse", "better", "better", "not measurably different"]
    differences = [0.1, 0.12, 0.14]
    assert rows[0]["Δ held-out loss"] == pytest.approx(statistics.mean(differences), rel=1e-5)
    assert rows[0]["± Δ held-out loss"] == pytest.approx(statistics.stdev(differences) / 3**0.5, rel=1e-5)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| plain | CoLM | worse | +11.5 | **+0.1200 ± 0.0115** |" in text


def test_the_report_of_a_sweep(faked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "compare", compare)
    arms = {"plain": [], "CoLM <b>": []}
    run_sweep(load_grid(write_grid(tmp_path, arms=arms, seeds=[0, 1])), say=lambda line: None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in page
    assert "CoLM &lt;b&gt;" in page
    tables = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]
    assert [row[:2] for row in tables["differences"]["rows"]] == [["CoLM <b>", "plain"]]


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
    assert [(row["arm"], row["seeds"]) for row in tables_of(result)["results"]] == [("plain", 1)]


def test_runs_are_evaluated_again_with_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the evaluation was killed or failed after it had written results of some of its sets."""
    codes: list[int] = []
    asked: list[list[str]] = []

    def call(command: list[str], log: Path, num_threads: int) -> int:
        asked.append(command[command.index("evaluate") + 2 :])
        return codes.pop()

    monkeypatch.setattr(sweep, "_call", call)
    arms: dict[str, Any] = {"arms": {"plain": []}, "seeds": [0], "launch": {"num_gpus": 1}}
    first = load_grid(write_grid(tmp_path, **arms, evaluate="--tasks gsm8k"))
    (job,) = jobs_of(first)
    fake_run(first, job, Place(0, None, 1))
    (job.folder / "evaluation").mkdir()
    (job.folder / "evaluation" / "results.json").write_text("{}")
    assert sweep.is_done(first, job)  # of an earlier version
    for code in (0, 1, 0):
        codes.append(code)
        assert bool(sweep._run(first, job, Place(0, None, 1))) == bool(code)
        assert sweep.is_done(first, job) == (not code)
    other = load_grid(write_grid(tmp_path, **arms, evaluate="--tasks  'gsm8k,math' --limit 5"))
    assert not sweep.is_done(other, job)
    codes.append(0)
    assert sweep.run_jobs(other, [job], say=lambda line: None) == {}
    assert asked[-1] == ["--tasks", "gsm8k,math", "--limit", "5"]
    assert sweep.is_done(other, job)
    assert sweep.is_done(load_grid(write_grid(tmp_path, **arms)), job)
    assert not codes


def test_what_can_not_be_prepared(tmp_path: Path) -> None:
    path = tmp_path / "nothing.txt"
    command = "-c \"raise ValueError('no luck')\""
    with pytest.raises(ConfigError, match=r"nothing.txt was not made. failed with exit code 1: .*no luck"):
        run_sweep(load_grid(write_grid(tmp_path, prepare={str(path): command})), say=lambda line: None)


def test_device_groups_run_at_once_and_one_run_each(
    faked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = load_grid(write_grid(tmp_path, launch={"device_groups": ["0,1", "2,3"]}, arms={"plain": [], "CoLM": []}))
    both = threading.Barrier(2, timeout=60)
    busy: set[str | None] = set()
    order: list[str | None] = []

    def run(grid: Grid, job: SweepJob, place: Place) -> str:
        assert place.devices not in busy
        busy.add(place.devices)
        order.append(place.devices)
        both.wait()  # six runs in pairs: passes only if a run of the other group is there
        busy.remove(place.devices)
        return fake_run(grid, job, place)

    monkeypatch.setattr(sweep, "_run", run)
    result = run_sweep(grid, say=lambda line: None)
    assert result["failures"] == {}
    assert sorted(map(str, order)) == ["0,1"] * 3 + ["2,3"] * 3
    assert {(job.folder / "devices").read_text() for job in jobs_of(grid)} == {"0,1", "2,3"}


def test_one_seed_has_no_error(faked: list[str], tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, seeds=[4], arms={"plain": [], "CoLM": []}))
    for job in jobs_of(grid):
        fake_run(grid, job, Place(0, None, 1))
    run_sweep(grid, say=lambda line: None)
    assert "| CoLM | 1 |" in (text := (tmp_path / "out" / "results.md").read_text())
    assert " ± " not in text.replace("± is the", "").replace("± its", "")


def test_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep looks for a run where its recipe puts it."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out in ("~/sweep", "$SCRATCH/sweep", "runs/try #2", "runs/a: b", "runs/{x}", "runs/- 'é\"", "runs/plain"):
        for key in ("out", "runs"):
            grid = load_grid(write_grid(tmp_path, arms={"plain": [], "🚀 fast": []}, **{key: out}))
            write_recipe(tmp_path)
            for job in jobs_of(grid):
                recipe = load_recipe(job.arguments[0], job.arguments[1:], needs_files=False)
                assert Path(recipe.output_dir) == job.folder
                assert recipe.name == job.arm
                assert job.folder.parts[-3] == Path(out).name
                assert "$" not in str(job.folder)
                assert "~" not in str(job.folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "none"}, "baseline = 'none': not an arm. Choose one of 'plain', 'CoLM', 'broken'."),
        ({"controls": ["CoLM", "none"]}, "controls = 'none': not an arm. Choose of 'plain', 'CoLM', 'broken'."),
        ({"recipe": "nowhere.yaml"}, "recipe = 'nowhere.yaml': no such file."),
        ({"arm": {}}, "arm: unknown key. Did you mean 'arms'?"),
        (
            {"arms": {"plain": [], "CoLM (64)": [], "colm 64": []}},
            "arms = 'colm 64': its runs would be those of 'CoLM (64)'. Let them differ in letters or digits too.",
        ),
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
    write_recipe(tmp_path)
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
    assert main([path, "--parallel", "0"]) == 2
    assert "launch.parallel = 0: must be at least 1" in capsys.readouterr().err
    assert load_grid(path, parallel=3).launch.parallel == 3
    assert main([path, "steps"]) == 2
    assert "change = 'steps': not of the form key=value" in capsys.readouterr().err


def write_recipe(folder: Path) -> None:
    """A recipe of a grid's folder whose data is there; its tokenizer and model would come later."""
    recipe = recipe_of(folder)
    rows = [{"instruction": f"{n} + 1?", "output": str(n + 1)} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] |= {"train": str(folder / "rows.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_every_arm_is_checked_before_the_first_run(
    faked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        "plain": ["colm.selector=random"],
        "typo": ["colm.metrik=cosine", "steps=ten"],
        "broken": ["colm.selector=none"],
        "large": ["colm.large_batch_size=64"],
        "numbers": ["colm.coreset_size=32"],
    }
    made = tmp_path / "made"
    grid = {"arms": arms, "prepare": {str(made): f"-c \"open('{made}', 'x').close()\""}, "seeds": [0, 1]}
    path = str(write_grid(tmp_path, **grid))
    write_recipe(tmp_path)
    assert main([path]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ConfigError: 4 problems in the arms of the grid"
    named = {line.replace(": unknown", " =").split(" = ")[0].strip() for line in lines[1:]}
    assert named == {
        "arm 'typo': steps",
        "arm 'typo': colm.metrik",
        "arm 'broken': colm.selector",
        "arm 'numbers': colm.coreset_size",
    }
    assert not faked
    assert not made.exists()  # nor is anything made for arms that cannot run
    for name in ("typo", "broken", "numbers"):
        del arms[name]
    assert main([str(write_grid(tmp_path, **grid))]) == 2  # the recipe is written anew, and wrong for all
    assert "every arm: " in capsys.readouterr().err
    write_recipe(tmp_path)
    assert main([path]) == 2
    assert "arm 'large': colm.large_batch_size = 64: more than the 20 examples" in capsys.readouterr().err
    assert not faked
    assert made.exists()  # data may be what is made, so it is looked at afterwards
    del arms["large"]
    write_grid(tmp_path, **grid)
    write_recipe(tmp_path)
    assert main([path]) == 0
    assert faked == ["plain 0", "plain 1"]
    (tmp_path / "rows.jsonl").unlink()
    assert main([path]) == 0  # all is done, so that nothing is read


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
            for key in ("colm.target", "colm.options.table"):
                if any(word.startswith(f"{key}=") for word in job.arguments):
                    anywhere.append(f"{key.replace('target', 'target.data')}={path}")
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
    tables = tables_of(result)
    assert set(tables["results"][0]) >= {"arm", "held-out loss", "mean of sources", "small sources", "s per step"}
    assert tables["differences"][0]["against"] == "plain"
    again = run_sweep(grid, say=lambda line: None)  # what is made is not made anew, what is finished not run
    assert again["tables"] == result["tables"]
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
    rows = tables_of(json.loads((tmp_path / whole["out"] / "results.json").read_text()))["results"]
    assert [row["arm"] for row in rows if row["seeds"] == 1] == list(whole["arms"])
    assert all("mean of sources" in row and "small sources" in row for row in rows)
    assert (tmp_path / whole["out"] / "report.html").exists()


STOPPABLE = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("ended").write_text("")
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path("begun").write_text("")
time.sleep(60)
"""


def test_no_run_begins_after_a_signal_that_the_main_thread_sees_late(
    faked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's SIGINT may have ended a run before the sweep's own main thread is told."""

    def run(grid: Grid, job: SweepJob, place: Place) -> str:
        faked.append(f"{job.arm} {job.seed}")
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return "stopped; the same command resumes it"

    monkeypatch.setattr(sweep, "_run", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(load_grid(write_grid(tmp_path)), say=lambda line: None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert faked == ["plain 0"]
    monkeypatch.setattr(sweep, "_run", lambda grid, job, place: faked.append(job.arm) or "")
    later = threading.Thread(target=run_sweep, args=(load_grid(write_grid(tmp_path)), lambda line: None))
    later.start()  # as in a notebook: signals are not its own, and it begins its runs
    later.join()
    assert len(faked) == 1 + 9


def listen_to_interrupts() -> None:
    """As in a terminal; what a shell starts in the background has SIGINT ignored, and passes that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(
    command: list[str], environment: dict[str, str], kind: signal.Signals, folder: Path
) -> tuple[int, str, str]:
    """Send SIGTERM to a command alone, or SIGINT to its whole group, once its part has begun; code and output."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
    ) as process:
        for _ in range(600):
            if (folder / "begun").exists():
                break
            time.sleep(0.2)
        if kind == signal.SIGTERM:
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=45)
    return process.returncode, output, errors


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_stopped_sweep_stops_its_runs(kind: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM goes to the sweep alone, and it passes it on; a terminal's SIGINT goes to the whole group."""
    (tmp_path / "run.py").write_text(STOPPABLE)
    path = write_grid(tmp_path, script="run.py", arms={"plain": [], "CoLM": []}, launch={"num_gpus": 1})
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "colm_ds.cli", "sweep", str(path)]
    returncode, output, errors = stopped(command, environment, kind, tmp_path)
    assert returncode == 3, errors
    assert errors.strip().endswith("stopped; the same command resumes")
    assert "Traceback" not in errors
    assert output.count("stopped; the same command resumes it") == 1  # and the next run is not begun
    assert (tmp_path / "ended").exists()


DEMO = """
from colm_ds.sweep import demo
demo.write_mixture = lambda out: None
demo.ranks_command = lambda *_, **__: [sys.executable, "run.py"]
sys.exit(main(["demo", "--out", "out", "--num-gpus", "1", "steps=2"]))
"""

PIPELINE = """
from colm_ds.sweep import pretraining_pipeline as pipeline
def run_all(*_, **__):
    pipeline._call("training", [sys.executable, "run.py"])
pipeline.run_all = run_all
sys.exit(main(["pretrain", "recipe.yaml"]))
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("program", [pytest.param(DEMO, marks=pytest.mark.slow), PIPELINE], ids=["demo", "pretrain"])
def test_a_stopped_command_waits_for_its_part(program: str, kind: signal.Signals, tmp_path: Path) -> None:
    """Whose step, and checkpoint, take longer than the quarter of a second that subprocess.run leaves."""
    (tmp_path / "run.py").write_text(STOPPABLE.replace("def stop(*_):\n", "def stop(*_):\n    time.sleep(1)\n"))
    code = f"import sys\nfrom colm_ds.cli import main\n{program}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    returncode, _, errors = stopped([sys.executable, "-c", code], environment, kind, tmp_path)
    assert (tmp_path / "ended").exists()
    assert "Traceback" not in errors
    assert errors.strip().endswith(": stopped; the same command resumes"), errors
    assert returncode == 3
