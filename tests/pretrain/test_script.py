"""`launch/pretrain.sh`: everything in one go, what is finished skipped, bad input in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colm_ds import cli
from tests.pretrain.runs import ENVIRONMENT, ROOT, SHAPE, read_metrics

TINY = [
    f"model.config={json.dumps({'model_type': 'llama', **SHAPE, 'max_position_embeddings': 64})}",
    *("data.chunk_tokens=64", "prepare.vocabulary_size=400", "prepare.sample_mb=0.3", "prepare.holdout=0.1"),
    *("colm.large_batch_size=16", "colm.coreset_size=8", "evaluation.every=2", "evaluation.chunks_per_source=3"),
    *("save_every=2", "lr_schedule={kind: constant, warmup_fraction: 0.0}"),
]

DEMO, PILE5 = (str(ROOT / "pretrain" / "recipes" / f"{name}.yaml") for name in ("demo", "cpu_pile5"))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script in a folder like the repository, whose set-up does nothing: the tests' own environment serves."""
    root = tmp_path / "a repository"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "pretrain.sh", root / "launch")
    (root / "launch" / "setup.sh").write_text("exit 0\n")
    for name in ("colm_ds", "pretrain", "ds_configs"):
        (root / name).symlink_to(ROOT / name)
    return root / "launch" / "pretrain.sh"


def start(
    script: Path, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Call the script."""
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | paths | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_everything_in_one_go_and_again(script: Path) -> None:
    settings = {"RANKS": "1", "MEGABYTES": "0.6"}
    first = start(script, *TINY, "steps=2", **settings)
    assert first.returncode == 0, first.stderr
    run = script.parent.parent / "runs" / "pretrain_demo" / "colm16"
    (run / "summary.json").unlink()  # as if it had been stopped there
    shutil.rmtree(run / "evaluation")

    again = start(script, *TINY, "steps=4", **settings)
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stderr  # the store
    assert "resumed after step 2" in again.stderr
    assert [row["step"] for row in read_metrics(run)] == [0, 1, 2, 3, 4]
    for text in (again.stdout, (run / "report.html").read_text(), (run / "evaluation" / "results.md").read_text()):
        for source in ("parliament", "code", "comments", "abstracts", "articles"):
            assert f"generated/{source}" in text

    finished = start(script, *TINY, "steps=4", **settings)
    assert finished.returncode == 0, finished.stderr
    assert "already trained" in finished.stderr
    other = start(script, *TINY, "steps=4", "optimizer.lr=0.1", **settings)
    assert other.returncode == 2
    assert "holds a finished run of another recipe" in other.stderr
    assert "optimizer.lr: 0.002 there, 0.1 here" in other.stderr


def test_help(script: Path) -> None:
    shown = start(script, "--help")
    assert shown.returncode == 0
    assert "QUESTIONS" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["nothing.yaml"], {}, "pretrain: nothing.yaml: no such recipe"),
        (["steps=2", "more"], {}, "pretrain: more: no such recipe; changes to one are written key=value"),
        ([DEMO, "steps=2", DEMO], {}, "demo.yaml': one recipe at a time"),
        (["data.store=runs/none", PILE5], {}, "no data was named"),
        (["steps=2"], {"DATA": "/etc/hosts\nno/such/file.jsonl"}, "DATA: no/such/file.jsonl: no such file or folder"),
        (["steps=2"], {"DATA": "no/such/file.jsonl"}, "DATA: no/such/file.jsonl: no such file or folder"),
        pytest.param(["stepps=2"], {}, "Did you mean 'steps'", marks=pytest.mark.slow),
        pytest.param(["steps=2"], {"QUESTIONS": "nowhere"}, "nowhere: no such folder", marks=pytest.mark.slow),
        ([PILE5, "data.store=runs/none"], {}, "no data was named"),
        pytest.param(
            [str(ROOT / "finetune" / "recipes" / "demo.yaml"), f"data.train={ROOT}", f"data.heldout={ROOT}"],
            {},
            "not a recipe for pretraining",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_is_one_message(
    script: Path, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    found = start(script, *arguments, cwd=tmp_path, **environment)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_changes_may_follow_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", DEMO, "--data", str(tmp_path), "stepps=2"]) == 2
    assert "Did you mean 'steps'" in capsys.readouterr().err
