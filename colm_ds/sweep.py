"""Arms times seeds from one grid file: what is finished is skipped, what fails is noted, and a table comes out."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import yaml
from pydantic import Field

from colm_ds.config import Section, validate_section
from colm_ds.errors import ConfigError, Problems
from colm_ds.report import compare, load_run
from colm_ds.sweep_table import format_html, format_markdown, is_finished, read_object, table_rows


class LaunchConfig(Section):
    """How a run is started."""

    num_gpus: int | None = Field(None, ge=1, description="ranks of a run; default: one per GPU, two without any")
    parallel: int = Field(1, ge=1, description="runs at a time, each with its share of the processor's cores")
    device_groups: list[str] | None = Field(
        None, description='instead: runs at a time, each on GPUs of its own, for example ["0,1", "2,3"]'
    )
    master_port: int = Field(29640, ge=1, le=65000, description="port of the first run; each group takes the next one")


class Grid(Section):
    """A sweep."""

    recipe: str = Field(description="recipe that all arms start from; relative to the grid file or to here")
    out: str = Field(description="folder of the tables; relative to the working folder")
    runs: str | None = Field(None, description="folder of the runs, which grids may share; default: out")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of every arm")
    baseline: str = Field(description="the arm that the others are held against")
    prepare: dict[str, str] = Field(
        {}, description="before the arms, in order: what must be there, and the Python command that makes it"
    )
    common: list[str] = Field([], description="key=value changes to the recipe for all arms")
    arms: dict[str, list[str]] = Field(min_length=1, description="key=value changes to the recipe, by arm")
    launch: LaunchConfig = LaunchConfig()
    script: str = Field("finetune/train.py", description="what to run")
    evaluate: str | None = Field(None, description="after each run: options of finetune/evaluate.py, e.g. --tasks math")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        arm: its arm.
        seed: its seed.
        folder: where it goes.
        arguments: of the script.
    """

    arm: str
    seed: int
    folder: Path
    arguments: list[str]

    @property
    def log(self) -> Path:
        """What the run prints goes here."""
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def record(self) -> Path:
        """What was asked of the run that lies in the folder."""
        return self.folder.parent / f"{self.folder.name}.asked.json"


@dataclass(frozen=True)
class Place:
    """Where a run can go while others run: a number for its port, its GPUs (None: as many as it takes), its threads."""

    number: int
    devices: str | None
    num_threads: int


