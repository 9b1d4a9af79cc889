"""A run's numbers in TensorBoard, Weights & Biases, Comet and CSV, through DeepSpeed's monitor; off by default."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colm_ds.config.deepspeed import MONITOR_SECTIONS
from colm_ds.distributed.agreement import first_failure
from colm_ds.errors import ConfigError
from colm_ds.types import StepStats

Event = tuple[str, float, int]
"""Name, value, and examples trained on until then: what DeepSpeed's monitors take."""


def step_events(stats: StepStats) -> list[Event]:
    """What one optimizer step has to tell, over the examples trained on so far.

    `Train/Samples/lr` and `Train/Samples/train_loss` are DeepSpeed's own names. Shares are of the coreset.
    """
    numbers: dict[str, Any] = {
        "Train/Samples/train_loss": stats.loss,
        "Train/Samples/lr": stats.lr,
        "Train/Samples/grad_norm": stats.grad_norm,
        "Train/Samples/step": stats.step,
        "Train/tokens": stats.tokens,
        "Train/examples_probed": stats.examples_probed,
        "Train/examples_trained": stats.examples_trained,
        "Train/padding_fraction": stats.padding_fraction,
        "Train/micro_batches": stats.micro_batches["count"],
        "Train/skipped": int(stats.skipped),
    }
    numbers |= {f"Data/{name}": value for name, value in stats.data_use.items()}
    numbers |= {f"Time/{phase}_s": seconds for phase, seconds in stats.time_s.items()}
    numbers |= {f"Memory/{phase}_gib": peak for phase, peak in stats.memory_gib.items()}
    numbers |= {f"MemoryParts/{part}_gib": size for part, size in stats.memory_parts_gib.items()}
    coreset = stats.coreset
    numbers["Coreset/kept_small"] = coreset.get("kept_small")
    counts = coreset.get("per_source", {})
    total = max(1, sum(counts.values()))
    numbers |= {f"Share/{_flat(name)}": count / total for name, count in counts.items()}
    numbers |= {f"Coherence/{_flat(name)}": value for name, value in coreset.get("coherence", {}).items()}
    numbers |= {f"Loss/{_flat(name)}": value for name, value in coreset.get("loss", {}).items()}
    for kind in ("label_tokens", "gradient_variance"):
        numbers |= {f"Coreset/{kind}_{name}": value for name, value in coreset.get(kind, {}).items()}
    return _events(numbers, stats.samples)


def heldout_events(heldout: Mapping[str, Any], samples: int) -> list[Event]:
    """Held-out losses: overall, macro and of every source; accuracy of classification.

    Args:
        heldout: from `heldout_loss`.
        samples: examples trained on until then.
    """
    numbers = {f"Heldout/{key}": heldout.get(key) for key in ("overall", "macro", "accuracy")}
    numbers |= {f"Heldout/{_flat(name)}": loss for name, loss in heldout.get("per_source", {}).items()}
    return _events(numbers, samples)


class RunMonitor:
    """DeepSpeed's monitors of a run, opened by rank 0 when the first step begins; a resumed run goes on in them.

    One that fails later on is given up with a message: a full disk or a lost connection does not end training.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Take note of what is switched on; nothing is written.

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
        """Whether anything is switched on."""
        return bool(self._sections)

    def resume(self, samples: int) -> None:
        """Go on after so many examples: what was written of later ones is taken back when the first step begins."""
        self._samples, self._is_open = samples, False

    def open(self) -> None:
        """Open what is switched on, if that is still to be done; all ranks together.

        Raises:
            ConfigError: on every rank, if rank 0 can not open one of them.
        """
        if self._is_open or not self.enabled:
            return
        self._is_open = True
        message = None
        if dist.get_rank() == 0:
            try:
                self._master = _open(self._sections, self._samples)
            except Exception as error:  # trackers raise what they like; all of it means that they can not be opened
                message = f"{type(error).__name__}: {error}"
        message = first_failure(message)
        if message:
            on = ", ".join(name for name, section in self._sections.items() if section.get("enabled"))
            raise ConfigError(f"{on}: can not be opened ({message}). Mend that, or set enabled to false.")

    def write_events(self, events: Sequence[Event]) -> None:
        """Write events, as DeepSpeed's monitor does: on rank 0, at once."""
        if self._master is None or not events:
            return
        try:
            self._master.write_events(list(events))
        except Exception as error:  # a tracker's trouble is not worth a run
            self._master = None
            print(f"monitor: {type(error).__name__}: {error}. Training goes on without it.", file=sys.stderr)


def _open(sections: Mapping[str, Any], samples: int | None) -> Any:
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    master = MonitorMaster(get_monitor_config(dict(sections)))
    if samples is None:
        return master
    if master.csv_monitor is not None:
        files = sorted(Path(master.csv_monitor.log_dir).glob("*.csv"))
        for file in files:
            _keep_up_to(file, samples)
        master.csv_monitor.filenames += [file.name.removesuffix(".csv") for file in files]  # they have their headings
    if master.tb_monitor is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer = master.tb_monitor.summary_writer
        writer.close()
        master.tb_monitor.summary_writer = SummaryWriter(writer.log_dir, purge_step=samples + 1)
    return master


def _keep_up_to(path: Path, samples: int) -> None:
    """Drop a CSV file's rows of later examples, whole file or none."""
    with path.open(encoding="utf-8", newline="") as lines:
        heading, *rows = csv.reader(lines)
    kept = [row for row in rows if len(row) == 2 and row[0].isdigit() and int(row[0]) <= samples]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([heading, *kept])
    os.replace(temporary, path)


def _events(numbers: Mapping[str, Any], samples: int) -> list[Event]:
    return [(name, float(value), samples) for name, value in numbers.items() if isinstance(value, (int, float))]


def _flat(name: str) -> str:
    """A source's name as one part of an event's: CSV makes a file of it."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name)[:100]
