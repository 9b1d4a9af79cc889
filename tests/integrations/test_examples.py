"""The examples and the section of docs/INTEGRATIONS.md run as they stand, with a tiny model."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.engine.training import records
from tests.integrations.runs import forget_deepspeed, pad
from tests.integrations.tiny import save
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "finetune" / "examples"

SIZES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3, "logging_steps": 1}
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    forget_deepspeed()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs an example as a program, in this process; gives what it printed."""

    def run(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *options])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def section(title: str) -> str:
    text = (ROOT / "docs" / "INTEGRATIONS.md").read_text(encoding="utf-8")
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_hf_trainer(run: Callable[..., str], tmp_path: Path) -> None:
    model, data = save(tmp_path)
    output = tmp_path / "out"
    arguments = {"model": str(model), "data": str(data), "output_dir": str(output), **SIZES, **QUIET}
    path = tmp_path / "arguments.yaml"
    path.write_text(yaml.safe_dump({**arguments, "colm": {"large_batch_size": 16, "log": "all"}}), encoding="utf-8")
    printed = run("hf_trainer.py", str(path))
    assert printed.count("'colm/chosen/algebra'") == 3
    assert (output / "model.safetensors").exists()


def test_trl_sft(run: Callable[..., str], tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    model, data = save(tmp_path)
    output = tmp_path / "out"
    options = {**SIZES, **QUIET, "model": model, "data": data, "output_dir": output}
    options |= {"large_batch_size": 16, "lora_rank": 2, "probe": '{"estimator": "exact"}', "small_sources": "code"}
    printed = run("trl_sft.py", *(f"--{key}={value}" for key, value in options.items()))
    assert printed.count("'mean_token_accuracy'") == 3
    assert (output / "adapter_model.safetensors").exists()


def test_plain_loop(run: Callable[..., str], tmp_path: Path) -> None:
    model, data = save(tmp_path)
    sizes = ["--steps=4", "--large_batch_size=16", "--coreset_size=8", "--micro_batch_size=3"]
    printed = run("plain_loop.py", str(model), str(data), str(tmp_path / "out"), *sizes)
    assert "step 4 of 4: loss" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


NAMES = ["plain_loop.py", "hf_trainer.py", "trl_sft.py"]


@pytest.mark.parametrize("name", [*NAMES, "deepspeed_loop.py"])
def test_help(name: str, run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    with pytest.raises(SystemExit) as left:
        run(name, "--help")
    assert left.value.code == 0
    assert "model to start from" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_without_arguments(name: str, run: Callable[..., str], tmp_path: Path) -> None:
    """Ten steps on generated rows."""
    if name.startswith("trl"):
        pytest.importorskip("trl")
    printed = run(name)
    assert printed.count("loss ") + printed.count("'loss'") == 10
    assert (tmp_path / "runs" / "examples" / name.removesuffix(".py") / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", [*NAMES[1:], "deepspeed_loop.py"])
def test_two_ranks_without_arguments(name: str, tmp_path: Path) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(EXAMPLES / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^epoch .*: loss |'loss'", done.stdout, flags=re.MULTILINE)) == (
        15 if name.startswith("deepspeed") else 10
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_deepspeed_loop_resumes(tmp_path: Path) -> None:
    """A second start with one more epoch goes on after the first."""
    printed = []
    for epochs in (1, 2):
        command = [sys.executable, str(EXAMPLES / "deepspeed_loop.py"), "--epochs", str(epochs)]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append([line for line in done.stdout.splitlines() if line.startswith("epoch ")])
    assert [len(lines) for lines in printed] == [15, 15]  # floor(240 / 16) steps
    assert printed[1][0].startswith("epoch 2 step 16: loss ")


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        if path.name == "generated.py":  # makes what the others run on
            continue
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path


def test_plain_loop_of_the_page() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section("A plain loop"), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 17
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    names = {"model": tiny_model("llama").train(), "dataset": records({"a": 20, "b": 20, "c": 5})}
    exec(code.replace("128", "16").replace("64", "8"), names)
    assert names["selector"].step_count == 2


def test_diff_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", section("transformers.Trainer"), flags=re.DOTALL)
    lines = diff.splitlines()
    assert sum(line[:1] in "+-" for line in lines if line) <= 6
    printed = {}
    for kind, other in (("-", "+"), ("+", "-")):
        script = "\n".join(line[1:] for line in lines if line[:1] != other)
        script = script.replace('"out"', "output, **small").replace("size=16", "size=4").replace("128", "32")
        names: dict[str, object] = {
            "model": tiny_model("llama").train(),
            "dataset": records({"a": 20, "b": 20, "c": 5}),
            "collator": pad,
            "output": str(tmp_path / kind),
            "small": {**QUIET, "max_steps": 2, "logging_steps": 1},
        }
        exec(script, names)
        printed[kind] = capsys.readouterr().out
    assert "'loss'" in printed["-"]
    assert "colm/" not in printed["-"]
    logged = [line for line in printed["+"].splitlines() if "'colm/examples_probed'" in line]
    assert len(logged) == 2
    assert all(line.count("'colm/") <= 8 for line in logged)
