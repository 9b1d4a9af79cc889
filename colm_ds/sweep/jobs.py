"""Run arms times seeds from one grid file: skip finished runs, record failures, and write a report."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import IO, TYPE_CHECKING, Any

from colm_ds.errors import CoLMError, ConfigError, Problems
from colm_ds.process.cores import usable_cores
from colm_ds.process.exit_codes import ExitCode
from colm_ds.process.launch import accelerator_environment, ranks_command
from colm_ds.recipes.data_check import check_data
from colm_ds.recipes.recipe import load_recipe, read_values
from colm_ds.run_folder.contents import EVALUATION, METRICS, RESULTS
from colm_ds.run_folder.files import read_object, write_object
from colm_ds.run_folder.read import is_finished
from colm_ds.sweep.grid import Grid, SweepJob, jobs_of

if TYPE_CHECKING:
    from colm_ds.report import Run


@dataclass(frozen=True)
class Place:
    """Resources of a run beside others: a number for its port, GPUs (None: as many as it takes), threads of a rank."""

    number: int
    devices: str | None
    num_threads: int


def is_done(grid: Grid, job: SweepJob) -> bool:
    """Return whether a job's run is finished, and evaluated as the grid requires.

    An evaluation without a record, as earlier versions left it, is taken for the grid's.
    """
    if not is_finished(job.folder) or grid.evaluate is None:
        return is_finished(job.folder)
    evaluated = read_object(job.evaluation_record)
    return (job.folder / EVALUATION / RESULTS).exists() and evaluated in ({}, _evaluation(grid, finished=True))


def run_sweep(grid: Grid, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the jobs that are left; write `results.md` and `results.json` after each, and the report in the end.

    Args:
        grid: from `load_grid`.
        say: called with each line of progress.

    Returns:
        Content of `results.json`: `tables` (see `result_tables`), `runs` (see `run_records`), `failures` by run,
        `wall_s`.

    Raises:
        ConfigError: if the preparations of the arms fail.
    """
    from colm_ds.report import compare, load_run, result_tables, run_records

    started = time.monotonic()
    prepare(grid, say)
    jobs, out = jobs_of(grid), Path(grid.out)
    against = list(dict.fromkeys([grid.baseline, *grid.controls]))

    def finished(failures: dict[str, str]) -> dict[str, list[Run]]:
        done = [job for job in jobs if _name(job) not in failures and is_finished(job.folder)]
        runs = {arm: [load_run(job.folder) for job in done if job.arm == arm] for arm in grid.arms}
        return {arm: members for arm, members in runs.items() if members}

    def write(failures: dict[str, str]) -> dict[str, Any]:
        runs = finished(failures)
        tables, text = result_tables(runs, against)
        wall_s = time.monotonic() - started
        result = {"tables": tables, "runs": run_records(runs), "failures": failures, "wall_s": wall_s}
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        missing = [f"- {name}: {reason}\n" for name, reason in failures.items()]
        if missing:
            text += f"\nNot in these tables:\n\n{''.join(missing)}"
        (out / "results.md").write_text(text, encoding="utf-8")
        return result

    failures = run_jobs(grid, jobs, say, write)
    runs = finished(failures)
    if runs:
        compare(runs, out, against=against)
    return write(failures)


def prepare(grid: Grid, say: Callable[[str], None] = print) -> None:
    """Make what the arms need and is not there yet.

    Raises:
        ConfigError: if it could not be made.
    """
    for path, command in grid.prepare.items():
        _prepare(Path(path), command, say)


def check_arms(grid: Grid, *, needs_files: bool = True) -> None:
    """Check the recipe of every arm that has runs left, and the data that it names; no model is loaded.

    Args:
        grid: from `load_grid`.
        needs_files: whether data and packages must exist; else they may be made by `prepare` first.

    Raises:
        ConfigError: listing the problems of all arms, each with its arm and key.
    """
    if grid.script is not None:  # a script of one's own may read its arguments otherwise
        return
    left = {job.arm: job for job in jobs_of(grid) if not is_done(grid, job)}
    found: dict[str, list[str]] = {}
    checked: set[str] = set()
    for arm, job in left.items():
        for problem in _problems_of(job, _num_ranks(grid), needs_files, checked):
            found.setdefault(problem, []).append(arm)
    problems = Problems("the arms of the grid")
    for problem, arms in found.items():
        named = f"arm{'s' if len(arms) > 1 else ''} {', '.join(map(repr, arms))}"
        problems.messages.append(f"{'every arm' if len(arms) == len(left) > 1 else named}: {problem}")
    problems.raise_if_any()


