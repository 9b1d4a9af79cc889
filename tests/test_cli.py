"""The command `colm-ds`: one door for everything, quick to open, and the scripts are the same door."""

from __future__ import annotations

import argparse
import ast
import errno
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
import torch

import colm_ds
import finetune.evaluate
import finetune.sweep
import finetune.train
import pretrain.evaluate
import pretrain.prepare
import pretrain.train
from colm_ds import cli
from colm_ds.config.colm import WITHOUT_VECTORS
from colm_ds.errors import ConfigError
from colm_ds.process import launch
from colm_ds.selection import SELECTORS, needs_of

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


def test_alone_it_lists_the_commands_and_how_to_complete_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    for name in cli.COMMANDS:
        assert f"\n    {name}" in shown
    assert '\nCompletion in this shell: eval "$(colm-ds --print-completion bash)"\n' in shown
    assert shown.endswith("colm-ds: give a COMMAND\n")


def test_version(capsys: pytest.CaptureFixture[str], repo_root: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"colm_ds {colm_ds.__version__}\n"
    packaged = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert packaged.get("version", colm_ds.__version__) == colm_ds.__version__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: colm-ds {name} ")
    assert "PydanticUndefined" not in shown
    assert "local_rank" not in shown


@pytest.mark.parametrize("words", [[], ["tarin", "recipe.yaml"], ["--local_rank=0"]])
def test_without_a_command_the_commands_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_changes_and_the_launchers_word_may_stand_anywhere(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(cli, "_plan", seen.append)
    words = ["plan", "recipe.yaml", "micro_batch_size=2"]
    words.insert(place, "--local_rank=1")
    assert cli.main([*words, "--num-gpus", "2", "steps=7"]) == 0
    (options,) = seen
    assert (options.recipe, options.overrides) == ("recipe.yaml", ["micro_batch_size=2", "steps=7"])
    assert (options.num_gpus, options.local_rank) == (2, 1)


def test_an_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", "nothing.yaml"]) == 2
    assert capsys.readouterr().err == "ConfigError: nothing.yaml: no such recipe.\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_one_message(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> None:
        raise OSError(number, os.strerror(number), "store/part")

    command = cli.Command("write", "Write.", lambda parser: parser.set_defaults(run=fail), "")
    monkeypatch.setitem(cli.COMMANDS, "write", command)
    assert cli.main(["write"]) == 1
    assert capsys.readouterr().err == f"write: [Errno {number}] {os.strerror(number)}: 'store/part'\n"


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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tarin", "recipe.yaml"], "Did you mean 'train'?"),
        (["frobnicate"], "Choose from train, "),
        (["plan", "recipe.yaml", "--num-gpu-memory", "4"], "unrecognized arguments: --num-gpu-memory"),
        (["report", "RUN", "--max-arm5", "4"], "Did you mean --max-arms?"),
        (["memory-report", "recipe.yaml", "--port", "65432"], "argument --port: 65432: must be 1 to 65000"),
        (["train", "recipe.yaml", "--steps", "10"], "Keys of a recipe are written without dashes: steps=10\n"),
        (["train", "recipe.yaml", "--lr=1e-3"], "without dashes: optimizer.lr=1e-3\n"),
        (["train", "recipe.yaml", "--colm.coreset_size=8"], "without dashes: colm.coreset_size=8\n"),
        (["preview", "recipe.yaml", "--output-dir"], "without dashes: output_dir=VALUE\n"),
        (["sweep", "grid.yaml", "--every", "5"], "evaluation.every=5"),
        (["train", "recipe.yaml", "--num-gpu", "2"], "Did you mean --num-gpus?"),  # which the ranks would get
    ],
)
def test_the_nearest_word_is_suggested(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_in_a_help_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Example: ")]
    words = line.split()
    assert words[:4] == ["Example:", "colm-ds", name, *cli.COMMANDS[name].example.split()[:1]]
    options = cli._parser_of(name).parse_intermixed_args(words[3:])
    assert callable(options.run)


def test_completion_knows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert f"({' '.join(cli.COMMANDS)})" in script
    assert "--max-arms" in script
    assert cli.main(["--print-completion=bash"]) == 0
    assert capsys.readouterr().out == script
    assert cli.main(["--print-completion", "cobol"]) == 2
    assert "choose from bash" in capsys.readouterr().err


def test_several_ranks_are_started_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launch.os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr("colm_ds.training.train_command.run", lambda options: None)
    monkeypatch.setattr("colm_ds.training.train_command._read", lambda options: None)  # the recipe, which is not there
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    assert cli.main(["train", "--num-gpus", "2", "recipe.yaml", "steps=3", "--port=29999"]) == 0
    assert cli.main(["train", "recipe.yaml", "--num-gpus=1"]) == 0
    assert cli.main(["train", "recipe.yaml"]) == 0
    assert os.environ.get("DS_ACCELERATOR") == (None if torch.accelerator.is_available() else "cpu")
    (command,) = started
    assert command[1:4] == ["-m", "deepspeed.launcher.runner", "-q"]
    assert command[4:] == [
        *("--num_gpus", "2", "--master_port", "29999", "--module", "colm_ds.cli", "train", "recipe.yaml", "steps=3")
    ]


def test_only_where_there_is_no_accelerator_deepspeed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert launch.accelerator_environment() == {}
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert launch.accelerator_environment() == {"DS_ACCELERATOR": "cpu"}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert launch.accelerator_environment() == {}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name == "torch_npu" or None)
    assert launch.accelerator_environment() == {}


