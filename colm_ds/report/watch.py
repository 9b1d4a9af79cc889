"""Show a run in the terminal while it trains, or afterwards: `colm-ds watch RUN`."""

from __future__ import annotations

import codecs
import io
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any, TextIO

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from colm_ds.errors import DataError
from colm_ds.process.progress import LINE_EVERY_S, duration, open_console
from colm_ds.report.tables import MISSING, compact, percent, shorten, whole
from colm_ds.run_folder.contents import CONFIG, METRICS, UNFINISHED
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.follow import MetricsTail
from colm_ds.run_folder.metrics import METRICS as DECLARED
from colm_ds.run_folder.read import lookup, names, number, numbers, status_of
from colm_ds.untrusted.printable import visible

_RECENT = 20  # steps that rates and the remaining time are taken from
_QUIET_S = 60.0  # without news for this long, and ten steps: the run may be gone
_WIDEST, _LABEL, _NUMBERS = 120, 10, 24  # characters
_SPARKS = "▁▂▃▄▅▆▇█"
_ASCII = dict(zip(f"{_SPARKS}·…{MISSING}", "_.:-=+*#-~-", strict=True))


class WatchedRun:
    """Follow the files of a run and keep what is shown of them, little however long it is.

    Attributes:
        config: `config.json`, empty if it is not there.
        status: of `summary.json`; empty while the run has not ended.
        last: entry of the last step.
        losses: of every step.
        seconds: of every step.
        heldout: step and overall held-out loss of every evaluation.
        counts: examples trained on so far by source.
        watched: latest values of each metric that has a line of its own, by its title.
    """

    def __init__(self, folder: str | Path) -> None:
        """Start with nothing read.

        Raises:
            DataError: if there is no such folder.
        """
        self._folder = Path(folder)
        if not self._folder.is_dir():
            what = "is a file" if self._folder.exists() else "does not exist"
            raise DataError(f"{folder}: {what}. Give the output folder of a run, which holds {METRICS}.")
        self._tail = MetricsTail(self._folder / METRICS)
        self.config: dict[str, Any] = {}
        self.status = ""
        self._forget()

    def _forget(self) -> None:
        self.last: dict[str, Any] = {}
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.heldout: list[tuple[int, float]] = []
        self.counts: Counter[str] = Counter()
        self.watched: dict[str, dict[str, float]] = {}

    def update(self) -> bool:
        """Read what is new; return whether anything was."""
        entries, replaced = self._tail.read()
        if replaced:
            self._forget()
        if entries or not self.config:
            self.config = read_object(self._folder / CONFIG)
        for entry in entries:
            self._add(entry)
        before, self.status = self.status, visible(status_of(self._folder)).replace(UNFINISHED, "")
        return bool(entries) or self.status != before

    def _add(self, entry: dict[str, Any]) -> None:
        overall = number(lookup(entry, "heldout", "overall"))
        if overall is not None:
            self.heldout.append((entry["step"], overall))
        if "loss" in entry:
            self.last = entry
            self.losses.append(number(entry["loss"]) or math.nan)
            self.seconds.append(number(lookup(entry, "time_s", "total")) or math.nan)
            self.counts.update(numbers(lookup(entry, "coreset", "per_source")))
            self.watched |= {each.title: found for each in DECLARED if each.watched and (found := each.values(entry))}

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, 0 where nobody knows."""
        return int(number(lookup(self.config, "recipe", "steps")) or 0)

    @property
    def step_s(self) -> float:
        """Median seconds of the recent steps, 0 where nobody knows."""
        return median([value for value in self.seconds[-_RECENT:] if value == value] or [0.0])

    def where(self) -> str:
        """Return the step and the time that is left for training; evaluations are not counted."""
        step = self.last.get("step", 0)
        text = f"step {step:,}" + (f" of {self.num_steps:,}" if self.num_steps else "")
        left = self.step_s * (self.num_steps - step)
        return f"{text} · {duration(left)} left" if left > 0 and not self.status else text

    def state(self, now: float) -> str:
        """Return the status, or of a run that has not ended whether there was news of late."""
        try:
            quiet = now - (self._folder / METRICS).stat().st_mtime
        except OSError:
            quiet = 0.0
        is_quiet = quiet > max(_QUIET_S, 10 * self.step_s)
        return self.status or (f"no news for {duration(quiet)}" if is_quiet else "running")


def watch(
    folder: str | Path,
    *,
    once: bool = False,
    every_s: float = 2.0,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show a run until it ends: a view redrawn in a terminal, elsewhere a line of news every 30 s.

    Args:
        folder: output folder of the run.
        once: show the view once and return.
        every_s: seconds between looks at the files.
        out: where to; default: standard output.
        sleep: waits so many seconds.
        clock: seconds, for tests.

    Raises:
        DataError: if there is no such folder, or with `once` nothing of a run in it.
    """
    out = out or sys.stdout
    if isinstance(out, io.TextIOWrapper):
        codecs.register_error("colm_ds.ascii", _in_ascii)
        out.reconfigure(errors="colm_ds.ascii")
    run, console = WatchedRun(folder), open_console(out, soft_wrap=False)
    if once:
        run.update()
        if not run.config and not run.last and not run.heldout:
            raise DataError(f"{folder}: no {METRICS} with a step in it. Give the output folder of a run.")
        console.print(view(run, console.width))
        return
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
    has_news, said = False, -math.inf
    with live if console.is_terminal else nullcontext():
        while True:
            has_news |= run.update()
            if console.is_terminal:
                live.update(view(run, console.width, console.height), refresh=True)
            elif has_news and (run.status or clock() - said >= LINE_EVERY_S):
                print(line(run), file=out, flush=True)
                has_news, said = False, clock()
            if run.status:
                return
            sleep(every_s)