def _problems_of(job: SweepJob, num_ranks: int, needs_files: bool, checked: set[str]) -> list[str]:
    """Return the problems of a job's recipe and data; data that an earlier job had is left out."""
    recipe, *changes = job.arguments
    try:
        read = load_recipe(recipe, changes, needs_files=needs_files)
        read.resolve(num_ranks)
        data = f"{getattr(read, 'data', None)!r} {read.colm.large_batch_size} {read.colm.target!r}"
        if needs_files and data not in checked:
            checked.add(data)
            check_data(read)
    except CoLMError as error:
        head, *lines = str(error).split("\n  ")
        return lines if re.match(r"\d+ problems? in ", head) and lines else ["\n  ".join([head, *lines])]
    return []


def _num_ranks(grid: Grid) -> int:
    """Return the ranks of a run."""
    if grid.launch.device_groups:
        return len(grid.launch.device_groups[0].split(","))
    return grid.launch.num_gpus or default_ranks()


def run_jobs(
    grid: Grid,
    jobs: Sequence[SweepJob],
    say: Callable[[str], None] = print,
    after_each: Callable[[dict[str, str]], Any] = lambda failures: None,
) -> dict[str, str]:
    """Run the jobs that are left; return the failures by run.

    Args:
        grid: grid with the settings for starting runs.
        jobs: the runs.
        say: called with each line of progress.
        after_each: called after every run, one at a time, with the failures so far.
    """
    failures = {_name(job): reason for job in jobs if (reason := _other_settings(job))}
    todo = [job for job in jobs if not is_done(grid, job) and _name(job) not in failures]
    say(f"{len(jobs)} runs, {len(jobs) - len(todo) - len(failures)} finished already")
    for name, reason in failures.items():
        say(f"{name}: {reason}")
    places = _places(grid)
    _command(grid, places[0], [])  # GPUs that cannot be named are said here, once
    free: Queue[Place] = Queue()
    for place in places:
        free.put(place)
    lock = threading.Lock()
    num_done = 0

    def work(job: SweepJob) -> None:
        nonlocal num_done
        if _stopping.is_set():
            return
        place = free.get()
        begun = time.monotonic()
        try:
            failure = _run(grid, job, place)
        finally:
            free.put(place)
        if failure == _STOPPED:  # by the same signal as this process, which its main thread may not have seen yet
            _stopping.wait(_SIGNAL_S)
        with lock:
            num_done += 1
            if failure:
                failures[_name(job)] = failure
            after_each(failures)
            spent = time.monotonic() - begun
            say(f"{num_done} of {len(todo)}: {_name(job)}: {failure or 'done'} ({spent:.0f} s)")

    with stopping_runs(), ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(work, todo))
    return failures


