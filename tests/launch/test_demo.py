"""launch/demo.sh, the README's first command, with two steps on one rank: six runs, a table and a report."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.ports import worker_port

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "plain_b": ("plain 32", 32),
    "tokens": ("tokens 32 of 128", 32),
    "plain_half": ("plain 64, half the steps", 64),
    "keep": ("keep small + random", 32),
    "colm": ("CoLM 32 of 64", 32),
    "plain_r": ("plain 64", 64),
}
"""By folder of each run: its name, and the examples that it trains on in a step."""


@pytest.mark.distributed
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the demo would install .venv")
def test_the_demo_trains_six_arms_and_compares_them(tmp_path: Path) -> None:
    changes = {"OUT": str(tmp_path / "demo"), "RANKS": "1", "MASTER_PORT": str(worker_port(21))}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "demo.sh"), "steps=2", "evaluation.every=0"],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for folder, (name, size) in ARMS.items():
        summary = json.loads((tmp_path / "demo" / folder / "summary.json").read_text())
        steps = 1 if folder == "plain_half" else 2
        assert summary["status"] == "finished"
        assert (summary["steps"], summary["examples_trained"]) == (steps, steps * size)
        assert (summary["examples_probed"] > 0) == (folder == "colm")
        assert re.search(rf"^{re.escape(name)} +1 ", done.stdout, re.MULTILINE), name
    assert (tmp_path / "demo" / "report.html").read_text().count("<svg") > 3
