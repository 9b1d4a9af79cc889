"""Processes that run the engine's tests, and what they found: every case is run once and asked about by many tests."""

from __future__ import annotations

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
def outcomes(pools: dict[int, Ranks]) -> Runner:
    """Runs a case on W ranks, once; what each rank saw."""
    seen: dict[tuple[str, int], list[Outcome]] = {}

    def run(case: Case, world_size: int) -> list[Outcome]:
        key = (repr(case), world_size)
        if key not in seen:
            seen[key] = pools[world_size].run(train, case)
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
