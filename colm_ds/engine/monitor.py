"""Send a run's numbers to TensorBoard, Weights & Biases, Comet and CSV by DeepSpeed's monitor; off by default."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colm_ds.config.deepspeed import MONITOR_SECTIONS
from colm_ds.distributed.agreement import first_failure
from colm_ds.errors import ConfigError
from colm_ds.run_folder.files import replacing
from colm_ds.run_folder.metrics import Event


class RunMonitor:
    """DeepSpeed's monitors of a run, opened by rank 0 when the first step begins; a resumed run continues in them.

    One that fails later is dropped with a message: a full disk or a lost connection does not end training.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Note which monitors are enabled; nothing is written.

        Args:
            config: the DeepSpeed configuration.
        """
        sections = {name: config[name] for name in MONITOR_SECTIONS if name in config}
        self._sections = sections if any(section.get("enabled") for section in sections.values()) else {}
        self._master: Any = None
        self._is_open = False
        self._samples: int | None = None

    @property
    def enabled(self) -> bool:
        """Return whether any monitor is enabled."""
        return bool(self._sections)

    def resume(self, samples: int) -> None:
        """Continue after so many examples: later events are removed when the first step begins."""
        self._samples, self._is_open = samples, False

    def open(self) -> None:
        """Open the enabled monitors if they are not open yet; all ranks together.

        Raises:
            ConfigError: on every rank, if rank 0 cannot open one of them.
        """
        if self._is_open or not self.enabled:
            return
        self._is_open = True
        message = None
        if dist.get_rank() == 0:
            try:
                self._master = _open(self._sections, self._samples)
            except Exception as error:  # trackers raise what they like; all of it means that they cannot be opened
                message = f"{type(error).__name__}: {error}"
        message = first_failure(message)
        if message:
            on = ", ".join(name for name, section in self._sections.items() if section.get("enabled"))
            raise ConfigError(f"{on}: cannot be opened ({message}). Fix that, or set enabled to false.")

    def write_events(self, events: Sequence[Event]) -> None:
        """Write events, as DeepSpeed's monitor does: on rank 0, at once."""
        if self._master is None or not events:
            return
        try:
            self._master.write_events(list(events))
        except Exception as error:  # a tracker's trouble is not worth a run
            self._master = None
            print(f"monitor: {type(error).__name__}: {error}. Training continues without it.", file=sys.stderr)


def _open(sections: Mapping[str, Any], samples: int | None) -> Any:
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    master = MonitorMaster(get_monitor_config(dict(sections)))
    if samples is None:
        return master
    if master.csv_monitor is not None:
        files = [file for file in sorted(Path(master.csv_monitor.log_dir).glob("*.csv")) if _keep_up_to(file, samples)]
        master.csv_monitor.filenames += [file.name.removesuffix(".csv") for file in files]  # they have their headings
    if master.tb_monitor is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer = master.tb_monitor.summary_writer
        writer.close()
        master.tb_monitor.summary_writer = SummaryWriter(writer.log_dir, purge_step=samples + 1)
    return master


def _keep_up_to(path: Path, samples: int) -> bool:
    """Drop a CSV file's rows of later examples, whole file or none.

    Returns:
        Whether it has a heading. A full disk or a crash may have left it empty or all zeros; then it is removed.
    """
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        entries = [entry for entry in csv.reader(line.replace("\0", "") for line in lines) if entry]
    if not entries:
        path.unlink()
        return False
    heading, *rows = entries
    kept = [row for row in rows if len(row) == 2 and row[0].isdigit() and int(row[0]) <= samples]
    with replacing(path) as lines:
        csv.writer(lines).writerows([heading, *kept])
    return True
