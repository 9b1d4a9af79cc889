"""The comparison with other tools runs tiny: plain arms train on the same rows, so their losses agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = "--layers 1 --hidden 32 --intermediate 64 --heads 2 --vocabulary 128 --coreset 8 --micro 4 --max-length 160"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_arms_run_and_plain_losses_agree(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    command = [
        sys.executable,
        "benchmarks/peers.py",
        *SIZES.split(),
        "--steps",
        "4",
        "--rounds",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["arm"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert {"plain loop, PyTorch", "plain, DeepSpeed", "plain, ours", "tokens b of 4b, ours"} <= rows.keys()
    for name, row in rows.items():
        assert row["step_s"] > 0
        assert row["cpu_s"] > 0
        assert row["positions"] > 0
        assert len(row["losses"]) == 4, name
        if name.startswith("plain"):
            assert row["largest_difference"] < 1e-4, name
