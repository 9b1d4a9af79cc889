"""The programs finetune/evaluate.py and pretrain/evaluate.py, in this process, with models of every kind in folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune.evaluate
import pretrain.evaluate
from colm_ds import cli
from colm_ds.errors import CheckpointError
from colm_ds.evaluation import command_line, model_source
from colm_ds.evaluation.model_source import find_model, load
from colm_ds.evaluation.sandbox import sandbox
from colm_ds.randomness import private_generator
from tests.evaluation.evaluations import numbers, read_answers
from tests.evaluation.stubs import make_model
from tests.tiny_models import add_lora

PROGRAMS = {"finetune": finetune.evaluate.main, "pretrain": pretrain.evaluate.main}


@pytest.fixture(scope="module")
def models(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a LoRA run on it with its adapter, a merged model, and a full run."""
    root = tmp_path_factory.mktemp("models")
    base = make_model()
    base.save_pretrained(root / "base")
    base.save_pretrained(root / "full_run" / "model")
    adapted = add_lora(base, "llama")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=private_generator(0, name)) / 4)
    adapted.save_pretrained(root / "run" / "adapter")
    adapted.save_pretrained(root / "bare_adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    for folder in ("base", "full_run/model", "run/adapter", "merged"):
        tokenizer.save_pretrained(root / folder)
    recipe = {"model": {"name_or_path": str(root / "base")}, "lora": {"rank": 4}, "seed": 0, "tokenizer": None}
    write_recipe(root / "run", recipe)
    write_recipe(root / "unfinished", recipe)
    write_recipe(root / "full_run", {**recipe, "lora": None})
    return root


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """What a run writes down of its recipe, as far as it is read here."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"recipe": recipe}), encoding="utf-8")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that no launcher started; the environment that it sets up is undone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def run(program: str, *arguments: str) -> dict[str, Any]:
    """What a program writes."""
    PROGRAMS[program](arguments)
    out = Path(arguments[arguments.index("--out") + 1])
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found


def test_every_kind_of_model(models: Path, data: Path, tmp_path: Path) -> None:
    base = str(models / "base")
    more = {"bare_adapter": ("--base", base, "--tokenizer", base)}
    rows: dict[str, list[Any]] = {}
    for kind in ("base", "full_run", "run", "run/adapter", "bare_adapter", "merged"):
        arguments = ("--tasks", "copa,squad", "--data", str(data), "--out", str(tmp_path / kind), *more.get(kind, ()))
        assert set(numbers(run("finetune", str(models / kind), *arguments))) == {"copa", "squad"}
        rows[kind] = [row["log_probabilities"] for row in read_answers(tmp_path / kind, "copa")]
    assert rows["base"] == rows["full_run"]
    assert rows["base"] != rows["run"]
    assert rows["run/adapter"] == rows["bare_adapter"] == rows["run"]
    for merged, apart in zip(rows["merged"], rows["run"], strict=True):
        assert merged == pytest.approx(apart, abs=2e-3)


def test_sets_are_chosen_by_what_was_trained_unless_named(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`colm-ds evaluate` asks a pretraining run for the group pretrain, all else for math; scripts have their own."""
    asked: list[tuple[str, ...]] = []

    def note(backend: Any, options: Any, *_: Any, **named: Any) -> None:
        asked.append(options.tasks)

    monkeypatch.setattr(command_line, "evaluate", note)
    monkeypatch.setattr(command_line, "print_results", lambda *_: None)
    pretrained = tmp_path / "pretrained"
    shutil.copytree(models / "full_run", pretrained)
    write_recipe(pretrained, {"task": "pretraining", "model": {"config": {"model_type": "llama"}}})
    rest = ["--data", str(data), "--out", str(tmp_path / "out")]
    for model in (pretrained, models / "full_run", models / "base"):
        assert cli.main(["evaluate", str(model), *rest]) == 0
        assert finetune.evaluate.main([str(model), *rest]) == 0
        assert pretrain.evaluate.main([str(model), *rest]) == 0
        assert pretrain.evaluate.main([str(model), *rest, "--tasks", "copa,wic"]) == 0
    scripts = [("math",), ("pretrain",), ("copa", "wic")]
    assert asked == [("pretrain",), *scripts, ("math",), *scripts, ("math",), *scripts]


def test_results_of_a_run_lie_in_its_folder(models: Path, data: Path) -> None:
    finetune.evaluate.main([str(models / "run"), "--tasks", "copa", "--data", str(data)])
    assert (models / "run" / "evaluation" / "results.md").is_file()


def test_pretraining_program(models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--data", str(data), "--chunk-tokens", "16", "--limit", "5", "--out", str(tmp_path))
    found = run("pretrain", str(models / "base"), *arguments)
    assert set(found["tasks"]) == {"wic", "copa", "squad", "perplexity"}
    assert found["tasks"]["copa"]["n"] == 5
    assert set(found["tasks"]["perplexity"]["per_source"]) == {"a", "b"}
    assert "SQuAD F1, WiC, COPA (Table 9)" in found["averages"]
    assert found["environment"]["versions"]["torch"]
    shown = capsys.readouterr()
    assert (tmp_path / "results.md").read_text(encoding="utf-8") in shown.out
    assert "wic: 5 of 5 questions, accuracy" in shown.err


def test_math_names_its_isolation(models: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("--tasks", "gsm8k", "--data", str(data), "--max-new-tokens", "8", "--out", str(tmp_path))
    found = run("finetune", str(models / "base"), *arguments, "--isolation", "landlock")
    assert found["isolation"]["level"] == sandbox.detect().level
    assert found["tasks"]["gsm8k"]["n"] == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere/at/all --tasks copa", "no such folder"),
        ("./nowhere --tasks copa", "./nowhere: no such folder."),
        ("package:no_such_package", "package:no_such_package: that Python package is not installed"),
        ("{models}/unfinished", "colm-ds export"),
        ("{models}", "has no config.json"),
        ("{models}/bare_adapter --base {models}/nothing", "nothing: no such folder"),
        ("{models}/base --base x", "is no adapter"),
        ("{models}/base --tasks copaa", "Did you mean 'copa'"),
        ("{models}/base --tasks cb --data {data}", "cb: no data"),
        ("{models}/base --tasks copa", "copa: no data: no folder was given"),
        ("{models}/base --tasks gsm8k --data {data} --max-new-tokens 5000", "1024 positions"),
        ("{models}/base --tasks perplexity --data perplexity={data} --chunk-tokens 0", "--chunk-tokens 0: must be at"),
        ("{models}/base --tasks copa --isolation rlimits", "'rlimits': this level was removed"),
        ("{models}/base --tasks copa --isolation strong", "Known: landlock, namespaces"),
        ("{models}/base --tasks copa --data {data} --backend vllm", "--backend vllm: this option was removed"),
        ("{models}/base --tasks copa --data {data} --backend vllm", "colm-ds export RUN --merge"),
    ],
)
def test_bad_input_is_one_message(
    arguments: str, message: str, models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments.format(models=models, data=data).split(" ")
    with pytest.raises(SystemExit) as stopped:
        finetune.evaluate.main([*words, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
    assert message in said


def test_math_is_refused_before_a_model_is_loaded_where_programs_cannot_be_isolated(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = sandbox.Isolation("unshare: Operation not permitted", "no seccomp", "no Landlock", 0, False)
    monkeypatch.setattr(sandbox, "detect", lambda: weak)
    monkeypatch.setattr(command_line, "load", lambda *_: pytest.fail("a model was loaded"))
    arguments = ["--tasks", "gsm8k,copa", "--data", str(data), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        finetune.evaluate.main([str(models / "base"), *arguments])
    assert stopped.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
    for part in ("this machine cannot isolate", "no seccomp", "Allow this user", "leave the math sets out"):
        assert part in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "no data for gsm8k, math, numglue"),
        ("--tasks copa --data copa=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--tasks copa --data copa={bad}", "bad.jsonl:1: no key 'question'"),
        ("--tasks superglue --data {data} --limit 0", "--limit 0: must be at least 1"),
    ],
)
def test_missing_and_broken_data_is_said_before_tokenizer_and_model_are_loaded(
    words: str,
    says: str,
    models: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for where, name in ((command_line, "load"), (model_source, "load_its_tokenizer")):
        monkeypatch.setattr(where, name, lambda *_: pytest.fail("loaded too early"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"premise": "He had cups."}\n')
    words = words.format(data=data, bad=bad)
    with pytest.raises(SystemExit) as stopped:
        finetune.evaluate.main([str(models / "base"), *words.split()])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_adapter_of_another_model_is_refused(models: Path, tokenizer: Any, tmp_path: Path) -> None:
    make_model("phi").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = find_model(str(models / "bare_adapter"), base=str(tmp_path), tokenizer=str(tmp_path))
    with pytest.raises(CheckpointError, match="Is it an adapter of this base model"):
        load(source)
