"""Arms times seeds from one grid file: what is finished is skipped, what fails is noted, and a table comes out."""

from __future__ import annotations

import json
import math
import os
import re
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

import numpy as np
import yaml
from pydantic import Field

from colm_ds.config import Section, validate_section
from colm_ds.errors import ConfigError, Problems
from colm_ds.report import compare, load_run


class LaunchConfig(Section):
    """How a run is started."""

    num_gpus: int | None = Field(None, ge=1, description="ranks of a run; default: one per GPU, two without any")
    device_groups: list[str] | None = Field(
        None, description='run several at a time, each on its devices, for example ["0,1", "2,3"]'
    )
    master_port: int = Field(29640, ge=1, le=65000, description="port of the first run; each group takes the next one")


class Grid(Section):
    """A sweep."""

    recipe: str = Field(description="recipe that all arms start from; relative to the grid file or to here")
    out: str = Field(description="folder of the sweep; relative to the working folder")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of every arm")
    baseline: str = Field(description="the arm that the others are held against")
    common: list[str] = Field([], description="key=value changes to the recipe for all arms")
    arms: dict[str, list[str]] = Field(min_length=1, description="key=value changes to the recipe, by arm")
    launch: LaunchConfig = LaunchConfig()
    script: str = Field("finetune/train.py", description="what to run")


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


MEASURES: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
    "held-out loss": (lambda summary: (summary.get("heldout") or {}).get("overall"), False),
    "held-out loss, mean of sources": (lambda summary: (summary.get("heldout") or {}).get("macro"), False),
    "exact match": (lambda summary: (summary.get("exact_match") or {}).get("overall"), True),
    "step s": (lambda summary: (summary.get("step_s") or {}).get("median"), False),
    "peak GiB": (lambda summary: (summary.get("peak_memory_gib") or {}).get("peak"), False),
}
"""What the table shows: where it is in summary.json, and whether more is better."""


def load_grid(path: str | Path) -> Grid:
    """Read and check a grid.

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
    problems.raise_if_any()
    return grid.model_copy(update={"recipe": str(recipe)})


def jobs_of(grid: Grid) -> list[Job]:
    """All runs, seed by seed, so that a stopped sweep has whole comparisons."""
    jobs = []
    for seed in grid.seeds:
        for arm, changes in grid.arms.items():
            folder = Path(grid.out) / _slug(arm) / f"seed_{seed}"
            own = [f"name={json.dumps(arm)}", f"output_dir={folder}", f"seed={seed}", f"colm.seed={seed}"]
            jobs.append(Job(arm, seed, folder, [grid.recipe, *grid.common, *changes, *own, "overwrite=false"]))
    return jobs


def run_sweep(grid: Grid, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is left to do and write the tables.

    Args:
        grid: from `load_grid`.
        say: takes one line of progress at a time.

    Returns:
        What `results.json` holds: rows, failures, seconds.
    """
    started = time.monotonic()
    jobs = jobs_of(grid)
    failures = run_jobs(grid, jobs, say)
    result = {"rows": table_rows(grid, jobs), "failures": failures, "wall_s": time.monotonic() - started}
    _write(grid, jobs, result)
    return result


