"""Read what one run left in its output folder; a missing or half-written file never stops a reader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError, DataError
from colm_ds.run_folder.contents import CONFIG, FINISHED, METRICS, SUMMARY
from colm_ds.run_folder.files import read_object
from colm_ds.untrusted.json_text import parse_json
from colm_ds.untrusted.lines import bounded_lines

_OUR_KEYS = ("colm", "recipe", "small_sources", "git_revision", "num_trainable", "command")
_STEP_START = '{"step"'
_MOST_HALVES = 32
"""Entries that kills left half-written in one line; more than that is no line of ours."""


@dataclass(frozen=True)
class Run:
    """One run, as far as its files tell.

    Attributes:
        folder: output folder of the run.
        name: its name; the folder's name if the configuration has none.
        config: `config.json`, empty if there is none.
        steps: objects of `metrics.jsonl` with step 1 or more, ascending; of repeated steps the last.
        heldout: the `heldout` object of every step that has one, ascending; step 0 is before training.
        summary: `summary.json`, empty while the run is not finished.
        problems: what was wrong with the files, one sentence each.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    heldout: dict[int, dict[str, Any]]
    summary: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Return whether the run wrote its summary and calls itself finished."""
        return self.summary.get("status") == FINISHED

    @property
    def seed(self) -> int | None:
        """Seed of the run."""
        seed = number(self.config.get("seed"))
        seed = seed if seed is not None else number(lookup(self.config, "colm", "seed"))
        return None if seed is None else int(seed)


def load_run(folder: str | Path) -> Run:
    """Read a run's output folder.

    Args:
        folder: holds any of `config.json`, `metrics.jsonl` and `summary.json`; the first two make it a run.

    Raises:
        DataError: if the folder is not the output of a run; the message names what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {what}. Give the output folder of a run, which holds {CONFIG} and {METRICS}.")
    problems: list[str] = []
    config = read_object(folder / CONFIG, problems)
    steps, heldout = _steps_and_heldout(folder / METRICS, problems)
    if not (folder / METRICS).is_file() and not any(key in config for key in _OUR_KEYS):
        raise DataError(_not_a_run(folder))
    summary = read_object(folder / SUMMARY, problems)
    name = config.get("name")
    name = str(name) if isinstance(name, (str, int)) and str(name).strip() else folder.resolve().name
    return Run(folder, name, config, steps, heldout, summary, problems)


def status_of(folder: str | Path) -> str:
    """Return the `status` of a run's summary; empty while the run has not ended, and where there is no run."""
    return str(read_object(Path(folder) / SUMMARY).get("status") or "")


def is_finished(folder: str | Path) -> bool:
    """Return whether a folder holds a finished run."""
    return status_of(folder) == FINISHED


def check_not_finished(folder: str | Path) -> None:
    """Refuse to train in the folder of a finished run.

    Args:
        folder: the recipe's `output_dir`, which may be missing.

    Raises:
        ConfigError: if it holds one.
    """
    if is_finished(folder):
        raise ConfigError(
            f"output_dir = {folder}: holds a finished run. Choose another, or overwrite=true to start over."
        )


def read_metrics(path: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the entries of a metrics.jsonl by ascending step, of repeated steps the last; empty if it is missing.

    Args:
        path: the file.
        problems: gets a sentence if there are lines that cannot be read, as a kill leaves them.
    """
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    num_broken = 0
    with path.open("rb") as file:
        for line in bounded_lines(file):
            entry = None if line is None else parse_entry(line.decode("utf-8", errors="replace"))
            if entry is not None:
                by_step[entry["step"]] = entry
            else:
                num_broken += line is None or bool(line.strip())
    if num_broken and problems is not None:
        problems.append(f"{num_broken} line{'s' * (num_broken > 1)} of {path.name} could not be read.")
    return [by_step[step] for step in sorted(by_step)]


def parse_entry(line: str) -> dict[str, Any] | None:
    """Return the entry in a line of metrics.jsonl; None if there is none.

    A killed run may leave half an entry without a line's end, and the resumed one writes behind it: then the last whole
    entry counts.

    Returns:
        An object whose `step` is an integer of 0 or more.
    """
    start = 0
    for _ in range(_MOST_HALVES):
        if start < 0:
            break
        try:
            entry = parse_json(line[start:])
        except ValueError:
            start = line.find(_STEP_START, start + 1)
            continue
        step = number(entry.get("step")) if isinstance(entry, dict) else None
        return None if step is None or step < 0 else {**entry, "step": int(step)}
    return None


def lookup(values: Any, *keys: str) -> Any:
    """Return the value below nested keys; None where one is missing or not a mapping."""
    for key in keys:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond the range of a float
        return None


def numbers(values: Any) -> dict[str, float]:
    """Return the entries of a mapping that are finite numbers; nothing if it is no mapping."""
    if not isinstance(values, Mapping):
        return {}
    checked = {str(key): number(value) for key, value in values.items()}
    return {key: value for key, value in checked.items() if value is not None}


def names(values: Any) -> list[str]:
    """Return the entries of a list as text; nothing if it is no list."""
    return [str(value) for value in values] if isinstance(values, (list, tuple)) else []


def _steps_and_heldout(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    entries = read_metrics(path, problems)
    steps = [entry for entry in entries if entry["step"] > 0]
    heldout = {entry["step"]: entry["heldout"] for entry in entries if isinstance(entry.get("heldout"), dict)}
    losses = [entry.get("loss") for entry in steps]
    num_nonfinite = sum(isinstance(loss, float) and not math.isfinite(loss) for loss in losses)
    if num_nonfinite:
        problems.append(f"The training loss was not finite in {num_nonfinite} step{'s' * (num_nonfinite > 1)}.")
    nonfinite = [step for step, losses in heldout.items() if "overall" in losses and number(losses["overall"]) is None]
    if nonfinite:
        at = ", ".join(map(str, nonfinite[:5])) + ", ..." * (len(nonfinite) > 5)
        problems.append(f"The held-out loss was not finite at step{'s' * (len(nonfinite) > 1)} {at}.")
    return steps, {step: losses for step, losses in heldout.items() if losses}


def _not_a_run(folder: Path) -> str:
    held = f"no {METRICS}"
    held += f" and a {CONFIG} that is not a run's" if (folder / CONFIG).is_file() else f" and no {CONFIG}"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{METRICS}"))
    advice = f"These folders in it are runs: {', '.join(inside)}." if inside else "Give the output folder of a run."
    return f"{folder}: not the output of a run: {held}. {advice}"
