"""What the README tells people to do works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
import torch
import colm_ds
from colm_ds.distributed.agreement import single_process_environment
from tests.tiny_models import tiny_model

single_process_environment()
config = json.loads(sys.argv[1])
config["colm"] = {**config["colm"], "large_batch_size": 16, "coreset_size": 8}
config["train_batch_size"] = 8
config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}
tokens = torch.randint(3, 90, (64, 12), generator=torch.Generator().manual_seed(0)).tolist()
dataset = [{"input_ids": row, "labels": row, "source": "ab"[index % 8 == 0]} for index, row in enumerate(tokens)]
model = tiny_model("llama").train()
engine, optimizer, loader, scheduler = colm_ds.initialize(model=model, config=config, training_data=dataset)
for _ in range(2):
    stats = engine.train_batch()
print("trained", stats.examples_trained)
"""


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.distributed
def test_the_two_line_adoption_trains() -> None:
    assert "colm_ds.initialize(" in readme_blocks("diff")[0]
    (section,) = readme_blocks("json")
    config = json.loads("{" + section + "}")
    assert config["train_batch_size"] == config["colm"]["coreset_size"]
    done = run("-c", SCRIPT, json.dumps(config))
    assert done.returncode == 0, done.stderr
    assert "trained 8" in done.stdout


def test_help_of_the_entry_point_explains_every_key() -> None:
    done = run("finetune/train.py", "--help")
    assert done.returncode == 0, done.stderr
    for key in ("colm.coreset_size", "model.gguf_file", "data.max_length", "optimizer.lr"):
        assert key in done.stdout


def test_paths_and_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?:launch|finetune|benchmarks|ds_configs)/[\w./]+\w", text):
        assert (ROOT / path).exists(), path
    done = run("-m", "colm_ds.cli", "report", "--help")
    assert "RUN" in done.stdout
