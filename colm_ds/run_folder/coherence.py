"""Coherence over a run in words: whether medoids can stand for other examples of their source (docs/HOW.md)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

JOINT = "joint"
"""Name of the pool of all big sources."""


def agreement(coherence: float, floor: float) -> str:
    """Coherence in words, by its place between unrelated gradients and equal ones.

    Args:
        coherence: |mean g| / mean |g|.
        floor: what unrelated gradients would give, 1/sqrt(n).
    """
    place = (coherence - floor) / (1 - floor) if floor < 1 else 0.0
    if place > 0.5:
        return "examples of one source agree well, and medoids stand for them"
    if place > 0.1:
        return "examples of one source agree in part, and medoids may do better than random picks"
    return "examples of one source are close to unrelated, and medoids cannot stand for them"


def coherence_summary(entries: Sequence[Mapping[str, Any]], small: Collection[str]) -> dict[str, Any]:
    """Coherence of a run's steps by source, what unrelated gradients would give, and a verdict.

    Args:
        entries: the steps of `metrics.jsonl`.
        small: names of the sources that were kept whole.

    Returns:
        `per_source` and `unrelated` (means over the steps that have it), `verdict`; empty if none looked at gradients.
    """
    values: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    for entry in entries:
        coreset = entry.get("coreset", {})
        seen = coreset.get("seen", {})
        for name, value in coreset.get("coherence", {}).items():
            pooled = name == JOINT and name not in seen
            n = sum(count for other, count in seen.items() if other not in small) if pooled else seen.get(name, 0)
            if n > 1 and math.isfinite(value):
                values.setdefault(name, []).append(value)
                floors.setdefault(name, []).append(1.0 / math.sqrt(n))
    if not values:
        return {}
    per_source, unrelated = ({name: _mean(numbers) for name, numbers in each.items()} for each in (values, floors))
    mean, floor = _mean(list(per_source.values())), _mean(list(unrelated.values()))
    verdict = f"coherence {mean:.2f}, where unrelated gradients would give {floor:.2f}: {agreement(mean, floor)}"
    return {"per_source": per_source, "unrelated": unrelated, "verdict": verdict}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
