"""Share a machine's cores between the processes that run on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process may use.

    These are the ones that its affinity allows (`taskset`, `docker run --cpuset-cpus`, a job scheduler), or fewer where
    a control group limits their time (`docker run --cpus`, `CPUQuota=` of systemd).
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_quotas(_CONTROL_GROUPS, _OWN_GROUPS)]))


def local_ranks() -> int:
    """Return the number of ranks on this machine, by deepspeed's variable, torchrun's, or else that of all ranks."""
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)


def _quotas(root: Path, own: Path) -> Iterator[int]:
    """Yield the quotas of this process's control groups and of those above them, in cores, rounded up."""
    for line in _read(own).split("\n"):
        controllers, _, group = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 2 has no name of a controller here, and no folder of one
        top = root / controllers if controllers else root
        folder = top / group.lstrip("/")
        # a container sees its own group as the top, whatever its name is outside
        for place in {top, *(above for above in (folder, *folder.parents) if above.is_relative_to(top))}:
            if controllers:
                quota, period = _read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(place / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):  # "max" and "-1" are no limit
                yield math.ceil(int(quota) / int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
