"""Ports for the launchers that tests start: one range for each worker of pytest-xdist."""

from __future__ import annotations

import os


def worker_port(offset: int) -> int:
    """Return a port that no other worker's tests use.

    DeepSpeed names its shared-memory files by port, so that tests use few of them.

    Args:
        offset: 0 to 99, which of the worker's ports.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return 29400 + 100 * worker + offset
