"""Memory that runs out on one rank or all, in the probe or in training: one message, all ranks end, exit code 6."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.finetune.test_entry import ROOT, recipe_of, write_mixture
from tests.ports import worker_port

PORT = str(worker_port(44))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "phase"), [("1", "forward"), ("0", "probe"), ("0,1", "forward")])
def test_message_once_and_advice(ranks: str, phase: str, tmp_path: Path) -> None:
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tmp_path)))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2", "--master_port", PORT]
    command = [*launcher, "tests/finetune/starved_training.py", str(path), ranks, phase]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 6, output[-3000:]
    assert output.count("DeviceMemoryError") == 1, output[-3000:]
    assert "Traceback" not in output
    if ranks != "0":  # with rank 0 goes the store through which the others learn why
        assert "lost the other ranks" not in output
    micro_batch = r"micro-batch of \d+ examples x \d+ tokens"
    assert re.search(rf"rank [{ranks}]: out of memory in phase '{phase}' of step \d, {micro_batch}", output)
    assert re.search(r"Planned for it: \d+\.\d\d MiB, most of it \w+ [1-9]", output)
    knobs = re.findall(r"^ +(\S+=\S+)  \(\d+\.\d\d MiB less\)$", output, flags=re.MULTILINE)
    assert len(knobs) == len({knob.split("=")[0] for knob in knobs}) == 3, output[-3000:]
    assert "PyTorch: CUDA out of memory. Tried to allocate 2.00 GiB" in output