def _places(grid: Grid) -> list[Place]:
    groups: Sequence[str | None] = grid.launch.device_groups or [None] * grid.launch.parallel
    num_threads = max(1, usable_cores() // (len(groups) * _num_ranks(grid)))
    return [Place(number, devices, num_threads) for number, devices in enumerate(groups)]


def _prepare(path: Path, command: str, say: Callable[[str], None]) -> None:
    """Run a Python command unless its result exists: a file, or the folder of a finished run."""
    if is_finished(path) or (path.exists() and not (path / METRICS).exists()):
        return
    say(f"making {path}")
    log = path.with_name(f"{path.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with stopping_runs():
        code = _call([sys.executable, *shlex.split(command)], log, usable_cores())
    if code or not path.exists():
        raise ConfigError(f"prepare: {path} was not made. {_what_failed(code, log)}")


def _other_settings(job: SweepJob) -> str:
    """Return why the finished run in a job's folder is not this job's; empty if it is, or there is none."""
    asked = read_object(job.record)
    if not is_finished(job.folder) or not asked or asked == _asked(job):
        return ""
    return f"{job.folder} holds a run with other settings. Remove it, or give the grid another folder."


def _asked(job: SweepJob) -> dict[str, Any]:
    """Return the definition of a job: its recipe's content and its changes."""
    recipe, *changes = job.arguments
    return {"recipe": read_values(Path(recipe)), "changes": changes}


def _evaluation(grid: Grid, *, finished: bool) -> dict[str, Any]:
    """Return the record of an evaluation of a grid's run."""
    return {"options": shlex.split(grid.evaluate or ""), "finished": finished}


def _run(grid: Grid, job: SweepJob, place: Place) -> str:
    """Start one run and wait; return its error, empty if there was none."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_text("", encoding="utf-8")
    if not is_finished(job.folder):
        job.record.write_text(json.dumps(_asked(job), indent=2, default=str) + "\n", encoding="utf-8")
        arguments = job.arguments if grid.script else ["train", *job.arguments]
        code = _call(_command(grid, place, arguments, grid.script), job.log, place.num_threads)
        if code or not is_finished(job.folder):
            return _what_failed(code, job.log)
    if grid.evaluate is not None:
        record = _evaluation(grid, finished=False)
        write_object(job.evaluation_record, record)
        command = _command(grid, place, ["evaluate", str(job.folder), *record["options"]])
        code = _call(command, job.log, place.num_threads)
        if code or not (job.folder / EVALUATION / RESULTS).exists():
            return f"evaluation {_what_failed(code, job.log)}"
        write_object(job.evaluation_record, _evaluation(grid, finished=True))
    return ""


def _command(grid: Grid, place: Place, arguments: Sequence[str], script: str | None = None) -> list[str]:
    """Return the command of a run at its place."""
    return ranks_command(
        arguments,
        grid.launch.num_gpus or default_ranks(),
        port=grid.launch.master_port + place.number,
        devices=place.devices,
        script=script,
    )


_started: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()  # a signal has asked this process to stop
_SIGNAL_S = 2.0  # seconds that the main thread may take to see a signal, on a busy machine
_STOPPED = "stopped; the same command resumes it"


@contextmanager
def stopping_runs() -> Iterator[None]:
    """Let SIGTERM stop the runs under way after their step, with a checkpoint, and then raise KeyboardInterrupt.

    SIGINT from a terminal reaches them anyway. After either no further run begins.
    """

    def stop(number: int, _: object) -> None:
        _stopping.set()
        for process in list(_started) if number == signal.SIGTERM else ():
            process.terminate()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in a shell's background
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stopping.clear()  # a later call in this process begins its runs


def _call(command: Sequence[str], log: Path, num_threads: int) -> int:
    """Run a command with a number of threads at most, append its output to a log, and return its exit code."""
    threads = min(num_threads, int(os.environ.get("OMP_NUM_THREADS") or num_threads))
    environment = os.environ | accelerator_environment() | {"OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a", encoding="utf-8") as output:
        return call_and_wait(command, environment, output)


def call_and_wait(command: Sequence[str], environment: Mapping[str, str], output: IO[str] | None = None) -> int:
    """Run a command, within `stopping_runs`, and return its exit code.

    Where KeyboardInterrupt comes meanwhile, the command has time to finish its step and to save; `subprocess.run` would
    kill it after a quarter of a second.

    Args:
        command: program and arguments.
        environment: all variables.
        output: file for what it prints; None: this process's own output.

    Raises:
        KeyboardInterrupt: once the command has ended, or at once if it comes a second time.
    """
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    _started.add(process)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        _started.discard(process)


def _what_failed(code: int, log: Path) -> str:
    if code == ExitCode.STOPPED:
        return _STOPPED
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if "Error" in line]
    return f"failed with exit code {code}: {lines[0].strip() if lines else 'no message'} (see {log})"


def default_ranks() -> int:
    """Return the default number of ranks of a run: one per GPU, two without any."""
    import torch

    return torch.cuda.device_count() or min(2, usable_cores())


def _name(job: SweepJob) -> str:
    return f"{job.arm}, seed {job.seed}"
