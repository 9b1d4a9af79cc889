"""What a run leaves in its folder: config.json, metrics.jsonl, summary.json; whole files or none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError
from colm_ds.run_folder.contents import own_entries, remove_own


class RunFolder:
    """Writes one run's files; made on rank 0 only.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resumed_step: int | None = None) -> None:
        """Make the folder, or open that of a run which goes on.

        Args:
            path: where.
            overwrite: replace a run that is there; files that no run writes stay.
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
                remove_own(self.path)
            elif own := own_entries(self.path):
                if not overwrite or not (self.path / "config.json").exists():
                    raise no_run_of(own)
                remove_own(self.path)
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


def no_run_of(own: Sequence[Path]) -> ConfigError:
    """Return the error for what only runs write, in a folder without a run."""
    held = ", ".join(entry.name for entry in own)
    return ConfigError(
        f"output_dir = {own[0].parent}: holds {held} and no metrics.jsonl of a run, so that nobody knows whose they "
        "are. Move them away, or choose another output_dir."
    )


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
