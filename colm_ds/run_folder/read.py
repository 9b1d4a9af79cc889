"""What one run left in its output folder, read so that a missing or half-written file never stops a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colm_ds.errors import DataError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"

_OUR_KEYS = ("colm", "recipe", "small_sources", "git_revision", "num_trainable", "command")
_STEP_START = '{"step"'


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
        """Whether the run wrote its summary and calls itself finished."""
        return self.summary.get("status") == "finished"

    @property
    def seed(self) -> int | None:
        """Seed of the run."""
        found = number(self.config.get("seed"))
        found = found if found is not None else number(lookup(self.config, "colm", "seed"))
        return None if found is None else int(found)


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
    config = _read_object(folder / CONFIG, problems)
    steps, heldout = _read_metrics(folder / METRICS, problems)
    if not (folder / METRICS).is_file() and not any(key in config for key in _OUR_KEYS):
        raise DataError(_not_a_run(folder))
    summary = _read_object(folder / SUMMARY, problems)
    name = config.get("name")
    name = str(name) if isinstance(name, (str, int)) and str(name).strip() else folder.resolve().name
    return Run(folder, name, config, steps, heldout, summary, problems)


def lookup(values: Any, *keys: str) -> Any:
    """Value below nested keys; None where one is missing or not a mapping."""
    for key in keys:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond the range of a float
        return None


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers; nothing if it is no mapping."""
    if not isinstance(values, Mapping):
        return {}
    found = {str(key): number(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def names(values: Any) -> list[str]:
    """The entries of a list as text; nothing if it is no list."""
    return [str(value) for value in values] if isinstance(values, (list, tuple)) else []


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, OSError, RecursionError):
        problems.append(f"{path.name} can not be read as JSON.")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not one JSON object.")
        return {}
    return found


def _read_metrics(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    if not path.is_file():
        return [], {}
    by_step: dict[int, dict[str, Any]] = {}
    num_broken = num_nonfinite = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            found = _parse_line(line)
            step = number(found.get("step")) if found else None
            if found is None or step is None or step < 0:
                num_broken += 1
            else:
                by_step[int(step)] = found
    steps = [by_step[step] for step in sorted(by_step) if step > 0]
    heldout = {step: by_step[step]["heldout"] for step in sorted(by_step) if lookup(by_step[step], "heldout")}
    heldout = {step: found for step, found in heldout.items() if isinstance(found, dict)}
    for found in steps:
        loss = found.get("loss")
        num_nonfinite += isinstance(loss, float) and not math.isfinite(loss)
    if num_broken:
        problems.append(f"{num_broken} line{'s' * (num_broken > 1)} of {path.name} could not be read.")
    if num_nonfinite:
        problems.append(f"The training loss was not finite in {num_nonfinite} step{'s' * (num_nonfinite > 1)}.")
    return steps, heldout


def _parse_line(line: str) -> dict[str, Any] | None:
    """The object of a line; if a killed run left half an object before it, the last whole one."""
    start = 0
    while start >= 0:
        try:
            found = json.loads(line[start:])
        except (ValueError, RecursionError):
            start = line.find(_STEP_START, start + 1)
        else:
            return found if isinstance(found, dict) else None
    return None


def _not_a_run(folder: Path) -> str:
    held = f"no {METRICS}"
    held += f" and a {CONFIG} that is not a run's" if (folder / CONFIG).is_file() else f" and no {CONFIG}"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{METRICS}"))
    advice = f"These folders in it are runs: {', '.join(inside)}." if inside else "Give the output folder of a run."
    return f"{folder}: not the output of a run: {held}. {advice}"
