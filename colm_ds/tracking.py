"""What a run leaves in its folder: config.json, metrics.jsonl, summary.json; whole files or none."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colm_ds.errors import ConfigError
from colm_ds.types import StepStats

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy")


class RunFolder:
    """Writes one run's files; made on rank 0 only.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Make the folder.

        Args:
            path: where.
            overwrite: replace a run that is there.

        Raises:
            ConfigError: if a run is there and `overwrite` is False, or the folder can not be written.
        """
        self.path = Path(path)
        try:
            if (self.path / "metrics.jsonl").exists():
                if not overwrite:
                    raise ConfigError(f"output_dir = {path}: holds a run already. Choose another, or overwrite=true.")
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir = {path}: can not be written: {error.strerror}.") from None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file in one go."""
        target = self.path / name
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, target)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl; it is on disk when the call returns."""
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._metrics.close()


def describe_environment() -> dict[str, Any]:
    """Command, date, versions, machine and git revision."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "git_revision": _git_revision(),
    }


def summarise(stats: Sequence[StepStats], peaks_gib: Mapping[str, float]) -> dict[str, Any]:
    """Totals and medians over the steps of a run.

    Args:
        stats: one per step; the first is left out of times, as it warms up.
        peaks_gib: largest peak of each phase over steps and ranks.
    """
    timed = stats[1:] if len(stats) > 1 else stats
    totals = [step.time_s["total"] for step in timed]
    phases = sorted({name for step in timed for name in step.time_s})
    return {
        "steps": stats[-1].step,
        "loss": float(np.mean([step.loss for step in stats[-10:]])),
        "step_s": {
            "median": float(np.median(totals)),
            "p10": float(np.percentile(totals, 10)),
            "p90": float(np.percentile(totals, 90)),
        },
        "phase_s": {name: float(np.median([step.time_s.get(name, 0.0) for step in timed])) for name in phases},
        "peak_memory_gib": dict(peaks_gib),
        "examples_trained": sum(step.examples_trained for step in stats),
        "examples_probed": sum(step.examples_probed for step in stats),
        "tokens_trained": sum(step.tokens for step in stats),
        "padding_fraction": float(np.mean([step.padding_fraction for step in stats])),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
