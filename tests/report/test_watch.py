"""`colm-ds watch`: what it reads while a run writes, what it shows, and that it leaves quietly."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from colm_ds.cli import main
from colm_ds.process.progress import open_console
from colm_ds.report.watch import WatchedRun, line, sparkline, view, watch
from colm_ds.run_folder.follow import MetricsTail
from tests.report.run_folders import write_run
from tests.terminal import in_terminal, screen


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


def shown(run: WatchedRun, width: int = 100, height: int | None = None, now: float | None = None) -> list[str]:
    out = io.StringIO()
    open_console(out, soft_wrap=False, width=width).print(view(run, width, height, now))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_view_of_a_running_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "colm-spsa", num_steps=60, finished=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"recipe": {"steps": 120}}))
    run = WatchedRun(folder)
    assert run.update()
    assert not run.update()
    lines = shown(run)
    text = "\n".join(lines)
    assert lines[0] == "colm-spsa · running"
    assert "50.0% · step 60 of 120 · 1 min" in lines[1]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for part in (f"{last['loss']:.4f}", "at step 60", "1.00e-03", "examples/s", "1.30 GiB peak", "probe 0.90", "▇"):
        assert part in text
    assert "squared error of the gradient · coreset 0.0200 · random 0.0400" in text  # declared to be watched
    (row,) = [row for row in lines if row.startswith("dates")]
    trained, data = row.split()[1:3]
    assert (trained, data) == ("9.4%", "4.5%")
    assert f"{last['coreset']['per_source']['dates']} *" in row
    assert max(map(len, lines)) <= 100
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')  # started over
    assert run.update()
    assert "step 1 of 120" in shown(run)[1]
    assert not any("dates" in line for line in shown(run))


@pytest.mark.parametrize(("width", "height"), [(30, 16), (80, 24), (200, 60)])
def test_view_fits(tmp_path: Path, width: int, height: int) -> None:
    sources = {f"source with a very long name {number}": 10 for number in range(40)}
    folder = write_run(tmp_path / "run", "colm-spsa", num_steps=5, finished=False, sources=sources, small=())
    run = WatchedRun(folder)
    run.update()
    lines = shown(run, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_ascii_where_the_encoding_knows_no_more(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "colm-spsa", num_steps=60, finished=False)
    (folder / "config.json").write_text(json.dumps({"name": "Größe"}))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    watch(folder, once=True, out=out)
    out.seek(0)
    text = out.read()
    assert text.startswith("Gr??e - running\nstep 60\n")
    assert re.search(r"^loss +\d\.\d+ +#[#*+=:._-]+_$", text, re.MULTILINE)
    assert re.search(r"^sums +37\.5% +- ", text, re.MULTILINE)


def test_one_that_says_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=5, finished=False)
    run = WatchedRun(folder)
    run.update()
    written = (folder / "metrics.jsonl").stat().st_mtime
    assert shown(run, now=written + 59)[0].endswith("running")
    assert shown(run, now=written + 600)[0].endswith("no news for 10 min")


def test_without_a_terminal(tmp_path: Path) -> None:
    """A line of what is new at once, then every 30 s, and at the end."""
    folder, whole = tmp_path / "run", write_run(tmp_path / "whole", num_steps=50)
    folder.mkdir()
    out, lines = io.StringIO(), (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    now = 0.0

    def train(seconds: float) -> None:
        nonlocal now
        now += 10.0
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(lines[:10])
            del lines[:10]
        if not lines:
            (whole / "summary.json").rename(folder / "summary.json")

    watch(folder, out=out, sleep=train, clock=lambda: now)
    said = out.getvalue().splitlines()
    assert not {"\r", "\x1b"} & set(out.getvalue())
    assert [text.split(",")[0] for text in said] == ["step 9", "step 39", "step 50"]  # the first entry is of step 0
    assert re.match(r"step 9, loss \d\.\d{4}, held-out \d\.\d{4} at step 0, lr .*, memory [\d.]+ GiB peak$", said[0])
    assert said[-1].endswith(", finished")


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


def test_in_a_terminal_until_ctrl_c(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=5, finished=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    interrupted: list[bool] = []

    def go_on(raw: str, process: subprocess.Popen[bytes]) -> None:
        if "step 3" in raw and lines:
            (folder / "metrics.jsonl").write_text("".join(lines))
            lines.clear()
        if "step 5" in raw and not interrupted:
            interrupted.append(True)
            process.send_signal(signal.SIGINT)

    raw, code = in_terminal(
        [sys.executable, "-m", "colm_ds.cli", "watch", str(folder), "--every", "0.1"],
        watch=go_on,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored where a shell uses &
    )
    assert code == 0
    assert "\x1b[?25l" not in raw
    assert "Traceback" not in raw
    last = screen(raw)
    assert last[0].startswith("plain-64 · ")  # drawn over and over in the same place
    assert "step 5" in last[1]
    assert sum(line.startswith("loss") for line in last) == 1


def test_in_a_terminal_until_the_run_ends(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=5)
    command = [sys.executable, "-m", "colm_ds.cli", "watch", str(folder)]
    raw, code = in_terminal(command, columns=80, rows=16, environment={"PYTHONIOENCODING": "ascii"})
    assert code == 0
    assert raw.isascii()
    assert screen(raw, columns=80)[0] == "plain-64 - finished"


def test_sparklines() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([5.0, float("nan"), 5.0], 10) == "▁▁"
    assert sparkline([0, 7], 10) == "▁█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"


def test_line_of_nothing(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path)
    run.update()
    assert line(run) == "step 0"
    assert shown(run)[-1] == "no step yet"
