"""`pretrain/prepare.py` and `pretrain/train.py` as a user starts them, on a mixture that the project makes itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from colm_ds.data.generated_text import write_text

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

ROOT = Path(__file__).resolve().parents[2]
PORT = "29647"
SHARES = {"parliament": 5.0, "code": 25.0, "comments": 5.0, "abstracts": 5.0, "articles": 60.0}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS = {f"generated/{kind}": share for kind, share in SHARES.items()}


def call(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def launch(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", PORT)
    return call(*launcher, "pretrain/train.py", *arguments)


def test_prepare_and_train(tmp_path: Path) -> None:
    """A store, a run on two ranks, and the same run stopped half-way and gone on with: the same losses."""
    write_text(tmp_path / "text", megabytes=0.6)
    recipe = yaml.safe_load((ROOT / "pretrain" / "recipes" / "cpu_pile5.yaml").read_text())
    recipe["model"]["config"] |= {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64}
    recipe["data"] |= {"store": str(tmp_path / "store"), "chunk_tokens": 64, "weights": WEIGHTS}
    recipe["prepare"] |= {"vocabulary_size": 400, "sample_mb": 0.3, "holdout": 0.1}
    recipe["evaluation"] = {"every": 2, "chunks_per_source": 3}
    recipe |= {"steps": 4, "save_every": 2, "deepspeed": str(ROOT / "ds_configs" / "zero2.json")}
    recipe["lr_schedule"] = {"kind": "constant", "warmup_fraction": 0.0}  # so that `steps` may change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    prepared = call("pretrain/prepare.py", str(path), "--data", str(tmp_path / "text"))
    assert prepared.returncode == 0, prepared.stderr
    assert "generated/articles" in prepared.stdout

    whole = launch(2, str(path), f"output_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    rows = read(tmp_path / "whole")
    heldout = [row["heldout"] for row in rows if "heldout" in row]
    assert len(heldout) == 3  # before, after steps 2 and 4
    assert set(heldout[0]["per_source"]) == set(WEIGHTS)
    assert heldout[0]["overall"] == pytest.approx(math.log(400), abs=0.3)  # nothing learnt yet
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "best_model")
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())

    assert launch(2, str(path), f"output_dir={tmp_path / 'parts'}", "steps=2").returncode == 0
    (tmp_path / "parts" / "summary.json").unlink()  # as if it had been stopped there
    again = launch(2, str(path), f"output_dir={tmp_path / 'parts'}")
    assert again.returncode == 0, again.stderr
    assert "going on after step 2" in again.stderr
    assert losses(read(tmp_path / "parts")) == losses(rows)


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]


def losses(rows: list[dict[str, object]]) -> list[object]:
    return [row["loss"] for row in rows if "loss" in row]
