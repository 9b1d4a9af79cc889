"""From a recipe through training under the launcher to weights that transformers loads and that score the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from colm_ds.data import load_examples
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.export.run import export_run
from tests.finetune.test_entry import ROOT, recipe_of, start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]


def export(*arguments: str) -> str:
    """`colm-ds export` as a user runs it; what it prints."""
    command = [sys.executable, "-m", "colm_ds.cli", "export", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def load_as_the_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the card's Python in its folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    with monkeypatch.context() as context:
        context.chdir(folder)
        exec(code[1], names)
    return names


def heldout_loss(model: Any, tokenizer: Any, path: Path) -> float:
    """Mean loss of a labelled token, one example after the other."""
    dataset = load_examples(path, tokenizer, 96, source_key="source", cache_dir=None)
    total, count = 0.0, 0
    for index in range(len(dataset)):
        tokens, labels = torch.as_tensor(dataset[index].input_ids), torch.as_tensor(dataset[index].labels)
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens[None].long()).logits[0, :-1]
        total += float(F.cross_entropy(logits, labels[1:].long(), ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


@pytest.mark.slow
def test_lora_run_at_stage_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mixture(tmp_path / "data", seed=1, scale=0.02)
    heldout = tmp_path / "data" / "heldout.jsonl"
    recipe = recipe_of(tmp_path, deepspeed=str(ROOT / "ds_configs" / "zero3.json"), save_every=2)
    recipe |= {"lora": {"rank": 4, "alpha": 8}, "optimizer": {"lr": 0.01}}
    recipe["data"] = {**recipe["data"], "heldout": str(heldout)}  # type: ignore[dict-item]
    outcome = start(tmp_path, recipe)
    assert outcome.code == 0, outcome.output

    run, summary = tmp_path / "run", json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "after step 3" in export(str(run), "--merge")
    loaded = load_as_the_card_says(run / "export" / "merged", monkeypatch)
    loss = heldout_loss(loaded["model"], loaded["tokenizer"], heldout)
    assert loss == pytest.approx(summary["heldout"]["overall"], abs=1e-5)
    card = (run / "export" / "merged" / "README.md").read_text()
    assert f"| Held-out loss, all examples | {loss:.4f} |" in card

    # The same from a run that was killed after its checkpoint: no summary, no adapter.
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    assert export_run(run, merge=True, tag="step_2", out=tmp_path / "second").step == 2
    second = load_as_the_card_says(tmp_path / "second", monkeypatch)
    assert abs(heldout_loss(second["model"], second["tokenizer"], heldout) - loss) > 1e-4
    assert "of 3 planned" in (tmp_path / "second" / "README.md").read_text()
