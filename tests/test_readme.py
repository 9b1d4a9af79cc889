"""What the README tells people to do works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from colm_ds.cli import COMMANDS
from colm_ds.config.colm import CoLMSection, MaskConfig, ProbeConfig
from colm_ds.selection import SELECTORS

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
tokens = [row[: 4 + index % 9] for index, row in enumerate(tokens)]
dataset = [{"input_ids": row, "labels": row, "source": "ab"[index % 8 == 0]} for index, row in enumerate(tokens)]
model = tiny_model("llama").train()
exec(sys.argv[2])
engine, optimizer, loader, scheduler = colm_ds.initialize(model=model, config=config, training_data=dataset)
for _ in range(2):
    batch = engine.loader.batch(engine.step_count + 1)
    stats = engine.train_batch(batch)
print("trained", stats.examples_trained)
shortest = batch.lengths.sort().values
print("shortest" if stats.tokens == int(shortest[:8].sum()) < int(shortest[-8:].sum()) else "not the shortest")
"""


def readme_blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.distributed
def test_the_two_line_adoption_trains() -> None:
    assert any("+engine, optimizer, loader, scheduler = colm_ds.initialize(" in diff for diff in readme_blocks("diff"))
    (section,) = readme_blocks("json")
    config = json.loads("{" + section + "}")
    assert config["train_batch_size"] == config["colm"]["coreset_size"]
    loops = readme_blocks("python", "docs/INTEGRATIONS.md")
    (loop,) = [block for block in loops if "engine.backward(loss)" in block]
    looped = f"{SCRIPT}\n{loop}\nprint('looped', engine.step_count, engine.last_stats.examples_trained)"
    done = run("-c", looped, json.dumps(config), "")
    assert done.returncode == 0, done.stderr
    assert "trained 8" in done.stdout
    assert "looped 6 8" in done.stdout  # two given batches, then an epoch of floor(64 / 16)


@pytest.mark.distributed
def test_a_selector_in_ten_lines_trains() -> None:
    code = next(block for block in readme_blocks("python", "docs/SELECTORS.md") if "import torch" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = run("-c", SCRIPT, json.dumps({"colm": {"selector": "shortest"}}), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["trained", "8", "shortest"]


def test_every_selector_and_option_has_a_card() -> None:
    text = (ROOT / "docs" / "SELECTORS.md").read_text(encoding="utf-8")
    cards = [line for line in text.splitlines() if line.startswith("| `")]
    for name in SELECTORS:
        assert any(line.startswith(f"| `{name}`") for line in cards), name
    for page in (ROOT / "docs" / "selectors").glob("*.md"):
        assert page.read_text(encoding="utf-8").startswith(f"# `{page.stem}`")
        assert f"(selectors/{page.name})" in text
        assert page.stem in SELECTORS
    for section, keys in ((CoLMSection, ("geometry", "metric", "weights")), (ProbeConfig, ("estimator", "layer"))):
        for key in keys:
            values = get_args(section.model_fields[key].annotation)
            assert len(values) > 1, key
            for value in values:
                assert any(f"`{value}`" in line or f"{key}: {value}" in line for line in cards), (key, value)
    for value in get_args(MaskConfig.model_fields["criterion"].annotation):
        assert any("mask.criterion" in line and value in line for line in cards), value


def test_help_of_the_entry_point_explains_every_key() -> None:
    done = run("finetune/train.py", "--help")
    assert done.returncode == 0, done.stderr
    for key in ("colm.coreset_size", "model.gguf_file", "data.max_length", "optimizer.lr", "data.store", "data.task"):
        assert key in done.stdout


def test_paths_and_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?:launch|finetune|benchmarks|ds_configs)/[\w./]+\w", text):
        assert (ROOT / path).exists(), path
    named = set(re.findall(r"colm-ds ([a-z-]+)", text))
    assert named <= set(COMMANDS), named - set(COMMANDS)
    for name in COMMANDS:
        assert f"`{name}`" in text or name in named, name
