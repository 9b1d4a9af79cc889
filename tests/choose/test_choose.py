"""Choosing once from a whole dataset, scoring it, and training by what came out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from colm_ds.choose.features import cached_signals
from colm_ds.choose.one_shot import choose_once, quotas_of
from colm_ds.cli import main
from colm_ds.config.colm import ProbeConfig
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.data.subset import read_subset, write_subset
from colm_ds.engine.reference_losses import read_table
from colm_ds.errors import ConfigError
from colm_ds.probe.of_examples import signals_of_examples
from colm_ds.recipes.model import load_model, load_tokenizer
from colm_ds.recipes.recipe import load_recipe
from colm_ds.selection import Signals
from colm_ds.selection.simcore import retrieve, unit_rows
from colm_ds.training.tasks import check_reference, data_digest, load_task
from colm_ds.training.tasks.instructions import InstructionTask
from tests.engine.oracle import token_losses
from tests.training.test_bad_input import ROOT, recipe_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated data in a recipe: 60 or so examples to train on, others as a target."""
    folder = tmp_path_factory.mktemp("choose")
    write_mixture(folder / "data", scale=0.01)
    lines = (folder / "data" / "train.jsonl").read_text().splitlines()
    few = [line for number, line in enumerate(dict.fromkeys(lines)) if number % max(1, len(lines) // 70) == 0]
    (folder / "train.jsonl").write_text("\n".join(few[:50]) + "\n")
    (folder / "target.jsonl").write_text("\n".join(few[50:58]) + "\n")
    recipe = recipe_of(folder)
    recipe["data"] |= {"train": "train.jsonl", "cache_dir": str(folder / "cache"), "max_length": 64}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[Any, Any, InstructionTask]:
    """Model, tokenizer and data of the recipe."""
    from transformers import set_seed

    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    set_seed(recipe.seed)
    return load_model(recipe.model, recipe.lora, tokenizer), tokenizer, load_task(recipe, tokenizer)  # type: ignore[return-value]


def test_losses_of_a_dataset_are_plain_ones(parts: tuple[Any, Any, InstructionTask], tmp_path: Path) -> None:
    model, _, task = parts
    signals = signals_of_examples(
        model, task.train, task.train.lengths, ProbeConfig(max_tokens=200), "loss", ("gradient_norm",)
    )
    assert signals.vectors is not None
    for index in range(0, len(task.train), 7):
        example = task.train[index]
        record = {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
        with torch.no_grad():
            assert float(signals.vectors[index, 0]) == pytest.approx(
                float(token_losses(model, record).mean()), rel=1e-4
            )
    arguments: Any = (model, task.train, "digest", ProbeConfig(), "loss")
    first = cached_signals(*arguments, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    again = cached_signals(*arguments, folder=tmp_path)
    assert again.vectors is not None
    assert first.vectors is not None
    assert torch.equal(again.vectors, first.vectors)
    with torch.no_grad():
        model.lm_head.weight[0] += 1.0
    cached_signals(*arguments, folder=tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0] -= 1.0
    assert len(list(tmp_path.iterdir())) == 2  # other weights, other signals


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ccs", ["--option", "score=margin", "--option", "beta=0.2"]),
        ("ccs", ["--shares", "proportional"]),
        ("simcore", ["--target", "target.jsonl"]),
        ("goracs", ["--target", "target.jsonl", "--shares", "target"]),
        ("vector_sum", ["--shares", "fair"]),
        ("vector_sum", ["--option", "method=balanced"]),
    ],
)
def test_select_and_take_the_subset(
    method: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out = folder / f"{method}.json"
    assert main(["select", "recipe.yaml", "--method", method, "--size", "0.4", "--out", str(out), *words]) == 0
    shown = capsys.readouterr().out
    made = json.loads(out.read_text())
    assert (len(set(made["indices"])), made["num_examples"]) == (20, 50)
    assert sum(made["counts"].values()) == 20
    assert "20 of 50 examples" in shown
    recipe = load_recipe("recipe.yaml", [f"data.subset={out.name}"])
    whole = load_task(load_recipe("recipe.yaml"), load_tokenizer(recipe.model, recipe.tokenizer_place)).train
    task = load_task(recipe, load_tokenizer(recipe.model, recipe.tokenizer_place))
    assert [row.input_ids.tolist() for row in task.train] == [  # type: ignore[attr-defined]
        whole[index].input_ids.tolist() for index in sorted(made["indices"])
    ]
    assert {n: c for n, c in task.train.source_counts().items() if c} == {n: c for n, c in made["counts"].items() if c}  # type: ignore[attr-defined]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "size": (["--method", "ccs", "--size", "51"], "--size 51: choose a whole number from 1 to 50"),
    "no number": (["--method", "ccs", "--size", "all"], "--size all: not a number"),
    "option": (["--method", "ccs", "--size", "5", "--option", "bata=1"], "--option bata = 1: .* Did you mean 'beta'"),
    "form": (["--method", "ccs", "--size", "5", "--option", "beta"], "--option beta: not of the form"),
    "target": (["--method", "simcore", "--size", "5"], "--method simcore needs one"),
    "no target": (["--method", "ccs", "--size", "5", "--target", "x"], "--method ccs needs none"),
    "trained": (["--method", "simcore", "--size", "5", "--target", "train.jsonl"], "50 of its examples are trained on"),
    "weights": (["--method", "vector_sum", "--size", "5", "--option", "method=importance"], "chooses with weights"),
    "shares": (["--method", "ccs", "--size", "5", "--shares", "target"], "there is no target"),
    "at": (["--method", "ccs", "--size", "5", "--at", "nowhere"], "nowhere: no such folder"),
    "subset": (["--method", "ccs", "--size", "5", "data.subset=train.jsonl"], "choose from all of the data"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = MISTAKES[name]
    monkeypatch.chdir(folder)
    assert main(["select", "recipe.yaml", "--out", "no.json", *words]) != 0
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "no.json").exists()


def test_subsets_are_of_one_dataset(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "subset.json"
    write_subset(path, [5, 2], "abc", {"method": "ccs"})
    assert read_subset(path, "abc", 6) == [2, 5]
    with pytest.raises(ConfigError, match="was chosen from other data"):
        read_subset(path, "abd", 6)
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not an index file"):
        read_subset(path, "abc", 6)


def signals_of(rows: torch.Tensor, target: torch.Tensor | None = None) -> Signals:
    return Signals(torch.arange(len(rows)), torch.ones(len(rows), dtype=torch.bool), vectors=rows, target=target)


def test_rounds_of_the_whole_dataset_can_be_cut_anywhere() -> None:
    rows, target = torch.randn(30, 6), torch.randn(4, 6)
    sources = torch.arange(30) % 3
    arguments: dict[str, Any] = {"options": {"clusters": 0}}
    whole = choose_once("simcore", 20, sources, signals_of(rows, target), **arguments)
    assert whole == retrieve(unit_rows(rows) @ unit_rows(target).T, 20).tolist()
    assert choose_once("simcore", 4, sources, signals_of(rows, target), **arguments)[:1] == whole[:1]


def test_sources_are_chosen_by_themselves() -> None:
    sources = torch.tensor([0] * 20 + [1] * 10 + [2] * 2)
    losses = torch.rand(32, 1)
    for shares, wanted in (("proportional", [10, 5, 1]), ("target", [4, 10, 2])):
        chosen = choose_once("ccs", 16, sources, signals_of(losses), shares=shares, target_shares=[0.1, 0.8, 0.1])
        assert torch.bincount(sources[chosen], minlength=3).tolist() == wanted
        assert len(set(chosen)) == 16


@pytest.mark.parametrize("seed", range(5))
def test_quotas_are_shares_within_what_there_is(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 9, (5,), generator=draw).tolist()
    shares = torch.rand(5, generator=draw).tolist()
    shares[seed] = 0.0
    for size in range(sum(counts) + 1):
        quotas = quotas_of(shares, counts, size)
        assert sum(quotas) == size
        assert all(0 <= quota <= count for quota, count in zip(quotas, counts, strict=True))
    assert quotas_of([0.5, 0.3, 0.2], [100, 100, 100], 10) == [5, 3, 2]
    assert quotas_of([0.9, 0.1, 0.0], [2, 100, 100], 10) == [2, 8, 0]


def test_score_and_its_table(
    folder: Path,
    parts: tuple[Any, Any, InstructionTask],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, task = parts
    monkeypatch.chdir(folder)
    model.save_pretrained("reference")
    tokenizer.save_pretrained("reference")
    assert main(["score", "recipe.yaml", "--model", "reference", "--out", "il.pt"]) == 0
    assert "losses of 50 of 50 examples" in capsys.readouterr().out
    table = read_table("il.pt")
    record = {"input_ids": task.train[3].input_ids.tolist(), "labels": task.train[3].labels.tolist()}
    with torch.no_grad():
        assert float(table["losses"][3]) == pytest.approx(float(token_losses(model, record).mean()), rel=1e-4)
    words = ["colm.selector=rho_loss", "colm.options.table=il.pt"]
    recipe = load_recipe("recipe.yaml", words)
    assert table["digest"] == data_digest(task)
    check_reference(recipe, task)
    shorter = load_recipe("recipe.yaml", [*words, "data.max_length=40"])
    with pytest.raises(ConfigError, match="its losses are of other training data"):
        check_reference(shorter, load_task(shorter, tokenizer))
    assert main(["score", "recipe.yaml", "--out", "il.pt"]) != 0
    assert "name one reference model" in capsys.readouterr().err
    other = json.loads((folder / "reference" / "tokenizer.json").read_text())
    other["added_tokens"] = []
    other["normalizer"] = {"type": "Lowercase"}
    (folder / "reference" / "tokenizer.json").write_text(json.dumps(other))
    assert main(["score", "recipe.yaml", "--model", "reference", "--out", "il.pt"]) != 0
    assert "its tokenizer is not the recipe's" in capsys.readouterr().err


def test_targets_of_a_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = ["colm.selector=greats", "colm.target.size=6", "colm.target.batch=2"]
    with pytest.raises(ConfigError, match=r"colm\.target\.data = None: 'greats' compares with a target"):
        load_recipe("recipe.yaml", words)
    with pytest.raises(ConfigError, match=r"colm\.target\.data = 'nothing\.jsonl': no such file"):
        load_recipe("recipe.yaml", [*words, "colm.target.data=nothing.jsonl"])
    recipe = load_recipe("recipe.yaml", [*words, "colm.target.data=target.jsonl"])
    task = load_task(recipe, load_tokenizer(recipe.model, recipe.tokenizer_place))
    assert task.target is not None
    assert len(task.target) == 8
    assert set(task.identity()) == {"data.train", "colm.target.data"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "select recipe.yaml --method ccs --size 9 --out train.jsonl/x.json",
            "--out train.jsonl/x.json: cannot be written",
        ),
        ("score recipe.yaml --at nowhere --out train.jsonl/x.pt", "--out train.jsonl/x.pt: cannot be written"),
        ("check recipe.yaml --out train.jsonl/x", "--out train.jsonl/x/check.json: cannot be written"),
        ("select recipe.yaml --method ccs --size inf --out x.json", "--size inf: not a number"),
        ("select recipe.yaml --method ccs --size 9 --option x=[1 --out x.json", "--option x=[1: '[1' is no YAML value"),
    ],
)
def test_what_cannot_be_done_is_said_first(
    command: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err


def test_rows_that_are_dropped_and_sources_that_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold-out of nothing says how many rows were dropped; a subset is not blamed on the maximum length."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("recipe.yaml", [])
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    train = load_task(recipe, tokenizer).train
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    long = [row | {"instruction": "x " * 500} for row in rows[1:]]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, [rows[0], *long])) + "\n")
    recipe = load_recipe("recipe.yaml", ["data.train=long.jsonl", "data.holdout_per_source=4"])
    with pytest.raises(ConfigError, match=r"held out of 1 examples \(49 dropped for want of a label within data"):
        load_task(recipe, tokenizer)
    first = train.source_names[0]
    kept = [index for index in range(len(train)) if train.source_ids[index] != 0]
    write_subset(folder / "part.json", kept, train.digest(), {})  # type: ignore[attr-defined]
    task = load_task(load_recipe("recipe.yaml", ["data.subset=part.json"]), tokenizer)
    (said,) = [line for line in task.losses_of_data() if "WARNING" in line]
    assert said == f"WARNING: data.subset has no example of {first}."


def test_a_target_from_the_held_out_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the held-out examples `size` are the target, the others are evaluated on; none is trained on or lost."""
    monkeypatch.chdir(folder)
    words = ["colm.selector=greats", "colm.target.batch=1", "colm.target.data=held_out"]
    with pytest.raises(ConfigError, match=r"colm\.target\.data = 'held_out': nothing is held out"):
        load_recipe("recipe.yaml", words)
    words += ["data.holdout_per_source=4"]
    with pytest.raises(ConfigError, match=r"evaluation\.exact_match = True: the questions of data\.heldout hold"):
        load_recipe("recipe.yaml", [*words, "evaluation.exact_match=true"])
    plain = load_recipe("recipe.yaml", ["data.holdout_per_source=4"])
    tokenizer = load_tokenizer(plain.model, plain.tokenizer_place)
    before = load_task(plain, tokenizer)
    size = 3
    recipe = load_recipe("recipe.yaml", [*words, f"colm.target.size={size}", "colm.target.mix=equal"])
    task = load_task(recipe, tokenizer)
    assert isinstance(task, InstructionTask)
    assert isinstance(before, InstructionTask)
    assert task.target is not None
    assert len(task.target) == size == len(set(task.target.source_ids.tolist()))
    parts = [[one.input_ids.tolist() for one in part] for part in (task.target, task._heldout, before._heldout)]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2])
    assert task.train.digest() == before.train.digest()
    again = load_task(recipe, tokenizer).target
    assert again is not None
    assert again.digest() == task.target.digest()
    with pytest.raises(ConfigError, match=r"colm\.target\.size = 500: \d+ examples are held out, and some"):
        load_task(load_recipe("recipe.yaml", [*words, "colm.target.size=500"]), tokenizer)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_by_target_table_and_losses_resumes(folder: Path) -> None:
    """Trains by a recipe: GREATS with a target, then by what training left, resumed as if it had never stopped."""

    def train(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "colm_ds.cli", "train", "recipe.yaml", *words]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def chosen(run: str) -> list[Any]:
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("coreset", {}).get("loss") for line in lines]

    done = train(
        "output_dir=greats",
        "colm.selector=greats",
        "colm.target.data=target.jsonl",
        "colm.target.size=6",
        "colm.target.batch=2",
    )
    assert done.returncode == 0, done.stderr
    for name, way in (("losses", "colm.selector=infobatch"), ("sketches", "colm.probe.source=store")):
        whole, halves = f"{name}_whole", f"{name}_halves"
        words = (way, "steps=8", "save_every=4", "lr_schedule.kind=constant", "lr_schedule.warmup_fraction=0")
        assert train(f"output_dir={whole}", *words).returncode == 0
        first = train(f"output_dir={halves}", *words, "steps=4")
        assert first.returncode == 0, first.stderr
        (folder / halves / "summary.json").unlink()  # as if it had been killed after its checkpoint
        second = train(f"output_dir={halves}", *words)
        assert second.returncode == 0, second.stderr
        assert chosen(halves) == chosen(whole)
        assert sum(isinstance(losses, dict) for losses in chosen(whole)) == 8
    assert 0.0 < json.loads((folder / "sketches_whole" / "summary.json").read_text())["stored_signal"]["share"] <= 1.0
