"""Coherence in words."""

from __future__ import annotations

from typing import Any

import pytest

from colm_ds.run_folder.coherence import agreement, coherence_summary


def entry(coherence: dict[str, float], seen: dict[str, int]) -> dict[str, Any]:
    return {"step": 1, "coreset": {"coherence": coherence, "seen": seen}}


@pytest.mark.parametrize(
    ("coherence", "floor", "said"),
    [(0.8, 0.2, "agree well"), (0.4, 0.2, "agree in part"), (0.22, 0.2, "close to unrelated"), (1.0, 1.0, "unrelated")],
)
def test_verdicts(coherence: float, floor: float, said: str) -> None:
    assert said in agreement(coherence, floor)


def test_means_over_steps_and_sources() -> None:
    entries = [
        entry({"web": 0.6, "code": 0.5}, {"web": 16, "code": 4, "math": 2}),
        entry({"web": 0.4}, {"web": 25, "code": 1, "math": 3}),
        entry({}, {"web": 16, "code": 4, "math": 2}),  # a plain step
        {"step": 4, "heldout": {}},
    ]
    found = coherence_summary(entries, ["math"])
    assert found["per_source"] == {"web": pytest.approx(0.5), "code": 0.5}
    assert found["unrelated"] == {"web": pytest.approx((0.25 + 0.2) / 2), "code": 0.5}
    assert found["verdict"].startswith("coherence 0.50, where unrelated gradients would give 0.36: ")


def test_joint_pool_leaves_small_sources_out() -> None:
    entries = [entry({"joint": 0.9}, {"web": 12, "code": 4, "math": 9})]
    assert coherence_summary(entries, ["math"])["unrelated"] == {"joint": 0.25}
    assert coherence_summary(entries, [])["unrelated"] == {"joint": 0.2}


def test_nothing_looked_at_nothing_said() -> None:
    assert coherence_summary([entry({}, {"web": 3}), entry({"web": float("nan")}, {"web": 3})], []) == {}
