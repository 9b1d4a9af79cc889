"""Fifty more steps leave no tensor, hook or replaced forward behind."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.engine.training import NOTHING_PERSISTS, Case, attachments, start
from tests.ranks import Ranks

DEEP = {"num_hidden_layers": 3}
REPLAY = {"replay": "on"}

CASES = [
    Case("spsa", stage=2),
    Case("exact", stage=3, zero=NOTHING_PERSISTS, colm={"probe": {"estimator": "exact"}}),
    Case("sketch", lora=True, stage=1, colm={"probe": {"estimator": "sketch", "num_probes": 16}, "weights": "matched"}),
    Case("replay", lora=True, stage=2, checkpointing=True, model=DEEP, colm=REPLAY),
    Case("workers", colm={"selector": "keep_random", "num_workers": 1}),
]


def alive_after(case: Case, checks: list[int]) -> list[tuple[int, int]]:
    """In a rank: tensors alive, and how many hooks and replaced forwards there are, after the given steps."""
    engine = start(case)
    found = []
    for number in range(1, max(checks) + 1):
        engine.train_batch()
        if number in checks:
            if engine.coreset_selector._store is not None:
                engine.coreset_selector._store.begin(0)  # what the next step forgets first: its size follows the batch
            gc.collect()
            tensors = sum(isinstance(item, torch.Tensor) for item in gc.get_objects())
            hooks = sum(len(part) for _, *parts in attachments(engine.module) for part in parts[3:])
            found.append((tensors, hooks))
    engine.destroy()
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_accumulates(case: Case, pools: dict[int, Ranks]) -> None:
    for before, after in pools[2].run(alive_after, case, [10, 60]):
        assert after[0] <= before[0] + 10  # one a step would be 50 more
        assert after[1] == before[1]
