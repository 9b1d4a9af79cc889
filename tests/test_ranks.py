"""The tests' own process groups: results and failures of every rank reach the test, and nothing is left running."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, Ranks

pytestmark = pytest.mark.distributed


def describe(offset: int) -> tuple[int, int, int, torch.Tensor]:
    """Process, rank, number of threads and the sum over ranks of (rank + offset)."""
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), torch.get_num_threads(), total


def fail_on(rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} cannot go on")
    dist.barrier()


def die_on(rank: int) -> None:
    """End one rank without a word while the others wait for it."""
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang(folder: str) -> None:
    """Write down the process and do nothing for a long time."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def return_what_can_not_be_sent() -> object:
    """A result that has no place in a file."""
    return lambda: None


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_rank_returns() -> None:
    with Ranks(2) as ranks:
        first, second = ranks.run(describe, 10), ranks.run(describe, 20)
        pids = [result[0] for result in first]
        assert [result[0] for result in second] == pids  # the same processes again
        assert [result[1:3] for result in first] == [(0, 1), (1, 1)]
        assert [int(result[3]) for result in first + second] == [21, 21, 41, 41]
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)


def test_failures_reach_the_test_and_ranks_start_anew(tmp_path: Path) -> None:
    with Ranks(2) as ranks:
        with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Traceback.*fail_on.*ValueError: rank 1 cannot go on"):
            ranks.run(fail_on, 1)
        pids = [result[0] for result in ranks.run(describe, 0)]
        with pytest.raises(RankError, match=r"(?s)rank 0 of 2: ended with exit code -9. Its output:.*last words"):
            ranks.run(die_on, 0)
        assert not any(is_running(pid) for pid in pids)
        with pytest.raises(RankError, match=r"(?s)rank 0 of 2: Traceback.*rank 1 of 2: Traceback"):
            ranks.run(return_what_can_not_be_sent)
        ranks.run(describe, 0)
        with pytest.raises(RankError, match=r"no result after 0.5 s"):
            ranks.run(hang, str(tmp_path), timeout_s=0.5)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert len(pids) == 2
        assert not any(is_running(pid) for pid in pids)
