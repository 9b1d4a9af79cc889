"""launch/demo.sh with two steps on one rank (six runs, a report, an answer), then the commands of docs/START.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colm_ds.cli import main
from tests.ports import worker_port

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "plain_b": ("plain 32", 32),
    "tokens": ("tokens 32 of 128", 32),
    "plain_half": ("plain 64, half the steps", 64),
    "keep": ("keep small + random", 32),
    "colm": ("CoLM 32 of 64", 32),
    "plain_r": ("plain 64", 64),
}
"""By folder of each run: its name, and the examples that it trains on in a step."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the demo was run with two steps on one rank, and what it printed."""
    folder = tmp_path_factory.mktemp("start")
    changes = {"OUT": str(folder / "runs" / "demo"), "RANKS": "1", "MASTER_PORT": str(worker_port(21))}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "demo.sh"), "steps=2", "evaluation.every=0", "evaluation.max_new_tokens=4"],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done.stdout


@pytest.mark.distributed
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the demo would install .venv")
def test_the_demo_trains_six_arms_and_compares_them(demo: tuple[Path, str]) -> None:
    folder, shown = demo[0] / "runs" / "demo", demo[1]
    losses = {}
    for name, (label, size) in ARMS.items():
        summary = json.loads((folder / name / "summary.json").read_text())
        steps = 1 if name == "plain_half" else 2
        assert summary["status"] == "finished"
        assert (summary["steps"], summary["examples_trained"]) == (steps, steps * size)
        assert (summary["examples_probed"] > 0) == (name == "colm")
        assert re.search(rf"^{re.escape(label)} +[0-9]", shown, re.MULTILINE), label
        losses[name] = summary["heldout"]["overall"]
    assert (folder / "report.html").read_text().count("<svg") > 3
    difference = losses["plain_b"] - losses["tokens"]
    word = "lower" if difference >= 0 else "higher"
    assert f"{abs(difference):.3f} nats per token {word}: {losses['tokens']:.3f} against" in shown
    assert f"ends at {losses['plain_half']:.3f}" in shown
    assert "2 steps are too few for an answer" in shown
    said = json.loads((folder / "report.json").read_text())["summary"]
    assert said.startswith(("Of those that train on 32", "No choice of 32"))
    for words in ("2 steps are too few for an answer", f"ends at {losses['plain_half']:.3f}"):
        assert words in said  # the page says what the terminal says


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the demo would install .venv")
def test_the_same_command_skips_what_is_finished(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = demo[0] / "runs" / "demo"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["demo", "--out", str(folder), "--num-gpus", "1", "--port", str(worker_port(22)), "evaluation.every=0"]
    command += ["evaluation.max_new_tokens=4"]
    before = {name: (folder / name / "metrics.jsonl").read_bytes() for name in ARMS}  # has the seconds of each step

    assert main([*command, "steps=3"]) == 2
    refused = capfd.readouterr().err
    assert refused.count("steps: 2 there, 3 here") == 5
    assert f"{folder / 'plain_half'}: holds" in refused  # 1 there, 2 here
    assert main([*command, "steps=2", "output_dir=elsewhere"]) == 2
    assert main([*command, "steps=2", "evaluation.every=1"]) == 2
    assert main([*command, "steps=2", "colm.packing=on"]) == 2
    assert "colm.packing: 'off' there, 'on' here" in capfd.readouterr().err
    assert {name: (folder / name / "metrics.jsonl").read_bytes() for name in ARMS} == before

    (folder / "plain_half" / "summary.json").unlink()
    assert main([*command, "steps=2"]) == 0
    shown = capfd.readouterr().out
    assert shown.count("finished already") == 5
    assert "demo: plain 64, half the steps, 1 rank\n" in shown
    assert json.loads((folder / "plain_half" / "summary.json").read_text())["status"] == "finished"
    after = {name: (folder / name / "metrics.jsonl").read_bytes() for name in ARMS}
    assert [name for name in ARMS if after[name] != before[name]] == ["plain_half"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the demo would install .venv")
def test_every_command_of_the_start_page_runs(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo[0]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / "START.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) > 6
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for line in lines:
        words = line.replace("steps=20", "steps=2 evaluation.every=0").replace("finetune/", f"{ROOT}/finetune/").split()
        assert words[0] == "colm-ds"
        if words[1] == "demo":
            continue  # the fixture's
        if words[1] != "train":  # which ends its process
            assert main(words[1:]) == 0, line
            continue
        done = subprocess.run(
            [sys.executable, "-m", "colm_ds.cli", *words[1:]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert (folder / "runs" / "demo" / "three" / "report.html").exists()
    assert (folder / "runs" / "first_model" / "config.json").exists()
