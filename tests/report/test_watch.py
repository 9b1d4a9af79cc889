"""`colm-ds watch`: what it reads while a run writes, what it shows, and that it leaves quietly."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from colm_ds.cli import main
from colm_ds.report.watch import Watcher, duration, line, sparkline, view, watch
from colm_ds.run_folder.follow import MetricsTail
from tests.report.run_folders import write_run


def steps(tail: MetricsTail) -> list[int]:
    return [entry["step"] for entry in tail.read()[0]]


def test_a_half_written_line_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert steps(tail) == []  # not there yet
    path.write_bytes(b'{"step": 1}\n{"step": 2, "name": "\xc3')
    assert steps(tail) == [1]
    assert steps(tail) == []
    with path.open("ab") as file:
        file.write(b'\xa9"}\nnot JSON\n{"step": 3}\n{')
    assert steps(tail) == [2, 3]


@pytest.mark.parametrize("last", [3, 4, 5])
def test_a_resumed_run_begins_anew(tmp_path: Path, last: int) -> None:
    """Resuming drops later steps and goes on: the file may be shorter, as long as before, or longer."""
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    path.write_text("".join(f'{{"step": {step}, "loss": 1}}\n' for step in range(1, 5)))
    assert steps(tail) == [1, 2, 3, 4]
    path.write_text("".join(f'{{"step": {step}, "loss": {1 if step < 3 else 2}}}\n' for step in range(1, last + 1)))
    entries, anew = tail.read()
    if last == 4:  # the size alone says nothing; the next line does
        assert not entries
        with path.open("a") as file:
            file.write('{"step": 5, "loss": 2}\n')
        entries, anew = tail.read()
    assert anew
    assert [entry["step"] for entry in entries] == list(range(1, max(last, 3) + 1 + (last == 4)))


def test_view_of_a_running_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "colm-spsa", num_steps=60, finished=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"recipe": {"steps": 120}}))
    watcher = Watcher(folder)
    assert watcher.update()
    assert not watcher.update()
    lines = view(watcher.progress, width=100)
    text = "\n".join(lines)
    assert lines[0] == "colm-spsa · running"
    assert "50.0% · step 60 of 120 · 1 min" in lines[1]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for part in (f"{last['loss']:.4f}", "at step 60", "1.00e-03", "examples/s", "1.30 GiB peak", "probe 0.90", "▇"):
        assert part in text
    (row,) = [row for row in lines if row.startswith("dates")]
    trained, data = row.split()[1:3]
    assert (trained, data) == ("9.4%", "4.5%")
    assert f"{last['coreset']['per_source']['dates']}*" in row
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(("width", "height"), [(30, 12), (80, 24), (200, 60)])
def test_view_fits(tmp_path: Path, width: int, height: int) -> None:
    sources = {f"source with a very long name {number}": 10 for number in range(40)}
    folder = write_run(tmp_path / "run", "colm-spsa", num_steps=5, finished=False, sources=sources, small=())
    watcher = Watcher(folder)
    watcher.update()
    lines = view(watcher.progress, width=width, height=height, plain=True)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    "\n".join(lines).encode("ascii")


def test_one_that_says_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=5, finished=False)
    watcher = Watcher(folder)
    watcher.update()
    written = (folder / "metrics.jsonl").stat().st_mtime
    assert view(watcher.progress, now=written + 59)[0].endswith("running")
    assert view(watcher.progress, now=written + 600)[0].endswith("no news for 10 min")


def test_without_a_terminal(tmp_path: Path) -> None:
    """A line for everything new, until the run ends."""
    folder, whole = tmp_path / "run", write_run(tmp_path / "whole", num_steps=5)
    folder.mkdir()
    out, lines = io.StringIO(), (whole / "metrics.jsonl").read_text().splitlines(keepends=True)

    def train(seconds: float) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(lines[:3])
            del lines[:3]
        if not lines:
            (whole / "summary.json").rename(folder / "summary.json")

    watch(folder, out=out, sleep=train)
    first, second, *rest = out.getvalue().splitlines()
    assert first.startswith("step 2, loss")
    assert second.startswith("step 5, loss")
    assert second.endswith("finished")
    assert not rest


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", "plain-64")
    assert main(["watch", str(folder), "--once"]) == 0
    assert capsys.readouterr().out.startswith("plain-64 · finished")
    (folder / "config.json").unlink()  # a mounted folder may hold the metrics alone
    assert main(["watch", str(folder), "--once"]) == 0
    assert "run · finished" in capsys.readouterr().out
    for wrong, said in ((tmp_path / "none", "does not exist"), (tmp_path, "no metrics.jsonl with a step")):
        assert main(["watch", str(wrong), "--once"]) == 2
        assert said in capsys.readouterr().err


def drain(terminal: int) -> None:
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_in_a_terminal_until_ctrl_c(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=5, finished=False)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "colm_ds.cli", "watch", str(folder), "--every", "0.1"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs tests with &
    )
    try:
        shown, deadline = b"", time.monotonic() + 60
        while b"\x1b[J" not in shown and time.monotonic() < deadline:
            shown += os.read(ours, 4096)
        assert "plain-64 · ".encode() in shown
        process.send_signal(signal.SIGINT)
        threading.Thread(target=drain, args=(ours,), daemon=True).start()  # a full terminal would block its last words
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (18720, "5 h 12 min"), (183600, "2 d 3 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_sparklines() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([5.0, float("nan"), 5.0], 10) == "▁▁"
    assert sparkline([0, 7], 10) == "▁█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"


def test_line_of_nothing(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path)
    watcher.update()
    assert line(watcher.progress) == "step 0"
    assert view(watcher.progress)[-1] == "no step yet"
