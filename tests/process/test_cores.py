"""A process takes no more cores than its affinity and its control groups leave it, and ranks share them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from colm_ds.process import cores
from colm_ds.sweep import Grid, LaunchConfig
from colm_ds.sweep.jobs import _places
from colm_ds.training.run import threads_of_rank

LAUNCHERS = {
    "deepspeed": ({"LOCAL_SIZE": "4", "WORLD_SIZE": "8"}, 4),
    "torchrun": ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, 2),
    "one that says only how many there are": ({"WORLD_SIZE": "3"}, 3),
    "none": ({}, 1),
}


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups, of 64 allowed cores."""
    monkeypatch.setattr(cores, "_CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_affinity_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`taskset -c 0` leaves one core of any machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert cores.usable_cores() == 1


@pytest.mark.parametrize(("text", "expected"), [("max 100000", 64), ("250000 100000", 3), ("5000 100000", 1), ("", 64)])
def test_quota_of_a_container(groups: Path, text: str, expected: int) -> None:
    """`docker run --cpus=2.5`: the container's own group is the top that it sees."""
    write(groups / "own", "0::/docker/4f\n")
    write(groups / "cgroup/cpu.max", text + "\n")
    assert cores.usable_cores() == expected


def test_smallest_quota_of_all_groups_above(groups: Path) -> None:
    """`CPUQuota=` of a slice limits the services in it."""
    write(groups / "own", "0::/work.slice/job.service\n")
    write(groups / "cgroup/work.slice/cpu.max", "600000 100000\n")
    write(groups / "cgroup/work.slice/job.service/cpu.max", "800000 100000\n")
    assert cores.usable_cores() == 6


@pytest.mark.parametrize(("quota", "expected"), [("400000", 4), ("-1", 64)])
def test_quota_of_version_1(groups: Path, quota: str, expected: int) -> None:
    """Only the line of the controller of the processor counts."""
    write(groups / "own", "3:cpuset:/\n2:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n")
    write(groups / "cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", quota + "\n")
    write(groups / "cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    write(groups / "cgroup/cpuset/cpu.cfs_quota_us", "100000\n")
    assert cores.usable_cores() == expected


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_share_the_cores(launcher: str, groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, ranks = LAUNCHERS[launcher]
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores.local_ranks() == ranks
    assert threads_of_rank() == 64 // ranks
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_of_rank() == 5


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 40])
def test_runs_of_a_sweep_share_the_cores(num_ranks: int, groups: Path) -> None:
    """Two runs at a time of several ranks each start no more threads together than there are cores, if it can be."""
    launch = LaunchConfig(num_gpus=num_ranks, parallel=2)
    grid = Grid(recipe="", out="", baseline="a", arms={"a": []}, launch=launch)
    places = _places(grid)
    assert len(places) == 2
    assert sum(place.num_threads * num_ranks for place in places) <= max(64, 2 * num_ranks)
    assert places[0].num_threads == max(1, math.floor(64 / (2 * num_ranks)))


def test_this_machine_has_cores() -> None:
    """What the operating system says of this process can be read."""
    assert 1 <= cores.usable_cores() <= (os.cpu_count() or 1)
    assert torch.get_num_threads() >= 1
