"""`python -m colm_ds.integrations.trl sft`: TRL's arguments and ours."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.errors import ConfigError
from tests.engine.oracle import largest_difference
from tests.integrations.runs import forget_deepspeed
from tests.integrations.tiny import SOURCES, rows, save
from tests.tiny_models import tiny_model

pytest.importorskip("trl")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration that trains on one file for each source, in a working directory of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    forget_deepspeed()
    model, _ = save(tmp_path)
    for source in SOURCES:
        pairs = [{key: row[key] for key in ("prompt", "completion")} for row in rows() if row["source"] == source]
        Path(f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    return {
        "model_name_or_path": str(model),
        "datasets": [{"path": "json", "data_files": f"{source}.jsonl"} for source in SOURCES],
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "colm": {"large_batch_size": 16, "log": "all"},
    }


def train(config: dict[str, Any], *options: str) -> None:
    from colm_ds.integrations import trl

    Path("sft.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    trl.main(["sft", "--config", "sft.yaml", *options])


def history(folder: str) -> list[dict[str, float]]:
    """Entries of the training log."""
    states = sorted(Path(folder).glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in log if "loss" in entry]


def weights(folder: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def test_datasets_are_sources_and_a_run_resumes(config: dict[str, Any]) -> None:
    import trl

    whole, original = config, (trl.SFTTrainer, trl.get_dataset)
    train(whole)
    assert (trl.SFTTrainer, trl.get_dataset) == original
    steps = history("out")
    assert len(steps) == 4
    for entry in steps:
        chosen = {key.removeprefix("colm/chosen/"): value for key, value in entry.items() if "/chosen/" in key}
        assert set(chosen) == set(SOURCES)
        assert sum(chosen.values()) == 8
    assert sum(entry["colm/kept_small"] for entry in steps) == sum(entry["colm/chosen/code"] for entry in steps) > 0
    # The rest from the checkpoint; arguments on the command line replace those of the file.
    train({**config, "output_dir": "rest"}, "--resume_from_checkpoint", "out/checkpoint-2")
    assert largest_difference(weights("rest"), weights("out")) == 0.0
    assert largest_difference(weights("out"), tiny_model("llama").state_dict()) > 1e-4


def test_one_dataset_with_a_column(config: dict[str, Any]) -> None:
    """Its sources; its name alone where it has no such column."""
    del config["datasets"]
    folder = Path("data")
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    config |= {"dataset_name": "data", "max_steps": 2}
    train(config, "--colm", '{"large_batch_size": 16, "log": "all"}')
    assert {key for entry in history("out") for key in entry if "/chosen/" in key} == {
        f"colm/chosen/{source}" for source in SOURCES
    }
    with pytest.raises(ConfigError, match=r"colm\.source_column = 'domain': dataset data has no such column"):
        train(config, "--colm", '{"large_batch_size": 16, "source_column": "domain"}')


def test_what_cannot_work_is_said_together(config: dict[str, Any]) -> None:
    config |= {"streaming": True, "colm": {"large_batch_size": 16, "metrik": "l1"}, "num_processes": 2}
    with pytest.raises(ConfigError) as raised:
        train(config)
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 problems in the arguments of trl sft"
    assert "colm.metrik: unknown key. Did you mean 'metric'?" in lines[1]
    assert "--num_processes 2: unknown to trl sft. Options of accelerate go to accelerate launch" in lines[2]
    assert "streaming: examples of a stream are not numbered" in lines[3]


def test_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error has no traceback; other commands of TRL's do not know coresets."""
    monkeypatch.setattr(sys, "argv", ["trl", "dpo"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("colm_ds.integrations.trl", run_name="__main__")
    assert left.value.code == 2
    assert "ConfigError: arguments 'dpo': only sft trains on coresets. Write python -m" in capsys.readouterr().err
