"""How a process of a run ends: nothing written is lost, exit handlers run, the interpreter is not taken apart."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
from colm_ds.process.exit import exit_process

class Last:
    def __del__(self):
        print("taken apart", flush=True)

last = Last()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
sys.stdout.write("not flushed ")
exit_process({code!r})
"""


@pytest.mark.parametrize(("code", "expected", "said"), [(None, 0, ""), (3, 3, ""), ("bad input", 1, "bad input\n")])
def test_leave(code: int | str | None, expected: int, said: str) -> None:
    script = SCRIPT.format(code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stderr
    assert done.stdout == "not flushed thread done\nexit handler\n"
    assert done.stderr.endswith(said)
