"""Whoever changed one line of a DeepSpeed script loads the engine and what it needs, and nothing about recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, tempfile
from colm_ds.distributed.agreement import single_process_environment
single_process_environment()
import torch, transformers
import colm_ds
config = transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  vocab_size=50)
data = [{"input_ids": [1 + n % 40, 2, 3 + n % 7, 4], "source": n % 2} for n in range(16)]
settings = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "colm": {"large_batch_size": 8, "coreset_size": 4}}
engine = colm_ds.initialize(model=transformers.LlamaForCausalLM(config), config=settings, training_data=data)[0]
with tempfile.TemporaryDirectory() as folder:
    engine.train_batch()
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    engine.train_batch()
print("LOADED", json.dumps(sorted(name for name in sys.modules if name.startswith("colm_ds."))))
sys.stdout.flush()
os._exit(0)
"""

NOT_NEEDED = ("recipes", "planner", "report", "evaluation", "data", "training", "sweep", "export", "cli")


@pytest.mark.distributed
def test_no_recipe_planner_report_evaluation_or_store_is_loaded(repo_root: Path) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.split("\n") if line.startswith("LOADED")]
    rooms = {name.split(".")[1].strip('"') for name in line.removeprefix("LOADED ").strip("[]").split(", ")}
    assert "engine" in rooms
    assert not rooms & set(NOT_NEEDED)
