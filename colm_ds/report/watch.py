"""A run in the terminal while it trains, or afterwards: `colm-ds watch RUN`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from colm_ds.errors import DataError
from colm_ds.report.tables import MISSING, compact, fixed, percent, shorten, whole
from colm_ds.run_folder.follow import MetricsTail
from colm_ds.run_folder.read import lookup, number, numbers

_RECENT = 20  # steps that rates and the remaining time are taken from
_SPARKS = "▁▂▃▄▅▆▇█"
_PLAIN_SPARKS = "_.:-=+*#"
_LABEL = 10
_QUIET_S = 60.0  # without a word for this long, and ten steps: the run may be gone


@dataclass
class Progress:
    """What is known of a run, kept small however long it is.

    Attributes:
        config: `config.json`, empty if it is not there.
        status: of `summary.json`; empty while the run has not ended.
        step: last step.
        last: its entry.
        losses: of every step.
        seconds: of every step.
        heldout: step and overall held-out loss of every evaluation.
        counts: examples trained on so far by source.
        written: when metrics.jsonl last changed, seconds since 1970; None if it is not there.
    """

    config: dict[str, Any] = field(default_factory=dict)
    status: str = ""
    step: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    written: float | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take in one entry of metrics.jsonl."""
        step = int(entry["step"])
        overall = number(lookup(entry, "heldout", "overall"))
        if overall is not None:
            self.heldout.append((step, overall))
        if "loss" not in entry:
            return
        self.step, self.last = step, dict(entry)
        self.losses.append(number(entry["loss"]) or float("nan"))
        self.seconds.append(number(lookup(entry, "time_s", "total")) or float("nan"))
        for name, count in numbers(lookup(entry, "coreset", "per_source")).items():
            self.counts[name] = self.counts.get(name, 0.0) + count

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run."""
        found = number(lookup(self.config, "recipe", "steps"))
        return int(found) if found is not None else None

    @property
    def step_s(self) -> float | None:
        """Median seconds of the recent steps."""
        known = [value for value in self.seconds[-_RECENT:] if value == value]
        return float(np.median(known)) if known else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds of training that are left; evaluations are not counted."""
        if self.num_steps is None or self.step_s is None or self.status:
            return None
        return max(0, self.num_steps - self.step) * self.step_s


class Watcher:
    """Follows the files of one run."""

    def __init__(self, folder: str | Path) -> None:
        """Start with nothing read.

        Raises:
            DataError: if there is no such folder.
        """
        self._folder = Path(folder)
        if not self._folder.is_dir():
            what = "is a file" if self._folder.exists() else "does not exist"
            raise DataError(f"{folder}: {what}. Give the output folder of a run, which holds metrics.jsonl.")
        self._tail = MetricsTail(self._folder / "metrics.jsonl")
        self.progress = Progress()

    def update(self) -> bool:
        """Read what is new; whether anything was."""
        entries, anew = self._tail.read()
        if anew:
            self.progress = Progress()
        found = self.progress
        if entries or not found.config:
            found.config = _read(self._folder / "config.json")
        for entry in entries:
            found.add(entry)
        status = str(_read(self._folder / "summary.json").get("status") or "").replace("unfinished", "")
        changed = bool(entries) or status != found.status
        found.status = status
        try:
            found.written = (self._folder / "metrics.jsonl").stat().st_mtime
        except OSError:
            found.written = None
        return changed


