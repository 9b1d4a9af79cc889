"""Write a run's folder: config.json, metrics.jsonl, summary.json; whole files or none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError
from colm_ds.run_folder.contents import CONFIG, METRICS, SUMMARY, own_entries, remove_own
from colm_ds.run_folder.files import replacing, write_object
from colm_ds.run_folder.metrics import with_computed
from colm_ds.run_folder.read import read_metrics


class RunFolder:
    """Write one run's files; made on rank 0 only.

    Attributes:
        path: the folder.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        resumed_step: int | None = None,
        resumed_from: Path | None = None,
    ) -> None:
        """Make the folder, or open that of a run that is resumed.

        Args:
            path: where.
            overwrite: replace a run that is there; files that no run writes stay.
            resumed_step: the run is resumed after this step; what was logged of later ones is dropped.
            resumed_from: folder of the run whose checkpoint was taken; where it is another one, what that logged up to
                the step is taken over, so that curves, totals and clocks are of the whole course.

        Raises:
            ConfigError: if a run exists there that is neither resumed nor replaced, or the folder cannot be written.
        """
        self.path = Path(path)
        metrics = self.path / METRICS
        try:
            if resumed_step is not None:
                _keep_up_to(metrics, resumed_step, self.path if resumed_from is None else resumed_from)
                (self.path / SUMMARY).unlink(missing_ok=True)  # it was written when the run stopped
            elif metrics.exists():
                if not overwrite:
                    raise ConfigError(
                        f"output_dir = {path}: holds a run already. Choose another, or overwrite=true to start over."
                    )
                remove_own(self.path)
            elif own := own_entries(self.path):
                if not overwrite or not (self.path / CONFIG).exists():
                    raise no_run_of(own)
                remove_own(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._metrics = metrics.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir = {path}: cannot be written: {error.strerror}.") from None

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write config.json in one go."""
        write_object(self.path / CONFIG, content)

    def write_summary(self, content: Mapping[str, Any]) -> None:
        """Write summary.json in one go."""
        write_object(self.path / SUMMARY, content)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one entry to metrics.jsonl, with the metrics that are computed; it is in the file at return.

        Raises:
            OSError: naming the file.
        """
        try:
            self._metrics.write(json.dumps(with_computed(entry)) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / METRICS)) from None

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


def _keep_up_to(metrics: Path, step: int, begun: Path) -> None:
    """Keep the entries up to a step of the run in the folder where it began, whole file or none."""
    with replacing(metrics) as file:
        file.writelines(json.dumps(entry) + "\n" for entry in read_metrics(begun / METRICS) if entry["step"] <= step)
