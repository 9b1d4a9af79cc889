"""Rows of a part: which exist, which still fit the time, and the file that every row is written to at once."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from colm_ds.run_folder.environment import describe_environment

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results" / "gpu"
"""Results that are kept with the project."""

WORK = ROOT / "runs" / "gpu_work"
"""Folder kept as long as the machine: weights, token caches, checkpoints, compiled kernels."""

PACK = ROOT / ".gpu_pack"
"""Data that `pack.sh` gathers by default."""

PEAK_FLOPS = 989e12
"""Dense bf16 operations a second of an H100 (SXM), by its data sheet; an H200 has the same."""

GIB = 2**30


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every part has.

    Args:
        text: the part's docstring.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"), help="folder")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder whose rows are not measured again")
    parser.add_argument("--seconds", type=float, default=110.0, help="leave rows that would end later (110)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU: does every line run?")
    return parser


class Part:
    """One part's result file.

    A row is known by its key, the device and whether it is of a dry run; rows of other devices stay beside it.

    Attributes:
        name: name of the part and its file.
        dry: whether sizes are tiny.
        device: device of the models.
        rows: of this call's file.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        """Read existing rows."""
        self._start = time.monotonic()
        self.name, self.dry = name, bool(options.dry)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.dry else "cpu")
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self._seconds = options.seconds
        self._path: Path = options.out / f"{'dry_' if self.dry else ''}{name}.json"
        self.rows: list[dict[str, Any]] = read_rows(self._path)
        # Rows of an earlier call on this machine may not have been collected yet.
        self._copy = None if self.dry else WORK / "results" / self._path.name
        copied = [] if self._copy is None else read_rows(self._copy)
        self._known = [*self.rows, *copied, *read_rows(options.kept / self._path.name)]
        self._failed: dict[str, str] = {}
        self._left: list[str] = []
        self._notes: list[str] = []
        self._environment = describe_environment()

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._seconds - (time.monotonic() - self._start)

    def known(self, key: str) -> dict[str, Any] | None:
        """Return the row of a key that this device measured, here or in a kept file; None if there is none."""
        rows = [row for row in self._known if row["key"] == key and row["device"] == self.device_name]
        return rows[0] if rows else None

    def wanted(self, key: str, estimate_s: float = 0.0) -> bool:
        """Decide whether to measure a row: it does not exist yet, and fits the time."""
        if self.known(key) is not None:
            return False
        if estimate_s > self.left_s:
            self._left.append(key)
            print(
                f"{self.name}: {key}: left for the next call ({estimate_s:.0f} s, {self.left_s:.0f} left)", flush=True
            )
            return False
        return True

    def note(self, text: str) -> None:
        """Record why something is missing from the rows."""
        self._notes.append(text)
        print(f"{self.name}: {text}", flush=True)
        self._write()

    def add(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add a row, replacing an older one of its key, and write the file."""
        whole = {
            "key": key,
            "device": self.device_name,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **row,
        }
        for rows in (self.rows, self._known):
            rows[:] = [one for one in rows if (one["key"], one["device"]) != (key, self.device_name)]
            rows.append(whole)
        self._failed.pop(key, None)
        self._write()
        return whole

    def measure(
        self, key: str, work: Callable[[], Mapping[str, Any]], estimate_s: float = 0.0
    ) -> dict[str, Any] | None:
        """Measure a row if it is wanted; on failure record the error and continue with the next row.

        Args:
            key: key of the row.
            work: measures it.
            estimate_s: seconds that it is likely to take.

        Returns:
            The row, if it was measured in this call.
        """
        if not self.wanted(key, estimate_s):
            return None
        start = time.monotonic()
        try:
            row = self.add(key, work())
        except Exception as error:  # whatever it is, the other rows are worth having
            self.failed(key, error)
            return None
        finally:
            release(self.device)
        print(f"{self.name}: {key}: {time.monotonic() - start:.1f} s", flush=True)
        return row

    def failed(self, key: str, error: BaseException) -> None:
        """Record that a row could not be measured."""
        self._failed[key] = "".join(traceback.format_exception(error)[-6:])[-3000:]
        print(f"{self.name}: {key}: {type(error).__name__}: {str(error)[:500]}", flush=True)
        if self.dry:
            traceback.print_exception(error)
        self._write()

    def close(self) -> int:
        """Write the file a last time; return 1 if a row failed."""
        self._write()
        print(f"{self.name}: {len(self.rows)} rows, {len(self._failed)} failed, {len(self._left)} left", flush=True)
        return 1 if self._failed else 0

    def _write(self) -> None:
        content = {
            "part": self.name,
            "dry": self.dry,
            **self._environment,
            "device": self.device_name,
            "peak_flops": PEAK_FLOPS,
            "wall_s": round(time.monotonic() - self._start, 1),
            "rows": self.rows,
            "failed": self._failed,
            "left": self._left,
            "notes": self._notes,
        }
        write_json(self._path, content)
        if self._copy is not None:
            mine = [row for row in self._known if row["device"] == self.device_name]
            write_json(self._copy, {**content, "rows": mine})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a result file; none if it is missing."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Run a function and return its result and seconds, by the device's events if it has them."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    result = work()
    last.record()
    last.synchronize()
    return result, first.elapsed_time(last) / 1000.0


def release(device: torch.device) -> None:
    """Free unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Run the block with another attribute of a module."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def estimators() -> tuple[str, ...]:
    """Return the names that `probe.estimator` may have."""
    from typing import get_args

    from colm_ds.config.colm import ProbeConfig

    return get_args(ProbeConfig.model_fields["estimator"].annotation)