def load_grid(path: str | Path, changes: Sequence[str] = (), seeds: Sequence[int] = ()) -> Grid:
    """Read and check a grid.

    Args:
        path: the YAML file.
        changes: further key=value changes to the recipe, for all arms.
        seeds: instead of the grid's.

    Raises:
        ConfigError: listing every problem found.
    """
    path = Path(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as a grid: {error}. Write a YAML file.") from None
    problems = Problems(str(path))
    grid = validate_section(Grid, loaded if isinstance(loaded, dict) else {}, "", problems)
    problems.raise_if_any()
    assert isinstance(grid, Grid)
    if grid.baseline not in grid.arms:
        problems.add("baseline", grid.baseline, "not an arm", f"Choose one of {', '.join(map(repr, grid.arms))}.")
    recipe = next((place for place in (Path(grid.recipe), path.parent / grid.recipe) if place.exists()), None)
    if recipe is None:
        problems.add("recipe", grid.recipe, "no such file", f"It is looked for here and in {path.parent}.")
    for change in [change for change in changes if "=" not in change]:
        problems.add("change", change, "not of the form key=value", "For example steps=20.")
    if grid.launch.device_groups and grid.launch.parallel > 1:
        problems.add("launch.parallel", grid.launch.parallel, "there are device groups", "Remove one of both.")
    problems.raise_if_any()
    updates = {"recipe": str(recipe), "common": [*grid.common, *changes], "seeds": list(seeds) or grid.seeds}
    return grid.model_copy(update=updates)


def jobs_of(grid: Grid) -> list[Job]:
    """All runs, seed by seed, so that a stopped sweep has whole comparisons."""
    jobs = []
    for seed in grid.seeds:
        for arm, changes in grid.arms.items():
            folder = Path(grid.runs or grid.out) / _slug(arm) / f"seed_{seed}"
            own = [f"name={json.dumps(arm)}", f"output_dir={folder}", f"seed={seed}", f"colm.seed={seed}"]
            jobs.append(Job(arm, seed, folder, [grid.recipe, *grid.common, *changes, *own, "overwrite=false"]))
    return jobs


def is_done(grid: Grid, job: Job) -> bool:
    """Whether a job's run is finished, and evaluated where the grid asks for that."""
    return is_finished(job.folder) and (grid.evaluate is None or (job.folder / "evaluation" / "results.json").exists())


def run_sweep(grid: Grid, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is left to do and write the tables.

    Args:
        grid: from `load_grid`.
        say: takes one line of progress at a time.

    Returns:
        What `results.json` holds: rows, failures, seconds.

    Raises:
        ConfigError: if what the arms need can not be prepared.
    """
    started = time.monotonic()
    for path, command in grid.prepare.items():
        _prepare(Path(path), command, say)
    jobs = jobs_of(grid)

    def result(failures: dict[str, str]) -> dict[str, Any]:
        folders = {(job.arm, job.seed): job.folder for job in jobs if _name(job) not in failures}
        rows = table_rows(grid.arms, grid.baseline, folders)
        return {"rows": rows, "failures": failures, "wall_s": time.monotonic() - started}

    final = result(run_jobs(grid, jobs, say, lambda failures: _write(grid, result(failures))))
    _write(grid, final)
    runs = [load_run(job.folder) for job in jobs if is_finished(job.folder)]
    if runs:
        compare(runs, Path(grid.out))
    return final


def run_jobs(
    grid: Grid,
    jobs: Sequence[Job],
    say: Callable[[str], None] = print,
    after_each: Callable[[dict[str, str]], None] = lambda failures: None,
) -> dict[str, str]:
    """Do what is left to do of some runs; what failed, by run.

    Args:
        grid: how they are started.
        jobs: the runs.
        say: takes one line of progress at a time.
        after_each: called after every run, one at a time, with what failed so far.
    """
    failures = {_name(job): found for job in jobs if (found := _other_settings(job))}
    todo = [job for job in jobs if not is_done(grid, job) and _name(job) not in failures]
    say(f"{len(jobs)} runs, {len(jobs) - len(todo) - len(failures)} finished already")
    for name, found in failures.items():
        say(f"{name}: {found}")
    places = _places(grid)
    free: Queue[Place] = Queue()
    for place in places:
        free.put(place)
    lock = threading.Lock()
    num_done = 0

    def work(job: Job) -> None:
        nonlocal num_done
        place = free.get()
        begun = time.monotonic()
        try:
            failure = _run(grid, job, place)
        finally:
            free.put(place)
        with lock:
            num_done += 1
            if failure:
                failures[_name(job)] = failure
            after_each(failures)
            spent = time.monotonic() - begun
            say(f"{num_done} of {len(todo)}: {_name(job)}: {failure or 'done'} ({spent:.0f} s)")

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(work, todo))
    return failures


def _places(grid: Grid) -> list[Place]:
    launch, cores = grid.launch, os.cpu_count() or 1
    groups: Sequence[str | None] = launch.device_groups or [None] * launch.parallel
    return [Place(number, devices, max(1, cores // len(groups))) for number, devices in enumerate(groups)]


def _prepare(path: Path, command: str, say: Callable[[str], None]) -> None:
    """Run a Python command unless what it makes is there: a file, or the folder of a finished run."""
    if is_finished(path) or (path.exists() and not (path / "metrics.jsonl").exists()):
        return
    say(f"making {path}")
    log = path.with_name(f"{path.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    code = _call([sys.executable, *shlex.split(command)], log, os.cpu_count() or 1)
    if code or not path.exists():
        raise ConfigError(f"prepare: {path} was not made. {_what_failed(code, log)}")


def _other_settings(job: Job) -> str:
    """Why the finished run in a job's folder is not this job's; empty if it is, or there is none."""
    asked = read_object(job.record)
    if not is_finished(job.folder) or not asked or asked == _asked(job):
        return ""
    return f"{job.folder} holds a run with other settings. Remove it, or give the grid another folder."


def _asked(job: Job) -> dict[str, Any]:
    """What defines a job: its recipe's content and its changes."""
    recipe, *changes = job.arguments
    return {"recipe": yaml.safe_load(Path(recipe).read_text(encoding="utf-8")), "changes": changes}


def _run(grid: Grid, job: Job, place: Place) -> str:
    """Start one run and wait; what went wrong, empty if nothing did."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_text("", encoding="utf-8")
    if not is_finished(job.folder):
        job.record.write_text(json.dumps(_asked(job), indent=2, default=str) + "\n", encoding="utf-8")
        code = _call([*_launcher(grid, place), grid.script, *job.arguments], job.log, place.num_threads)
        if code or not is_finished(job.folder):
            return _what_failed(code, job.log)
    if grid.evaluate is not None:
        command = [*_launcher(grid, place), "finetune/evaluate.py", str(job.folder), *shlex.split(grid.evaluate)]
        code = _call(command, job.log, place.num_threads)
        if code or not is_done(grid, job):
            return f"evaluation {_what_failed(code, job.log)}"
    return ""


def _launcher(grid: Grid, place: Place) -> list[str]:
    """The beginning of a run's command; a single rank needs no launcher, whose start takes seconds."""
    num_ranks = grid.launch.num_gpus or default_ranks()
    if place.devices is None and num_ranks == 1:
        return [sys.executable]
    where = ["--num_gpus", str(num_ranks)] if place.devices is None else ["--include", f"localhost:{place.devices}"]
    port = str(grid.launch.master_port + place.number)
    return [sys.executable, "-m", "deepspeed.launcher.runner", "-q", *where, "--master_port", port]


def _call(command: Sequence[str], log: Path, num_threads: int) -> int:
    """Run a command on so many threads, its output at the end of a log; its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a", encoding="utf-8") as output:
        return subprocess.run(command, stdout=output, stderr=output, check=False, env=environment).returncode


def _what_failed(code: int, log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if "Error" in line]
    return f"failed with exit code {code}: {lines[0].strip() if lines else 'no message'} (see {log})"


def default_ranks() -> int:
    """Ranks of a run: one per GPU, two without any."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def _write(grid: Grid, result: dict[str, Any]) -> None:
    out, rows = Path(grid.out), result["rows"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "results.md").write_text(format_markdown(rows, grid.baseline) + "\n", encoding="utf-8")
    (out / "results.html").write_text(format_html(rows, grid.baseline, out.name), encoding="utf-8")


def _name(job: Job) -> str:
    return f"{job.arm}, seed {job.seed}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name).strip("_").lower()
