"""Global generators are seeded as transformers seeds them, without what it imports for that."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colm_ds.randomness import random_state, restore_random_state, seed_global_generators


def drawn() -> tuple[Any, ...]:
    """Some numbers of every generator."""
    return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_numbers_are_those_of_transformers(seed: int) -> None:
    from transformers import set_seed

    state = random_state()
    try:
        set_seed(seed)
        wanted = drawn()
        seed_global_generators(seed)
        assert drawn() == wanted
        assert drawn() != wanted
    finally:
        restore_random_state(state)


def test_a_run_without_lora_loads_no_peft_and_draws_nothing(repo_root: Path) -> None:
    """Their imports take seconds, on every rank of every run."""
    code = (
        "import sys\nimport colm_ds.training.run\n"
        "from colm_ds.randomness import seed_global_generators\nseed_global_generators(0)\n"
        "print([name for name in ('peft', 'bitsandbytes', 'matplotlib', 'trl') if name in sys.modules])"
    )
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[]"
