"""CUDA's multi-process service, by which kernels of several processes run side by side on one GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PLACES = ("/usr/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin")
"""Folders of the service's program, besides those of PATH."""


@contextmanager
def shared_device(folder: Path) -> Iterator[str]:
    """Run the block with the service, where it is there and a process gets a GPU from it.

    The service is started for this block alone, by files in `folder`; no setting of the device is touched.

    Args:
        folder: for the service's pipes and logs.

    Yields:
        What happened, in words.
    """
    program = shutil.which(CONTROL) or shutil.which(CONTROL, path=os.pathsep.join(PLACES))
    if program is None:
        yield f"no {CONTROL} here: processes take turns on the device"
        return
    folder.mkdir(parents=True, exist_ok=True)
    ours = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        started = _works([program, "-d"], 10.0) and _works([sys.executable, "-c", _TRY], 40.0)
        if not started:
            _stop(program)
            _restore(before)
        yield "several processes at once by MPS" if started else "MPS does not start: processes take turns"
    finally:
        if os.environ.get("CUDA_MPS_PIPE_DIRECTORY") == str(folder):
            _stop(program)
        _restore(before)


_TRY = "import torch; assert float(torch.ones(8, device='cuda').sum()) == 8"


def _works(command: list[str], seconds: float) -> bool:
    try:
        return subprocess.run(command, timeout=seconds, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _stop(program: str) -> None:
    """End the service."""
    try:
        subprocess.run([program], input=b"quit\n", timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
