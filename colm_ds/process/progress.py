"""Show the progress of long work on standard error: a bar in a terminal, elsewhere a plain line every 30 s."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TextIO

from colm_ds.untrusted.printable import visible

LINE_EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""

_DRAW_EVERY_S, _SAMPLE_EVERY_S, _SAMPLES = 0.1, 1.0, 20
_LONGEST_BAR, _SHORTEST_BAR = 40, 8


class Progress:
    """Count work that is done and show it, as a context manager.

    In a terminal a bar stays below what is printed meanwhile to `sys.stderr` (and `sys.stdout`, if that is a terminal
    too); nested ones are drawn below each other. Elsewhere there is a line every `LINE_EVERY_S` seconds and one at the
    end, without carriage returns or colours. A killed process leaves nothing to undo: the cursor stays visible, and no
    thread draws. If the terminal goes away, the work continues without the bar.

    Attributes:
        done: units done so far.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        units: str,
        *,
        done: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; it is shown from `with` on.

        Args:
            label: what is done.
            total: units of the whole work; None where it is not known: a short one is then not spoken of in a log.
            units: their name in the plural; "bytes" of a known total are shown as kB, MB or GB.
            done: units done earlier, as by a run that is resumed.
            shown: False on ranks other than 0, and where nobody wants to see it.
            stream: where to; default: `sys.stderr`.
            clock: seconds, for tests.
        """
        self.done = done
        self.total = total
        self._label, self._units, self._note = label, units, ""
        self._shown, self._stream, self._clock = shown, stream, clock
        self._started = self._shown_at = clock()
        self._shown_done = done
        self._samples = deque([(self._started, done)], maxlen=_SAMPLES)
        self._in_terminal = False

    def __enter__(self) -> Progress:
        self._stream = self._stream or sys.stderr
        self._started = self._shown_at = self._clock()
        self._samples[0] = self._started, self.done
        self._in_terminal = self._shown and is_terminal(self._stream)
        if self._in_terminal:
            self._guarded(lambda: _BARS.add(self, self._stream))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Show the last state and stop, so that a message about the end follows it; a second call does nothing."""
        if self._in_terminal:
            with suppress(OSError, ValueError):
                _BARS.remove(self)
        elif self.done != self._shown_done and (self.total is not None or self._shown_done):
            self._guarded(self._print)
        self._shown = False

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count further units as done.

        Args:
            count: how many.
            note: what is known of the work by now, such as its loss.
        """
        self.done += count
        self._note = note or self._note
        now = self._clock()
        if now - self._samples[-1][0] >= _SAMPLE_EVERY_S:
            self._samples.append((now, self.done))
        if now - self._shown_at >= (_DRAW_EVERY_S if self._in_terminal else LINE_EVERY_S):
            self._guarded(_BARS.draw if self._in_terminal else self._print)

    def line(self) -> str:
        """Return how far the work is: units, note, and time left, or taken once it is done."""
        parts = [f"{self._label}: {_amount(self.done, self.total, self._units)}", self._note]
        now, (since, before) = self._clock(), self._samples[0]
        if self.total is None:
            parts[0] += f" in {duration(now - self._started)}"
        elif self.done >= self.total:
            parts.append(f"took {duration(now - self._started)}")
        elif self.done > before:
            parts.append(f"{duration((self.total - self.done) * (now - since) / (self.done - before))} left")
        return visible(", ".join(part for part in parts if part))

    def _print(self) -> None:
        print(self.line(), file=self._stream, flush=True)

    def _guarded(self, show: Callable[[], None]) -> None:
        """Call `show`; once it fails, show nothing more, as work outlives the terminal that it was started from."""
        if not self._shown:
            return
        self._shown_at, self._shown_done = self._clock(), self.done
        try:
            show()
        except (OSError, ValueError):
            self._shown = False
            close_bars()


class _Bars:
    """Draw all bars of this process together, below what is printed."""

    def __init__(self) -> None:
        self._bars: list[Progress] = []
        self._live: Any = None

    def add(self, bar: Progress, stream: Any) -> None:
        """Draw one more bar."""
        self._bars.append(bar)
        if self._live is None:
            from rich.live import Live

            self._live = Live(
                self,
                console=open_console(stream),
                auto_refresh=False,
                redirect_stdout=is_terminal(sys.stdout),
                vertical_overflow="crop",
            )
            self._live.start()
        self.draw()

    def remove(self, bar: Progress) -> None:
        """Remove a bar; the last one stays on the screen, and what follows begins a new line."""
        if self._bars == [bar]:
            self.close()
        elif bar in self._bars:
            self._bars.remove(bar)
            self.draw()

    def draw(self) -> None:
        """Draw all bars as they are now."""
        if self._live is not None:
            self._live.refresh()

    def close(self) -> None:
        """Stop drawing; the bars stay on the screen as they are."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._bars.clear()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        for bar in self._bars:
            text = Text(bar.line(), no_wrap=True)
            text.truncate(options.max_width - 1, overflow="crop")
            room = min(_LONGEST_BAR, options.max_width - text.cell_len - 2)
            grid = Table.grid(padding=(0, 1))
            picture = []
            if bar.total is not None and room >= _SHORTEST_BAR:
                picture.append(ProgressBar(max(1, bar.total), bar.done, width=room))
            grid.add_row(*picture, text)
            yield grid


_BARS = _Bars()


def close_bars() -> None:
    """End all bars before `os._exit`, which leaves no `with` block, so that a final message begins a new line."""
    with suppress(OSError, ValueError):
        _BARS.close()


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal that can move its cursor."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def open_console(stream: Any, **settings: Any) -> Any:
    """Open a `rich.console.Console` that never hides the cursor: a killed process could not show it again.

    Args:
        stream: where to write; colours and cursor movements only into a terminal.
        settings: further arguments of the class.
    """
    from rich.console import Console

    class _Console(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    fixed = {"file": stream, "force_terminal": is_terminal(stream), "highlight": False, "markup": False}
    return _Console(**{"soft_wrap": True, **settings, **fixed})


def duration(seconds: float) -> str:
    """Return seconds in two units at most: "45 s", "3 min 20 s", "5 h 12 min", "2 d 3 h"."""
    left = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"


def _amount(done: int, total: int | None, units: str) -> str:
    if total is None:
        return f"{done:,} {units}"
    if units == "bytes":
        size, units = next(((size, name) for size, name in _BYTES if total >= size), _BYTES[-1])
        return f"{done / size:.1f} of {total / size:.1f} {units}"
    return f"{done:,} of {total:,} {units}"


_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
