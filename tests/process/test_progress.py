"""Progress: a bar that messages do not break in a terminal, plain lines elsewhere, and nothing to undo after a kill."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from colm_ds.process.progress import LINE_EVERY_S, Progress, duration
from tests.terminal import in_terminal, screen

BAR = """
import os, signal, sys, time
from colm_ds.process.progress import Progress, close_bars

with Progress("train", 4, "steps", done=1) as bar:
    for step in (2, 3):
        time.sleep(0.11)
        bar.advance(note=f"loss {step / 4}")
        print(f"step {step}: a message longer than the terminal is wide, which must come whole: " + "x" * 60,
              file=sys.stderr)
    with Progress("look up", 2, "examples") as inner:
        inner.advance()
    END
print("after it", file=sys.stderr)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_without_a_terminal() -> None:
    clock, out = Clock(), io.StringIO()
    said: list[float] = []
    with Progress("train", 100, "steps", stream=out, clock=clock) as bar:
        for _ in range(100):
            clock.now += 7.0
            before = out.getvalue()
            bar.advance(note="loss 1.5")
            if out.getvalue() != before:
                said.append(clock.now)
    text = out.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    assert said == [100.0 + 35.0 * number for number in range(1, 21)]
    assert all(late - early >= LINE_EVERY_S for early, late in pairwise(said))
    lines = text.splitlines()
    assert lines[0] == "train: 5 of 100 steps, loss 1.5, 11 min 5 s left"
    assert lines[-1] == "train: 100 of 100 steps, loss 1.5, took 11 min 40 s"
    assert len(lines) == 20


def test_work_of_unknown_size() -> None:
    """It is counted, without a guess of the time left; a short one is not spoken of."""
    clock, out = Clock(), io.StringIO()
    with Progress("reading", None, "rows", stream=out, clock=clock) as bar:
        for _ in range(8):
            clock.now += 10.0
            bar.advance(500)
    assert out.getvalue().split("\n") == [
        "reading: 1,500 rows in 30 s",
        "reading: 3,000 rows in 1 min",
        "reading: 4,000 rows in 1 min 20 s",
        "",
    ]
    out = io.StringIO()
    with Progress("reading", None, "rows", stream=out, clock=clock) as bar:
        bar.advance(500)
    assert out.getvalue() == ""


def test_a_last_line_wherever_it_ends() -> None:
    def fail(out: io.StringIO) -> None:
        with Progress("scan", 3_000_000, "bytes", stream=out, clock=Clock()) as bar:
            bar.advance(1_500_000)
            raise ZeroDivisionError

    out = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        fail(out)
    assert out.getvalue() == "scan: 1.5 of 3.0 MB, 0 s left\n"
    with Progress("train", 5, "steps", done=5, stream=out, clock=Clock()):
        pass  # nothing left to do, nothing to say
    assert out.getvalue().count("\n") == 1
    out = io.StringIO()
    with Progress("train", 5, "steps", shown=False, stream=out) as bar:
        bar.advance(5)
    assert bar.done == 5
    assert out.getvalue() == ""


def test_time_left_follows_the_recent_steps() -> None:
    clock = Clock()
    with Progress("train", 1000, "steps", stream=io.StringIO(), clock=clock) as bar:
        clock.now += 600.0  # the first one compiles
        bar.advance()
        for _ in range(99):
            clock.now += 2.0
            bar.advance()
        assert bar.line() == "train: 100 of 1,000 steps, 30 min left"


def test_a_terminal_that_goes_away_does_not_end_the_work() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    clock = Clock()
    with Progress("train", 3, "steps", stream=Gone(), clock=clock) as bar:
        for _ in range(3):
            clock.now += 60.0
            bar.advance()
    assert bar.done == 3


def test_nor_does_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    clock, before = Clock(), sys.stderr
    stream = os.fdopen(theirs, "w")
    with Progress("train", 3, "steps", stream=stream, clock=clock) as bar:
        assert sys.stderr is not before
        os.close(ours)
        for _ in range(3):
            clock.now += 60.0
            bar.advance()
        assert sys.stderr is before
    assert bar.done == 3
    with suppress(OSError):
        stream.close()