def test_a_rank_does_not_start_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "recipe.yaml", "--num-gpus", "2"]) == 2
    assert "WORLD_SIZE in the environment" in capsys.readouterr().err


def test_a_file_that_the_demo_makes_is_said(capsys: pytest.CaptureFixture[str], repo_root: Path) -> None:
    recipe = str(repo_root / "finetune" / "recipes" / "demo.yaml")
    assert cli.main(["preview", recipe, "data.train=runs/not_there/data/train.jsonl"]) == 2
    assert "colm-ds demo" in capsys.readouterr().err


def test_a_wrong_recipe_is_said_before_torch_is_imported(tmp_path: Path, repo_root: Path) -> None:
    texts = {
        "key.yaml": (repo_root / "finetune/recipes/demo.yaml").read_text().replace("../..", str(repo_root))
        + "stepz: 3\n",
        "store.yaml": (repo_root / "pretrain/recipes/demo.yaml").read_text() + "stepz: 3\n",
        "broken.yaml": "steps: [1\n",
        "grid.yaml": (repo_root / "finetune/grids/table1_cpu.yaml").read_text() + "stepz: 3\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    select = ["select", "key.yaml", "--method", "ccs", "--size", "0.3", "--out", "ccs.json"]
    score = ["score", "key.yaml", "--model", "reference", "--out", "losses.pt"]
    grid, store = ["sweep", "grid.yaml"], ["prepare", "store.yaml", "--data", "here"]
    calls = [[name, "key.yaml"] for name in ("train", "plan", "check", "preview")] + [["pretrain", "store.yaml"]]
    calls += [["train", "key.yaml", "--num-gpus", "2"], grid, store, select, score]
    calls += [[name, file, *more] for name, _, *more in calls for file in ("broken.yaml", "missing.yaml")]
    calls += [["train", "key.yaml", "steps"], ["sweep", "grid.yaml", "steps"]]
    code = f"""
import contextlib, io, os, sys
from colm_ds.cli import main
os.chdir({str(tmp_path)!r})
for name in ("RANK", "MASTER_ADDR"):
    os.environ.pop(name, None)
for words in {calls!r}:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = main(words)
    heavy = {{"torch", "transformers", "deepspeed", "matplotlib", "pandas"}} & set(sys.modules)
    if code != 2 or heavy or not any(word in told.getvalue() for word in ("stepz: unknown", "no such", "not readable")):
        sys.exit(f"{{words}}: {{code}} {{heavy}} {{told.getvalue()}}")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_selectors_known_to_compare_no_vectors_compare_none() -> None:
    compares = {name for name in SELECTORS if needs_of(name).vectors or needs_of(name).target}
    assert compares
    assert not compares & set(WITHOUT_VECTORS)
    assert set(WITHOUT_VECTORS) <= set(SELECTORS)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="DeepSpeed finds it")
def test_a_plain_loop_hears_nothing_of_deepspeeds_accelerator() -> None:
    """transformers imports DeepSpeed where it is installed; its other warnings stay."""
    code = """
import logging, os
os.environ.pop("DS_ACCELERATOR", None)
import colm_ds
from deepspeed.accelerator import get_accelerator
assert get_accelerator().device_name() == "cpu"
logging.getLogger("DeepSpeed").warning("something else")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "Setting accelerator" not in done.stdout + done.stderr
    assert "something else" in done.stdout + done.stderr


@pytest.mark.skipif(find_spec("shtab") is None, reason="needs shtab")
def test_a_reader_that_has_seen_enough_is_no_error(repo_root: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "colm_ds.cli", "--print-completion", "bash"],
        env=os.environ | {"PYTHONPATH": str(repo_root)},
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
