"""The model card says what the run's files say and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from colm_ds.errors import DataError
from colm_ds.export.model_card import model_card, write_model_card
from colm_ds.recipes.sections import ModelConfig
from tests.report.run_folders import write_run

RECIPE = {"steps": 120, "model": {"name_or_path": "someone/some-model", "dtype": "bfloat16"}, "lora": {"rank": 8}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", "colm-spsa", config={"recipe": RECIPE})


def card_of(run: Path, folder: Path, **changes: object) -> str:
    arguments = {"kind": "adapter", **changes}
    return write_model_card(folder, run, **arguments).read_text()  # type: ignore[arg-type]


def front_matter(card: str) -> dict[str, object]:
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    found: dict[str, object] = yaml.safe_load(matter)
    return found


def test_finished_run(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path)
    assert front_matter(card) == {
        "base_model": "someone/some-model",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["colm", "deepspeed", "lora"],
    }
    summary = json.loads((run / "summary.json").read_text())
    assert "# colm-spsa\n" in card
    assert "for `someone/some-model`, trained by colm_ds on mini-batch coresets" in card
    assert "9,300 training examples from 6 sources" in card
    assert "| `dates` | 420 | yes |" in card
    assert "| `sums` | 4,000 |  |" in card
    assert f"| Held-out loss, all examples | {summary['heldout']['overall']:.4f} |" in card
    assert f"| Held-out loss, mean over sources | {summary['heldout']['macro']:.4f} |" in card
    assert f"{summary['heldout']['per_source']['logic']:.4f}" in card
    assert f"| Exact match, all questions | {summary['exact_match']['overall']:.1%} |" in card
    assert f"| Step time, median, s | {summary['step_s']['median']:.3g} |" in card
    assert f"| Peak memory of a rank, GiB | {summary['peak_memory_gib']['peak']:.3g} |" in card
    assert "- Estimator: spsa" in card
    assert "- LoRA: rank 8" in card
    assert "0123abc" in card
    assert 'from_pretrained("someone/some-model", dtype="bfloat16")' in card


def test_checkpoint_before_the_end(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path, step=50)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    at_40 = next(entry for entry in entries if entry["step"] == 40)
    assert "50 optimizer steps of 120 planned" in card
    assert f"| Held-out loss after step 40, all examples | {at_40['heldout']['overall']:.4f} |" in card
    assert "| held-out loss after step 40 |" in card
    assert "| Examples trained on | 3,200 |" in card
    assert "Exact match" not in card
    assert "Wall time" not in card
    last = card_of(run, tmp_path, step=120)
    assert "Exact match, all questions" in last
    assert "planned" not in last


def test_what_a_run_does_not_say_is_left_out() -> None:
    card = model_card({"name": "bare"}, None, kind="model")
    assert front_matter(card)["library_name"] == "transformers"
    assert "None" not in card
    assert "nan" not in card
    for title in ("## Data", "## Numbers", "## Made with"):
        assert title not in card


def test_base_that_is_no_hub_name(run: Path, tmp_path: Path) -> None:
    base = ModelConfig(name_or_path="/data/models/base", gguf_file="base.Q4.gguf")
    card = card_of(run, tmp_path, base=base)
    assert "base_model" not in front_matter(card)  # the hub refuses paths
    assert "for `base.Q4.gguf` of `base`" in card
    assert '"/data/models/base", gguf_file="base.Q4.gguf"' in card
    random = ModelConfig(config={"model_type": "llama"})
    assert "--merge` writes both together" in card_of(run, tmp_path, base=random)


def test_plain_training_is_not_called_a_coreset(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "plain-64")
    card = card_of(run, tmp_path, kind="model")
    assert "a random part of every large batch" in card
    assert "Estimator" not in card


def test_names_that_are_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "colm-spsa", sources={"a|b`c": 10, "plain": 90}, small=["a|b`c"])
    assert "| `a\\|b'c` | 10 | yes |" in card_of(run, tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the output of a run"):
        write_model_card(tmp_path, tmp_path, kind="model")
