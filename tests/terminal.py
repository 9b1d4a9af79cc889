"""A pseudo-terminal for tests: run a command in it, and see what its screen shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def in_terminal(
    command: list[str],
    *,
    columns: int = 100,
    rows: int = 40,
    environment: Mapping[str, str] | None = None,
    stdout: IO[Any] | None = None,
    watch: Callable[[str, subprocess.Popen[bytes]], None] | None = None,
    **settings: Any,
) -> tuple[str, int]:
    """Run a command whose standard error, and standard output unless it is given, is a terminal.

    Args:
        command: the command.
        columns: of the terminal.
        rows: of the terminal.
        environment: further variables.
        stdout: where its standard output goes.
        watch: called with all that came so far and the process, whenever something came.
        settings: further arguments of `subprocess.Popen`.

    Returns:
        All that it wrote to the terminal, and its exit code.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    variables = inherited | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", **(environment or {})}
    process = subprocess.Popen(command, stdin=theirs, stdout=stdout or theirs, stderr=theirs, env=variables, **settings)
    os.close(theirs)
    raw = b""
    try:
        with suppress(OSError):  # how Linux says that nobody has the other end open
            while part := os.read(ours, 65536):
                raw += part
                if watch is not None:
                    watch(raw.decode("utf-8", errors="replace"), process)
        return raw.decode("utf-8"), process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def screen(raw: str, columns: int = 100) -> list[str]:
    """Return the lines that a terminal of unlimited height shows after `raw`, without trailing blanks.

    Knows what `rich` uses: line feeds, carriage returns, colours, cursor up, erasing a line, wrapping.
    """
    lines: list[list[str]] = [[]]
    row = column = place = 0
    while place < len(raw):
        if found := _CONTROL.match(raw, place):
            place = found.end()
            amount = int(found[1]) if found[1].isdigit() else 1
            if found[2] == "A":
                row = max(0, row - amount)
            elif found[2] == "K":
                lines[row] = [] if found[1] == "2" else lines[row][:column]
            elif found[2] not in "mhl":
                raise AssertionError(f"unknown control sequence {found[0]!r}")
            continue
        character = raw[place]
        place += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
        while len(lines) <= row:
            lines.append([])
    shown = ["".join(line).rstrip() for line in lines]
    while shown and not shown[-1]:
        shown.pop()
    return shown
