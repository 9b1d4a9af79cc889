"""Processes that run the engine's tests, and what they found: every case is run once and asked about by many tests."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.engine.oracle import PlainRun, plain_training
from tests.engine.training import Case, Outcome, Record, train
from tests.ranks import Ranks

Runner = Callable[[Case, int], list[Outcome]]
Oracle = Callable[[Case, int], PlainRun]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost the oracle more than they bring, most of all beside the ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def outcomes(pools: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs a case on W ranks, once in all of pytest's workers; what each rank saw."""
    base, worker = tmp_path_factory.getbasetemp(), os.environ.get("PYTEST_XDIST_WORKER")
    shared = (base.parent if worker else base) / "outcomes"  # with workers each has a folder in that of the session
    shared.mkdir(exist_ok=True)
    seen: dict[tuple[str, int], list[Outcome]] = {}

    def run(case: Case, world_size: int) -> list[Outcome]:
        key = (repr(case), world_size)
        if key not in seen:
            file = shared / hashlib.sha256(repr(key).encode()).hexdigest()
            if file.exists():
                seen[key] = pickle.loads(file.read_bytes())
            else:
                seen[key] = pools[world_size].run(train, case)
                part = file.with_suffix(f".{worker}")
                part.write_bytes(pickle.dumps(seen[key]))
                part.rename(file)
        return seen[key]

    return run


@pytest.fixture(scope="session")
def plain_runs(outcomes: Runner) -> Oracle:
    """The plain loop over the coresets that the engine chose on W ranks, once."""
    seen: dict[tuple[str, int], PlainRun] = {}

    def run(case: Case, world_size: int) -> PlainRun:
        key = (repr(case), world_size)
        if key not in seen:
            seen[key] = plain_training(case, case.records(), outcomes(case, world_size)[0].steps)
        return seen[key]

    return run


@pytest.fixture(scope="session")
def data() -> list[Record]:
    """The dataset that cases train on unless they say otherwise."""
    return Case("data").records()
