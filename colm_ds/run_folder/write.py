"""What a run leaves in its folder: config.json, metrics.jsonl, summary.json; whole files or none."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colm_ds.errors import ConfigError
from colm_ds.run_folder.coherence import coherence_summary

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy")


class RunFolder:
    """Writes one run's files; made on rank 0 only.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resumed_step: int | None = None) -> None:
        """Make the folder, or open that of a run which goes on.

        Args:
            path: where.
            overwrite: replace a run that is there.
            resumed_step: the run goes on after this step; what was logged of later ones is dropped.

        Raises:
            ConfigError: if a run is there that neither goes on nor is replaced, or the folder can not be written.
        """
        self.path = Path(path)
        metrics = self.path / "metrics.jsonl"
        try:
            if resumed_step is not None:
                _keep_up_to(metrics, resumed_step)
                (self.path / "summary.json").unlink(missing_ok=True)  # it was written when the run stopped
            elif metrics.exists():
                if not overwrite:
                    raise ConfigError(
                        f"output_dir = {path}: holds a run already. Choose another, or overwrite=true to start anew."
                    )
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._metrics = metrics.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir = {path}: can not be written: {error.strerror}.") from None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file in one go."""
        target = self.path / name
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, target)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl; it is in the file when the call returns.

        Raises:
            OSError: naming the file.
        """
        try:
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / "metrics.jsonl")) from None

    def sync(self) -> None:
        """Let metrics.jsonl survive a crash of the machine."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._metrics.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole entries of a metrics.jsonl, in order; what a kill cut off is left out.

    Args:
        path: the file; none if it is missing.
    """
    entries = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    entries.append(entry)
    return entries


def _keep_up_to(metrics: Path, step: int) -> None:
    """Drop entries of later steps, whole file or none."""
    entries = [entry for entry in read_metrics(metrics) if entry["step"] <= step]
    temporary = metrics.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(temporary, metrics)


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


def summarise(
    entries: Sequence[Mapping[str, Any]], peaks_gib: Mapping[str, float], small: Collection[str] = ()
) -> dict[str, Any]:
    """Totals and medians over the steps of a run.

    Args:
        entries: `StepStats` as dictionaries, one per step; times leave out the first, which warms up, and those whose
            allocations or variances were measured.
        peaks_gib: largest peak of each phase over steps and ranks.
        small: names of the sources that are kept whole.
    """
    timed = [
        entry for entry in entries[1:] if not entry.get("counted_gib") and not _measures_variance(entry)
    ] or entries
    totals = [entry["time_s"]["total"] for entry in timed]
    phases = sorted({name for entry in timed for name in entry["time_s"]})
    return {
        "steps": entries[-1]["step"],
        "loss": float(np.mean([entry["loss"] for entry in entries[-10:]])),
        "step_s": {
            "median": float(np.median(totals)),
            "p10": float(np.percentile(totals, 10)),
            "p90": float(np.percentile(totals, 90)),
        },
        "phase_s": {name: float(np.median([entry["time_s"].get(name, 0.0) for entry in timed])) for name in phases},
        "data_loading_share": sum(entry["time_s"].get("data", 0.0) for entry in timed) / sum(totals),
        "peak_memory_gib": dict(peaks_gib),
        "examples_trained": sum(entry["examples_trained"] for entry in entries),
        "examples_probed": sum(entry["examples_probed"] for entry in entries),
        "tokens_trained": sum(entry["tokens"] for entry in entries),
        "padding_fraction": float(np.mean([entry["padding_fraction"] for entry in entries])),
        "skipped_steps": sum(bool(entry.get("skipped")) for entry in entries),
        "nonfinite_examples": sum(entry["coreset"].get("nonfinite", 0) for entry in entries),
        "coherence": coherence_summary(entries, small),
        **_means(entries, "label_tokens"),
        **_means(entries, "gradient_variance"),
    }


def _measures_variance(entry: Mapping[str, Any]) -> bool:
    return bool(entry["coreset"].get("gradient_variance"))


def _means(entries: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Means of a pair of numbers of the coreset over the steps that have it; nothing if none has."""
    found = [entry["coreset"][key] for entry in entries if entry["coreset"].get(key)]
    return {key: {name: float(np.mean([each[name] for each in found])) for name in found[0]}} if found else {}


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