ENDS: dict[str, tuple[str, Callable[[int], bool]]] = {
    "done": ("bar.advance()", lambda code: code == 0),
    "crash": ("raise RuntimeError('it broke')", lambda code: code == 1),
    "exit": ("sys.exit(3)", lambda code: code == 3),
    "watchdog": ("close_bars(); print('too long', file=sys.stderr); os._exit(4)", lambda code: code == 4),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", lambda code: code == -9),
    "terminate": ("os.kill(os.getpid(), signal.SIGTERM)", lambda code: code == -15),
}


@pytest.mark.parametrize("end", ENDS)
def test_messages_and_ends_in_a_terminal(end: str) -> None:
    """Every message on lines of its own, the bar below them, and the cursor never hidden."""
    statement, is_expected = ENDS[end]
    raw, code = in_terminal([sys.executable, "-c", BAR.replace("END", statement)], columns=80)
    assert is_expected(code), raw
    assert "\x1b[?25l" not in raw
    lines = screen(raw, columns=80)
    for step in (2, 3):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"step {step}: a message"))
        whole = lines[at] + lines[at + 1]
        assert whole == f"step {step}: a message longer than the terminal is wide, which must come whole: " + "x" * 60
    (bar,) = [number for number, line in enumerate(lines) if "train: " in line]
    assert re.match(r"[━╸╺]+ train: \d of 4 steps, loss 0\.75", lines[bar]), lines[bar]
    assert not any("look up" in line for line in lines[bar + 1 :] if end != "kill")
    after = lines[bar + 1 :]
    if end == "done":
        assert after == ["after it"]
        assert "train: 4 of 4 steps" in lines[bar]
    elif end == "crash":
        assert after[0] == "Traceback (most recent call last):"
        assert after[-1] == "RuntimeError: it broke"
    elif end == "watchdog":
        assert after == ["too long"]


def test_output_and_messages_go_where_they_should(tmp_path: Path) -> None:
    """Standard output that is no terminal is left alone while a bar is drawn."""
    script = BAR.replace("END", "print('a result')")
    with (tmp_path / "out").open("w") as out:
        raw, code = in_terminal([sys.executable, "-c", script], stdout=out)
    assert code == 0
    assert (tmp_path / "out").read_text() == "a result\n"
    assert "a result" not in raw


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(environment: dict[str, str]) -> None:
    raw, code = in_terminal([sys.executable, "-c", BAR.replace("END", "bar.advance()")], environment=environment)
    assert code == 0
    assert "\x1b" not in raw
    assert raw.replace("\r\n", "\n").endswith("train: 4 of 4 steps, loss 0.75, took 0 s\nafter it\n")


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_the_bar_stays_on_one_line(columns: int) -> None:
    raw, code = in_terminal([sys.executable, "-c", BAR.replace("END", "bar.advance()")], columns=columns)
    assert code == 0
    lines = screen(raw, columns=columns)
    assert sum("train: " in line for line in lines) == 1
    assert max(map(len, lines)) <= columns


def test_ascii_where_the_encoding_knows_no_more() -> None:
    command = [sys.executable, "-c", BAR.replace("END", "bar.advance()")]
    raw, code = in_terminal(command, environment={"PYTHONIOENCODING": "ascii"})
    assert code == 0
    assert raw.isascii()
    assert "-- train: 4 of 4 steps" in screen(raw)[-2]


def test_rich_is_loaded_for_a_terminal_only() -> None:
    code = """
import io, sys
import colm_ds.process.progress as progress
with progress.Progress("train", 1, "steps") as bar:
    bar.advance()
sys.exit("rich" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stderr == "train: 1 of 1 steps, took 0 s\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (18720, "5 h 12 min"), (183600, "2 d 3 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