def run_jobs(grid: Grid, jobs: Sequence[Job], say: Callable[[str], None] = print) -> dict[str, str]:
    """Do what is left to do of some runs; what failed, by run.

    Args:
        grid: how they are started.
        jobs: the runs.
        say: takes one line of progress at a time.
    """
    todo = [job for job in jobs if not is_finished(job.folder)]
    say(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished already")
    groups: Queue[tuple[int, str | None]] = Queue()
    for number, devices in enumerate(grid.launch.device_groups or [None]):
        groups.put((number, devices))
    failures: dict[str, str] = {}
    lock = threading.Lock()

    def work(job: Job) -> None:
        number, devices = groups.get()
        begun = time.monotonic()
        try:
            failure = _run(grid, job, number, devices)
        finally:
            groups.put((number, devices))
        with lock:
            if failure:
                failures[f"{job.arm}, seed {job.seed}"] = failure
            say(f"{job.arm}, seed {job.seed}: {failure or 'done'} ({time.monotonic() - begun:.0f} s)")

    with ThreadPoolExecutor(groups.qsize()) as pool:
        list(pool.map(work, todo))
    return failures


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a finished run."""
    return _summary(folder).get("status") == "finished"


def table_rows(grid: Grid, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One row per arm: for every measure mean, standard deviation, and paired difference to the baseline's.

    The difference is the mean over the seeds that both have, with its standard error (None for one seed).
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for job in jobs:
        summary = _summary(job.folder) if is_finished(job.folder) else {}
        for measure, (read, _) in MEASURES.items():
            value = read(summary)
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.setdefault(job.arm, {}).setdefault(measure, {})[job.seed] = float(value)
    rows = []
    for arm in grid.arms:
        cells = {}
        for measure in MEASURES:
            mine = values.get(arm, {}).get(measure, {})
            theirs = values.get(grid.baseline, {}).get(measure, {})
            if mine:
                cells[measure] = _cell(mine, {} if arm == grid.baseline else theirs)
        rows.append({"arm": arm, "num_seeds": max((len(cell["seeds"]) for cell in cells.values()), default=0), **cells})
    return rows


def format_markdown(rows: Sequence[dict[str, Any]], baseline: str) -> str:
    """The table as Markdown: mean and standard deviation, the best mean in bold, differences to the baseline below."""
    shown = [measure for measure in MEASURES if any(measure in row for row in rows)]
    best = {measure: _best(rows, measure) for measure in shown}
    lines = ["| arm | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for row in rows:
        cells = [_shown(row.get(measure), row["arm"] in best[measure]) for measure in shown]
        lines.append(f"| {row['arm']} | {row['num_seeds']} | " + " | ".join(cells) + " |")
    lines += ["", f"Mean and standard deviation over seeds. In brackets: paired difference to *{baseline}*, with its "]
    lines[-1] += "standard error."
    return "\n".join(lines)


def _cell(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    values = np.array(list(mine.values()))
    cell: dict[str, Any] = {"mean": float(values.mean()), "seeds": sorted(mine)}
    cell["std"] = float(values.std(ddof=1)) if len(values) > 1 else None
    common = sorted(mine.keys() & theirs.keys())
    if common:
        differences = np.array([mine[seed] - theirs[seed] for seed in common])
        error = float(differences.std(ddof=1) / math.sqrt(len(common))) if len(common) > 1 else None
        cell["difference"] = {"mean": float(differences.mean()), "standard_error": error, "seeds": common}
    return cell


def _best(rows: Sequence[dict[str, Any]], measure: str) -> set[str]:
    """Arms with the best mean."""
    more = MEASURES[measure][1]
    means = {row["arm"]: row[measure]["mean"] for row in rows if measure in row}
    if len(means) < 2:
        return set()
    best = max(means.values()) if more else min(means.values())
    return {arm for arm, mean in means.items() if mean == best}


def _shown(cell: dict[str, Any] | None, bold: bool) -> str:
    if cell is None:
        return ""
    text = f"{cell['mean']:.3f}" + ("" if cell["std"] is None else f" ± {cell['std']:.3f}")
    text = f"**{text}**" if bold else text
    difference = cell.get("difference")
    if difference is None:
        return text
    error = "" if difference["standard_error"] is None else f" ± {difference['standard_error']:.3f}"
    return f"{text} ({difference['mean']:+.3f}{error})"


def _run(grid: Grid, job: Job, number: int, devices: str | None) -> str:
    """Start one run and wait; what went wrong, empty if nothing did."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q"]
    if devices is not None:
        command += ["--include", f"localhost:{devices}"]
    else:
        command += ["--num_gpus", str(grid.launch.num_gpus or default_ranks())]
    command += ["--master_port", str(grid.launch.master_port + number), grid.script, *job.arguments]
    log = job.folder.parent / f"{job.folder.name}.log"
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if code == 0 and is_finished(job.folder):
        return ""
    lines = [
        line for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace")) if "Error" in line
    ]
    return f"failed with exit code {code}: {lines[0].strip() if lines else 'no message'} (see {log})"


def default_ranks() -> int:
    """Ranks of a run: one per GPU, two without any."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def _write(grid: Grid, jobs: Sequence[Job], result: dict[str, Any]) -> None:
    out = Path(grid.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "results.md").write_text(format_markdown(result["rows"], grid.baseline) + "\n", encoding="utf-8")
    runs = [load_run(job.folder) for job in jobs if is_finished(job.folder)]
    if runs:
        compare(runs, out)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name).strip("_").lower()