def line(run: WatchedRun) -> str:
    """Return the state of a run on one line."""
    numbered = [f"{label} {text}" for label, text, _ in _rows(run, 0) if text] if run.last else []
    return ", ".join([run.where(), *numbered, *([run.status] if run.status else [])])


def view(run: WatchedRun, width: int, height: int | None = None, now: float | None = None) -> Group:
    """Return everything of a run, to be drawn by rich.

    Args:
        run: the run.
        width: of the screen, in characters.
        height: lines at most; sources that do not fit are counted.
        now: seconds since 1970; default: as the clock says.
    """
    width = min(width, _WIDEST)
    state = run.state(time.time() if now is None else now)
    shown: list[Any] = [_text(f"{shorten(run.config.get('name') or 'run', 60)} · {state}", width), _steps(run, width)]
    if not run.last:
        return Group(*shown, Text(), Text("no step yet"))
    rows = list(_rows(run, max(8, width - _LABEL - _NUMBERS)))
    for label, text, rest in rows:
        shown.append(_text(f"{label:<{_LABEL}}{text:<{_NUMBERS if text else 0}}{rest}", width))
    shown.insert(2, Text())
    return Group(*shown, *_sources(run, width, None if height is None else max(1, height - len(rows) - 7)))


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as characters of different heights; means of equal stretches where there are more than fit."""
    known = [value for value in values if math.isfinite(value)]
    count = min(width, len(known))
    means = [fmean(known[at * len(known) // count : (at + 1) * len(known) // count]) for at in range(count)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = 0.0 if high - low <= 1e-12 * abs(high) else (len(_SPARKS) - 1) / (high - low)
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


def _steps(run: WatchedRun, width: int) -> Any:
    if not run.num_steps:
        return _text(run.where(), width)
    step, room = run.last.get("step", 0), max(8, width - 47)
    bar = Table.grid(padding=(0, 1))
    text = _text(f"{percent(step / run.num_steps)} · {run.where()}", width - room - 1)
    bar.add_row(ProgressBar(run.num_steps, step, width=room), text)
    return bar


def _rows(run: WatchedRun, room: int) -> Iterator[tuple[str, str, str]]:
    """Return label, numbers, and picture or further numbers of every row.

    Args:
        run: the run, with a step.
        room: characters of a picture.
    """
    last = run.last
    yield "loss", f"{run.losses[-1]:.4f}", sparkline(run.losses, room)
    if run.heldout:
        step, loss = run.heldout[-1]
        yield "held-out", f"{loss:.4f} at step {step:,}", sparkline([value for _, value in run.heldout], room)
    lr, norm = number(last.get("lr")), number(last.get("grad_norm"))
    if lr is not None:
        yield "lr", f"{lr:.2e}" + (f", gradient {compact(norm)}" if norm is not None else ""), ""
    if run.step_s:
        examples, tokens = (number(last.get(name)) or 0.0 for name in ("examples_trained", "tokens"))
        rate = f"{compact(examples / run.step_s)} examples/s, {compact(tokens / run.step_s)} tokens/s"
        yield "rate", f"{compact(run.step_s)} s a step", rate
        times = numbers(last.get("time_s"))
        total = times.pop("total", 0.0) or sum(times.values())
        hidden = {"save", "train"} if times.get("backward") else {"save"}  # forward and backward are parts of train
        kept = {name: value / total for name, value in times.items() if name not in hidden and value >= 0.005 * total}
        yield "time", "", " · ".join(f"{name} {percent(share)}" for name, share in kept.items())
    memory = numbers(last.get("memory_gib"))
    if "peak" in memory:
        parts = [f"{name} {memory[name]:.2f}" for name in ("probe", "train", "step", "save") if memory.get(name)]
        yield "memory", f"{memory['peak']:.2f} GiB peak", " · ".join(parts)
    for title, values in run.watched.items():
        yield "", "", " · ".join([title, *(f"{name} {compact(value)}".strip() for name, value in values.items())])


def _sources(run: WatchedRun, width: int, most: int | None) -> Iterator[Any]:
    """Return the share of every source among the examples trained on, with its part of the last step."""
    data, in_last = numbers(run.config.get("sources")), numbers(lookup(run.last, "coreset", "per_source"))
    small = set(names(run.config.get("small_sources")))
    total, ordered = sum(run.counts.values()), [name for name, _ in run.counts.most_common()]
    if not total:
        return
    figures = [Column(justify="right", no_wrap=True) for _ in range(3)]
    table = Table.grid(Column(no_wrap=True), *figures, Column(width=1), Column(ratio=1), padding=(0, 1), expand=True)
    table.width = width
    table.add_row("coreset", "trained", "data", "last step")
    for name in ordered[:most]:
        share = run.counts[name] / total
        known = percent(data.get(name, 0.0) / sum(data.values())) if data else MISSING
        cells = shorten(name, max(8, min(28, width - 33))), percent(share), known, whole(in_last.get(name, 0))
        table.add_row(*map(Text, cells), "*" if name in small else "", ProgressBar(1.0, share))
    yield from (Text(), table)
    if most is not None and most < len(ordered):
        yield Text(f"and {len(ordered) - most} more sources")
    if small & set(ordered[:most]):
        yield Text("* small source: kept whole")


def _text(text: str, width: int) -> Text:
    return Text(text[:width].rstrip(), no_wrap=True)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding does not know."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end