def watch(
    folder: str | Path,
    *,
    once: bool = False,
    every_s: float = 2.0,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it ends: a view that is drawn anew in a terminal, else a line whenever there is something new.

    Args:
        folder: output folder of the run.
        once: show the view once and return.
        every_s: seconds between looks at the files.
        out: where to; default: standard output.
        sleep: waits so many seconds.

    Raises:
        DataError: if there is no such folder, or with `once` nothing of a run in it.
    """
    out = out or sys.stdout
    watcher = Watcher(folder)
    plain = not _can_show(_SPARKS, out)
    while True:
        changed = watcher.update()
        found = watcher.progress
        width, height = shutil.get_terminal_size((100, 40))
        if once:
            if not found.config and not found.last and not found.heldout:
                raise DataError(f"{folder}: no metrics.jsonl with a step in it. Give the output folder of a run.")
            print("\n".join(view(found, width=width, plain=plain)), file=out)
            return
        if out.isatty():
            lines = view(found, width=width, height=height - 1, plain=plain)
            print("\x1b[H" + "".join(f"{text}\x1b[K\n" for text in lines), end="\x1b[J", file=out, flush=True)
        elif changed:
            print(line(found), file=out, flush=True)
        if found.status:
            return
        sleep(every_s)


def line(found: Progress) -> str:
    """The state of a run on one line."""
    parts = [f"step {found.step}" + (f" of {found.num_steps}" if found.num_steps else "")]
    if found.losses:
        parts.append(f"loss {found.losses[-1]:.4f}")
    if found.heldout:
        parts.append(f"held-out {found.heldout[-1][1]:.4f}")
    if found.step_s is not None:
        parts.append(f"{compact(found.step_s)} s a step")
    peak = number(lookup(found.last, "memory_gib", "peak"))
    if peak is not None:
        parts.append(f"{peak:.2f} GiB")
    if found.remaining_s is not None:
        parts.append(f"{duration(found.remaining_s)} left")
    return ", ".join([*parts, *([found.status] if found.status else [])])


def view(
    found: Progress, *, width: int = 100, height: int | None = None, plain: bool = False, now: float | None = None
) -> list[str]:
    """The lines of the whole view.

    Args:
        found: what is known.
        width: characters of a line at most.
        height: lines at most; sources that do not fit are counted.
        plain: ASCII only.
        now: seconds since 1970.
    """
    width = max(30, min(width, 120))
    room = max(8, width - _LABEL - 32)
    sparks = _PLAIN_SPARKS if plain else _SPARKS
    lines = [_title(found, now if now is not None else time.time()), _bar_of_steps(found, width, plain), ""]
    if not found.last:
        lines.append("no step yet")
    else:
        lines += [_row(*row) for row in _rows(found, room, sparks)]
        lines += ["", *_sources(found, width, plain, None if height is None else max(1, height - len(lines) - 3))]
    shown = [text[:width].rstrip() for text in lines]
    if plain:
        shown = [text.replace("·", "-").replace("…", "~").replace(MISSING, "-") for text in shown]
    return shown if height is None else shown[:height]


def sparkline(values: Sequence[float], width: int, sparks: str = _SPARKS) -> str:
    """Values as a row of characters of different heights; means of equal stretches where there are more than fit."""
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) == 0:
        return ""
    means = np.array([part.mean() for part in np.array_split(known, min(width, len(known)))])
    low, high = means.min(), means.max()
    levels = np.zeros(len(means)) if high - low < 1e-12 * abs(high) else (means - low) / (high - low)
    return "".join(sparks[round(float(level) * (len(sparks) - 1))] for level in levels)


def duration(seconds: float) -> str:
    """Seconds as a time that one remembers: "45 s", "3 min 20 s", "5 h 12 min", "2 d 3 h"."""
    left = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"


def _title(found: Progress, now: float) -> str:
    state = found.status or "running"
    if not found.status and found.written is not None:
        quiet = now - found.written
        state = f"no news for {duration(quiet)}" if quiet > max(_QUIET_S, 10 * (found.step_s or 0.0)) else "running"
    return f"{shorten(found.config.get('name') or 'run', 60)} · {state}"


def _bar_of_steps(found: Progress, width: int, plain: bool) -> str:
    total = found.num_steps
    text = f"step {found.step:,}" + (f" of {total:,}" if total else "")
    if found.remaining_s is not None and found.last:
        text += f" · {duration(found.remaining_s)} left"
    if not total:
        return text
    return f"{_bar(found.step / total, max(8, width - 46), plain)} {percent(found.step / total)} · {text}"


def _rows(found: Progress, room: int, sparks: str) -> list[tuple[str, str, str]]:
    """Label, numbers and picture of every row."""
    last = found.last
    rows = [("loss", f"{found.losses[-1]:.4f}", sparkline(found.losses, room, sparks))]
    if found.heldout:
        step, value = found.heldout[-1]
        rows.append(
            ("held-out", f"{value:.4f} at step {step:,}", sparkline([v for _, v in found.heldout], room, sparks))
        )
    lr = number(last.get("lr"))
    norm = number(last.get("grad_norm"))
    if lr is not None:
        rows.append(("lr", f"{lr:.2e}" + (f", gradient {compact(norm)}" if norm is not None else ""), ""))
    if found.step_s:
        examples, tokens = number(last.get("examples_trained")) or 0.0, number(last.get("tokens")) or 0.0
        rate = f"{compact(examples / found.step_s)} examples/s, {compact(tokens / found.step_s)} tokens/s"
        rows.append(("rate", f"{compact(found.step_s)} s a step", rate))
        times = {name: value for name, value in numbers(last.get("time_s")).items() if name not in ("total", "save")}
        if times.get("backward"):
            times.pop("train", None)  # forward and backward are its parts
        total = number(lookup(last, "time_s", "total")) or sum(times.values())
        shares = [f"{name} {percent(value / total)}" for name, value in times.items() if value >= 0.005 * total]
        rows.append(("time", "", " · ".join(shares)))
    memory = {name: value for name, value in numbers(last.get("memory_gib")).items() if value > 0}
    peak = memory.pop("peak", None)
    memory = {name: memory[name] for name in ("probe", "train", "step", "save") if name in memory}
    if peak is not None:
        parts = " · ".join(f"{name} {fixed(2)(value)}" for name, value in memory.items())
        rows.append(("memory", f"{fixed(2)(peak)} GiB peak", parts))
    return rows


def _row(label: str, text: str, picture: str) -> str:
    return f"{label:<{_LABEL}}{text:<24}{picture}" if text else f"{label:<{_LABEL}}{picture}"


def _sources(found: Progress, width: int, plain: bool, most: int | None) -> list[str]:
    """Share of every source among the examples trained on, with its part of the last step."""
    total = sum(found.counts.values())
    if not total:
        return []
    data = numbers(found.config.get("sources"))
    listed = found.config.get("small_sources")
    small = set(map(str, listed)) if isinstance(listed, list) else set()
    in_last = numbers(lookup(found.last, "coreset", "per_source"))
    ordered = sorted(found.counts, key=lambda name: -found.counts[name])
    shown = ordered if most is None else ordered[:most]
    name_width = min(28, max(len(name) for name in [*shown, "coreset"]))
    lines = [f"{'coreset':<{name_width}} trained   data  last step"]
    for name in shown:
        share = found.counts[name] / total
        known = data.get(name, 0.0) / sum(data.values()) if data else None
        cells = f"{percent(share):>7} {MISSING if known is None else percent(known):>6}"
        mark = "*" if name in small else " "
        bar = _bar(share, max(4, width - name_width - 32), plain, empty=" ")
        cells += f" {whole(in_last.get(name, 0)):>10}{mark} {bar}"
        lines.append(f"{shorten(name, name_width):<{name_width}} {cells}")
    if len(shown) < len(ordered):
        lines.append(f"and {len(ordered) - len(shown)} more sources")
    if small & set(shown):
        lines.append("* small source: kept whole")
    return lines


def _bar(share: float, width: int, plain: bool, empty: str | None = None) -> str:
    full, blank = ("#", ".") if plain else ("█", "░")
    filled = round(min(1.0, max(0.0, share)) * width)
    return full * filled + (blank if empty is None else empty) * (width - filled)


def _can_show(text: str, out: TextIO) -> bool:
    try:
        text.encode(getattr(out, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
