"""The command `colm-ds`: one door for everything, quick to open, and the scripts are the same door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import finetune.evaluate
import finetune.sweep
import finetune.train
import pretrain.evaluate
import pretrain.prepare
import pretrain.train
from colm_ds import cli
from colm_ds.errors import ConfigError

SCRIPTS = {
    finetune.train: "train",
    finetune.evaluate: "evaluate",
    finetune.sweep: "sweep",
    pretrain.train: "train",
    pretrain.prepare: "prepare",
    pretrain.evaluate: "evaluate",
}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)


def test_help_answers_without_loading_torch() -> None:
    code = """
import sys
from colm_ds.cli import main
try:
    main(["--help"])
except SystemExit as end:
    heavy = {"torch", "numpy", "transformers", "deepspeed", "pydantic"} & set(sys.modules)
    sys.exit(f"loaded {heavy}" if heavy else end.code)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n    {name}" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: colm-ds {name} ")
    assert "local_rank" not in shown


@pytest.mark.parametrize("words", [[], ["tarin", "recipe.yaml"], ["--local_rank=0"]])
def test_without_a_command_the_commands_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_changes_and_the_launchers_word_may_stand_anywhere(
    place: int, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(repo_root / "finetune" / "recipes" / "phi2_math.yaml")
    words = ["plan", recipe, "micro_batch_size=2"]
    words.insert(place, "--local_rank=1")
    assert cli.main([*words, "--num-gpus", "2", "steps=7"]) == 0
    assert "2 GPUs of 48 GiB" in capsys.readouterr().out


def test_an_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", "nothing.yaml"]) == 2
    assert capsys.readouterr().err == "ConfigError: nothing.yaml: no such recipe.\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts_only_call_the_command(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda words: called.append(list(words)) or 7)
    monkeypatch.setattr(sys, "argv", ["script.py", "--local_rank=0", "given"])
    assert script.main(["by", "hand"]) == script.main() == 7
    by_hand, given = called
    assert by_hand[0] == given[0] == SCRIPTS[script]
    assert by_hand[-2:] == ["by", "hand"]
    assert given[-2:] == ["--local_rank=0", "given"]
    body = ast.parse(Path(str(script.__file__)).read_text(encoding="utf-8")).body
    assert sum(isinstance(part, ast.FunctionDef) for part in body) == 1


def test_bad_input_of_every_kind_of_program_ends_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["prepare", "nothing.yaml", "--data", str(tmp_path)], ["sweep", "nothing.yaml"], ["plan", "no.yaml"]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.startswith(f"{ConfigError.__name__}: no")
