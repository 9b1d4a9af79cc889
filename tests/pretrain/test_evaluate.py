"""`pretrain/evaluate.py` on the folder of a small pretraining run: WiC, COPA, SQuAD, perplexity of its own store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.evaluations import write_data
from tests.pretrain.runs import WEIGHTS, Prepared, call, launcher, read_summary, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run measured on every held-out chunk."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    # positions: the prompts of the question sets are longer than the chunks
    positions = "model.config.max_position_embeddings=512"
    changes = ("steps=2", "save_every=0", "evaluation.chunks_per_source=null", positions)
    done = train(1, str(prepared.recipe), *changes, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
def test_question_sets_and_the_run_s_own_store(run: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    shutil.rmtree(data / "pile5")  # so that there is no other text for perplexity
    done = call(*launcher(2), "pretrain/evaluate.py", str(run), "--data", str(data))
    assert done.returncode == 0, done.stderr
    found = results(run / "evaluation")
    tasks = found["tasks"]
    assert set(tasks) == {"wic", "copa", "squad", "perplexity"}
    assert [tasks[name]["n"] for name in ("wic", "copa", "squad")] == [9, 10, 7]
    assert "SQuAD F1, WiC, COPA (Table 9)" in found["averages"]
    in_training = read_summary(run)["heldout"]["perplexity"]["per_source"]
    assert set(in_training) == set(WEIGHTS)
    measured = {source: facts["perplexity"] for source, facts in tasks["perplexity"]["per_source"].items()}
    assert measured == pytest.approx(in_training, rel=1e-4)
    for name in ("wic", "copa", "squad", "generated/articles"):
        assert name in done.stdout


@pytest.mark.slow
def test_a_named_store_and_a_wrong_one(run: Path, prepared: Prepared, tmp_path: Path) -> None:
    best = str(run / "best_model")  # a model's folder: nothing says which store it was trained on
    asked = ("--tasks", "perplexity", "--out", str(tmp_path / "best"))
    nothing = call("pretrain/evaluate.py", best, *asked)
    assert nothing.returncode == 2
    assert "perplexity: no data" in nothing.stderr
    done = call("pretrain/evaluate.py", best, *asked, "--data", f"perplexity={prepared.store}", "--chunk-tokens", "32")
    assert done.returncode == 0, done.stderr
    assert set(results(tmp_path / "best")["tasks"]["perplexity"]["per_source"]) == set(WEIGHTS)

    other = shutil.copytree(prepared.store, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "another"}))
    refused = call("pretrain/evaluate.py", best, *asked, "--overwrite", "--data", f"perplexity={other}")
    assert refused.returncode == 2
    assert "made with another tokenizer" in refused.stderr
