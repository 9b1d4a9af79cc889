"""Where the tests of this folder run: on a CUDA device, or as a rehearsal of most of them on the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.engine.training import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, Case

HAS_GPU = torch.cuda.is_available()

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

_REHEARSED = os.environ.get("COLM_DS_GPU_TESTS_ON_CPU") == "1"

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_GPU or _REHEARSED), reason="needs a CUDA device")]
"""Marks of a test that means something on the CPU too: `COLM_DS_GPU_TESTS_ON_CPU=1` runs it there."""

only_on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
"""Marks of a test that means something on a GPU only."""


def torch_adam(**more: Any) -> dict[str, Any]:
    """Return overrides of the DeepSpeed configuration: PyTorch's AdamW, as DeepSpeed's own has to be compiled."""
    settings = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY, "torch_adam": True}
    return {"optimizer": {"type": "AdamW", "params": settings}, **more}


def case_of(name: str, *, half: bool = False, **settings: Any) -> Case:
    """Return a case with PyTorch's AdamW, in bf16 if asked for."""
    stage = settings.get("stage", 0)
    more: dict[str, Any] = {"bf16": {"enabled": True}} if half else {}
    if half and stage:
        more["data_types"] = {"grad_accum_dtype": "fp32"}
    return Case(name, deepspeed=torch_adam(**more), dtype="bfloat16" if half else "float32", **settings)
