"""The demo's last sentences follow from its numbers, whichever arm is ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from colm_ds.sweep.demo import ARMS, CONTROL, HALF, LARGE, PAPER, PLAIN, TOKENS, answer, caveats, evidence, too_short

ENDS = {PLAIN: 2.2, TOKENS: 2.1, HALF: 2.5, CONTROL: 2.15, PAPER: 2.12, LARGE: 2.0}
TIMES = {PLAIN: 1.0, TOKENS: 1.02, HALF: 2.0, CONTROL: 1.0, PAPER: 1.9, LARGE: 2.0}


@dataclass
class _Arm:
    """As much of an arm as the sentences read."""

    name: str
    numbers: dict[str, float]

    def mean(self, key: str) -> float | None:
        return self.numbers.get(key)


def _arms(ends: dict[str, float], times: dict[str, float], spread: float = 1.5) -> dict[str, Any]:
    return {
        arm.name: _Arm(
            arm.name,
            {
                "heldout.overall": (ENDS | ends)[arm.name],
                "step_s.median": (TIMES | times)[arm.name],
                "step_s.p10": 1.0,
                "step_s.p90": spread,
            },
        )
        for arm in ARMS
    }


@pytest.mark.parametrize(
    ("ends", "times", "last"),
    [
        (
            {},
            {},
            f"{TOKENS} did best: 0.100 nats per token lower than {PLAIN}, 50% of what doubling the batch gains, "
            "at the same price.",
        ),
        ({}, {TOKENS: 1.18}, "50% of what doubling the batch gains, and its step took 18% more time."),
        ({TOKENS: 1.9}, {TOKENS: 0.8}, f"0.300 nats per token lower than {PLAIN}, and its step took 20% less time."),
        ({LARGE: 2.3}, {}, f"{TOKENS} did best: 0.100 nats per token lower than {PLAIN}, at the same price."),
        ({LARGE: 2.2}, {}, f"{TOKENS} did best: 0.100 nats per token lower than {PLAIN}, at the same price."),
        ({CONTROL: 2.0}, {}, "which examples of a source were taken did not matter here."),
        ({PLAIN: 1.5}, {}, "No choice of 32 was better here than any 32: train plainly."),
    ],
)
def test_the_verdict_names_the_best_arm_and_its_measured_price(
    ends: dict[str, float], times: dict[str, float], last: str
) -> None:
    sentences = answer(_arms(ends, times))
    assert sentences[-1].endswith(last)
    assert "for nothing" not in " ".join(sentences)
    assert f"ends at {(ENDS | ends)[HALF]:.3f}" in evidence(_arms(ends, times))[1]


def test_a_short_or_disturbed_run_is_called_so() -> None:
    steady, disturbed = (cast(Any, list(_arms({}, {}, spread).values())) for spread in (1.5, 3.0))
    assert too_short(150) == []
    assert "30 steps are too few" in too_short(30)[0]
    assert len(caveats(steady)) == 1
    assert "varied more than twofold" in caveats(disturbed)[0]
