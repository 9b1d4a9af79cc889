"""A recipe for a small store of generated text, and the programs of pretrain/ as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.ports import worker_port

ROOT = Path(__file__).resolve().parents[2]
PORT = str(worker_port(47))
SHARES = {"parliament": 5.0, "code": 25.0, "comments": 5.0, "abstracts": 5.0, "articles": 60.0}
WEIGHTS = {f"generated/{kind}": share for kind, share in SHARES.items()}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Prepared:
    """Generated text, its store and a recipe of a tiny model for it.

    Attributes:
        text: folder of the files in the Pile's format.
        store: the finished store.
        recipe: file of the recipe.
        said: what prepare.py printed.
    """

    text: Path
    store: Path
    recipe: Path
    said: str


def make_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe for the store in this folder; six steps, a checkpoint and perplexity every second one."""
    recipe = yaml.safe_load((ROOT / "pretrain" / "recipes" / "cpu_pile5.yaml").read_text())
    recipe["model"]["config"] |= {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64}
    recipe["data"] |= {"store": str(folder / "store"), "chunk_tokens": 64, "weights": WEIGHTS}
    recipe["prepare"] |= {"vocabulary_size": 400, "sample_mb": 0.3, "holdout": 0.1}
    recipe["evaluation"] = {"every": 2, "chunks_per_source": 3}
    recipe |= {"steps": 6, "save_every": 2, "deepspeed": str(ROOT / "ds_configs" / "zero2.json")}
    recipe["lr_schedule"] = {"kind": "constant", "warmup_fraction": 0.0}  # so that `steps` may change
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program from the repository's root."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def launcher(ranks: int) -> tuple[str, ...]:
    """The beginning of a command under DeepSpeed's launcher; none for a single rank."""
    if ranks == 1:
        return ()
    return ("-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", PORT)


def train(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pretrain/train.py."""
    return call(*launcher(ranks), "pretrain/train.py", *arguments)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def curve(folder: Path) -> list[Any]:
    """Loss and held-out losses of every step."""
    return [(row["step"], row.get("loss"), row.get("heldout")) for row in read_metrics(folder)]
