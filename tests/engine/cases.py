"""Runs that several test files ask about: three estimators, full and LoRA, at every stage of ZeRO, on 1 and 2 ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.training import NOTHING_PERSISTS, Case

ESTIMATORS = ("spsa", "exact", "sketch")

# What is computed from the coreset: it has no say in which examples are chosen from a given model.
_TRAINING: dict[tuple[str, bool], dict[str, str]] = {
    ("spsa", False): {"weights": "uniform", "loss_normalization": "example"},
    ("spsa", True): {"weights": "cluster", "loss_normalization": "token"},
    ("exact", False): {"weights": "matched", "loss_normalization": "token"},
    ("exact", True): {"weights": "uniform", "loss_normalization": "example"},
    ("sketch", False): {"weights": "cluster", "loss_normalization": "example"},
    ("sketch", True): {"weights": "matched", "loss_normalization": "token"},
}

# How the coreset is cut into micro-batches: it must have no say in anything.
_MICRO_BATCHES: tuple[tuple[int, int | None], ...] = ((3, None), (1, None), (50, None), (50, 40))


def matrix_case(estimator: str, lora: bool, stage: int) -> Case:
    """One run of the matrix."""
    size, tokens = _MICRO_BATCHES[(stage + lora) % 4]
    probe: dict[str, Any] = {"estimator": estimator}
    if estimator == "spsa":
        probe |= {"num_probes": 1 + 3 * lora}
    return Case(
        f"{estimator}-{'lora' if lora else 'full'}-stage{stage}",
        lora=lora,
        stage=stage,
        zero=NOTHING_PERSISTS if stage == 3 else {},
        colm={"probe": probe, "micro_batch_tokens": tokens, **_TRAINING[estimator, lora]},
        deepspeed={"train_micro_batch_size_per_gpu": size},
    )


MATRIX = [
    pytest.param(
        matrix_case(estimator, lora, stage),
        world_size,
        id=f"{estimator}-{'lora' if lora else 'full'}-stage{stage}-{world_size}ranks",
        # Every pair of estimator, weights and stage meets by default; every three of them in a slow run.
        marks=() if world_size == 1 or (place + lora + stage) % 2 == 0 else pytest.mark.slow,
    )
    for place, estimator in enumerate(ESTIMATORS)
    for lora in (False, True)
    for world_size, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3))
]
"""Cases and numbers of ranks."""
