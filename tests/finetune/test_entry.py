"""The entry point as a user starts it: under the launcher with two ranks, with good input and with bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.data.generated.mixture import write_mixture
from tests.ports import worker_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

ROOT = Path(__file__).resolve().parents[2]
PORT = str(worker_port(17))
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Outcome:
    code: int
    output: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry")
    write_mixture(folder / "data", seed=1, scale=0.02)
    return folder


def recipe_of(folder: Path, **changes: object) -> dict[str, object]:
    recipe: dict[str, object] = {
        "name": "test",
        "output_dir": str(folder / "run"),
        "overwrite": True,
        "steps": 3,
        "micro_batch_size": 3,
        "model": {"config": TINY},
        "tokenizer": str(folder / "data" / "tokenizer"),
        "data": {"train": str(folder / "data" / "train.jsonl"), "max_length": 96, "cache_dir": None},
        "colm": {"large_batch_size": 16, "coreset_size": 8, "mask": {"size": 32}},
        "optimizer": {"lr": 1e-3},
        "deepspeed": str(ROOT / "ds_configs" / "zero0.json"),
    }
    return {**recipe, **changes}


def start(
    folder: Path,
    recipe: dict[str, object],
    *overrides: str,
    ranks: int = 2,
    program: tuple[str, ...] = ("finetune/train.py",),
) -> Outcome:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks)]
    command = [*launcher, "--master_port", PORT, *program, str(path), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    return Outcome(done.returncode, done.stdout + done.stderr)


def metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().split("\n") if line]


VARIANTS = {
    "spsa": (0, {"probe": {"estimator": "spsa"}}, False),
    "exact with cluster weights": (0, {"probe": {"estimator": "exact"}, "weights": "cluster"}, True),
    "sketch with matched weights": (
        3,
        {"probe": {"estimator": "sketch", "num_probes": 16}, "mask": {}, "weights": "matched"},
        True,
    ),
    "exact at stage 3": (3, {"probe": {"estimator": "exact"}}, False),
    "random": (3, {"selector": "random"}, False),
    "keep_random": (0, {"selector": "keep_random"}, True),
    "full": (0, {"selector": "full", "coreset_size": 16}, False),
}


BY_DEFAULT = {"sketch with matched weights"}
"""The others start the launcher for what tests/engine and tests/training ask in fewer seconds."""


def some_by_default(names: Iterable[str]) -> list[Any]:
    """Cases, those beyond `BY_DEFAULT` marked slow."""
    return [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_by_default(VARIANTS))
def test_runs_and_leaves_what_the_design_says(folder: Path, name: str) -> None:
    stage, changes, lora = VARIANTS[name]
    recipe = recipe_of(folder, deepspeed=str(ROOT / "ds_configs" / f"zero{stage}.json"))
    recipe["colm"] = {**recipe["colm"], **changes}  # type: ignore[dict-item]
    if lora:
        recipe["lora"] = {"rank": 4, "alpha": 8}
    evaluated = name in ("spsa", "exact at stage 3")
    if evaluated:
        recipe["evaluation"] = {"exact_match": True, "max_new_tokens": 8, "every": 2}
        recipe["data"] = {**recipe["data"], "heldout": str(folder / "data" / "heldout.jsonl")}  # type: ignore[dict-item]
    outcome = start(folder, recipe)
    assert outcome.code == 0, outcome.output
    assert "INFO" not in outcome.output
    steps = [entry for entry in metrics(folder) if "loss" in entry]
    size = 16 if name == "full" else 8
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    for entry in steps:
        assert sum(entry["coreset"]["per_source"].values()) == size  # type: ignore[index]
        assert entry["loss"] > 0  # type: ignore[operator]
        assert {"train", "step", "total"} <= set(entry["time_s"])  # type: ignore[call-overload]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["examples_trained"] == 3 * size
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["world_size"] == 2
    assert config["versions"]["deepspeed"]
    check_weights(folder / "run", lora)
    if evaluated:
        assert summary["exact_match"]["num_questions"] == 12
        assert [entry["step"] for entry in metrics(folder) if "heldout" in entry] == [0, 2, 3]


@pytest.mark.slow
def test_the_launcher_starts_the_command_as_a_module(folder: Path) -> None:
    """It puts `--local_rank=N` before the name of the subcommand."""
    outcome = start(folder, recipe_of(folder), program=("--module", "colm_ds.cli", "train"))
    assert outcome.code == 0, outcome.output
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "finished"
    refused = start(folder, recipe_of(folder), "colm.corset_size=4", program=("--module", "colm_ds.cli", "train"))
    assert refused.code != 0
    assert refused.output.count("Did you mean 'coreset_size'?") == 1, refused.output


def check_weights(run: Path, lora: bool) -> None:
    """The written weights load without colm_ds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if lora:
        from peft import PeftModel
        from transformers import AutoConfig

        tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=-(-len(tokenizer) // 8) * 8))
        model = PeftModel.from_pretrained(base, run / "adapter")
        assert any(float(p.abs().sum()) > 0 for n, p in model.named_parameters() if "lora_B" in n)
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        assert model.num_parameters() > 10_000


def broken_line(folder: Path) -> str:
    lines = (folder / "data" / "train.jsonl").read_text().split("\n")
    lines[4] = lines[4][:-3]
    (folder / "broken.jsonl").write_text("\n".join(lines))
    return str(folder / "broken.jsonl")


def empty_output(folder: Path) -> str:
    lines = (folder / "data" / "train.jsonl").read_text().split("\n")
    lines[6] = json.dumps({**json.loads(lines[6]), "output": ""})
    (folder / "empty.jsonl").write_text("\n".join(lines))
    return str(folder / "empty.jsonl")


BAD_INPUT = {
    "unknown key": (lambda f: ["colm.corset_size=4"], "Did you mean 'coreset_size'?"),
    "b more than r": (lambda f: ["colm.coreset_size=32"], "more than colm.large_batch_size = 16"),
    "broken line": (lambda f: [f"data.train={broken_line(f)}"], "broken.jsonl:5"),
    "missing file": (lambda f: [f"data.train={f}/nothing.jsonl"], "no such file"),
    "empty output": (lambda f: [f"data.train={empty_output(f)}"], "empty.jsonl:7"),
    "unknown family": (
        lambda f: ["model.config={model_type: mamba, hidden_size: 32, num_hidden_layers: 2}"],
        "model of type 'mamba'",
    ),
}


@pytest.mark.parametrize("name", some_by_default(BAD_INPUT))
def test_bad_input_ends_all_ranks_with_one_message(folder: Path, name: str) -> None:
    changes, message = BAD_INPUT[name]
    outcome = start(folder, recipe_of(folder), *changes(folder))
    assert outcome.code != 0
    assert outcome.output.count(message) == 1, outcome.output
    assert "Traceback" not in outcome.output
    assert "colm_ds/" not in outcome.output
