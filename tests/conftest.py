"""Fixtures and environment that all tests share."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, so set first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed's Muon and bitsandbytes load the compiler for a decorator

import gc
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks

REPO_ROOT = Path(__file__).resolve().parent.parent

TYPES = Path(os.environ.pop("COLM_DS_TYPES")) if "COLM_DS_TYPES" in os.environ else None
"""Folder in which launch/test.sh keeps what mypy says and its exit code, as it runs beside the tests."""

# The tests' tensors are small: further threads only wait for each other, for long where others want the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root folder of the repository."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """Folder of the data sets that lie beside the repository; skips the test where there is none."""
    folder = repo_root.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data folder beside the repository")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _remove_deepspeed_buffers() -> Iterator[None]:
    """Remove the 66 MiB shared-memory files that DeepSpeed leaves, if they appeared in this session."""

    def buffers() -> set[Path]:
        return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))

    before = buffers()
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:  # another worker may be using its own; launch/test.sh removes them
        return
    for path in buffers() - before:
        with suppress(OSError):  # another user's, or gone already
            path.unlink()


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Ranks]]:
    """Pools of one and of two ranks; their processes start when they are first needed."""
    with Ranks(1) as one, Ranks(2) as two:
        yield {1: one, 2: two}


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    """A pool of three ranks."""
    with Ranks(3) as ranks:
        yield ranks


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: DeepSpeed asks for a whole one with every engine."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the checks of launch/test.sh that failed, so that they are not lost above pytest's output."""
    failed = [name for name in os.environ.get("COLM_DS_FAILED_CHECKS", "").split(",") if name]
    lines = [f"FAILED {name} (see above pytest's output)" for name in failed]
    if TYPES is not None:
        code, ends = TYPES / "code", time.monotonic() + 300
        while not code.exists() and time.monotonic() < ends:
            time.sleep(0.2)
        if not code.exists() or code.read_text().strip() != "0":
            lines += [*(TYPES / "said").read_text().split("\n"), "FAILED mypy"]
    if lines:
        terminalreporter.write_sep("=", "launch/test.sh", red=True)
    for line in lines:
        terminalreporter.write_line(line, red=True)
