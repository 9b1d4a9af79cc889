"""A checkpoint of one number of ranks goes on at another: same data, same selection, same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.oracle import largest_difference
from tests.engine.training import NOTHING_PERSISTS, Case, parameters, start, step
from tests.ranks import Ranks

CASES = [
    Case("full", stage=0),
    Case("full", stage=1),
    Case("lora", lora=True, stage=1),
    Case("full", stage=2, colm={"probe": {"estimator": "exact"}}),
    Case("lora", lora=True, stage=2, colm={"probe": {"estimator": "sketch", "num_probes": 32}}),
    Case("full", stage=3, zero=NOTHING_PERSISTS),
    Case("lora", lora=True, stage=3, zero=NOTHING_PERSISTS),
]

BY_DEFAULT = {(3, False, 2, 1), (2, True, 1, 2)}
"""Stage, LoRA, ranks before and after; the others are slow tests."""


def save_and_go_on(case: Case, folder: str) -> dict[str, Any]:
    """In a rank: two steps, a checkpoint, two more steps."""
    engine = start(case)
    for _ in range(2):
        step(engine)
    engine.save_checkpoint(folder)
    chosen = [sorted(step(engine).chosen) for _ in range(2)]
    found = {"chosen": chosen, "parameters": parameters(engine)}
    engine.destroy()
    return found


def load_and_go_on(case: Case, folder: str) -> dict[str, Any]:
    """In a rank: the last two steps again, from the checkpoint."""
    engine = start(case)
    engine.load_checkpoint(folder)
    counts = engine.step_count, engine.num_samples, engine.get_lr()[0]
    chosen = [sorted(step(engine).chosen) for _ in range(2)]
    found = {"chosen": chosen, "parameters": parameters(engine), "counts": counts}
    engine.destroy()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        pytest.param(
            case,
            *ranks,
            id=f"{case.name}-stage{case.stage}-{ranks[0]}-{ranks[1]}",
            marks=() if (case.stage, case.lora, *ranks) in BY_DEFAULT else pytest.mark.slow,
        )
        for case in CASES
        for ranks in ((2, 1), (1, 2))
    ],
)
def test_resharding(case: Case, before: int, after: int, pools: dict[int, Ranks], tmp_path: Path) -> None:
    expected = pools[before].run(save_and_go_on, case, str(tmp_path))[0]
    found = pools[after].run(load_and_go_on, case, str(tmp_path))[0]
    assert found["counts"][:2] == (2, 2 * 13)
    assert found["chosen"] == expected["chosen"]
    assert largest_difference(found["parameters"], expected["parameters"]) <= 1e-6
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".") or "universal" in path.name]
    assert left == []  # nothing of the conversion stays
