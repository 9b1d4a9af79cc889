"""What is wrong with the data is said before torch, tokenizer and model are loaded, and as loading it would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.data import parts
from colm_ds.data.entries import as_entries
from colm_ds.data.parts import check_entries
from colm_ds.errors import CoLMError, ConfigError, DataError
from colm_ds.recipes import data_check
from colm_ds.recipes.recipe import load_recipe

GOOD = [{"instruction": f"{n} + 1?", "output": str(n + 1), "source": "ab"[n % 2]} for n in range(40)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def recipe_in(folder: Path, **changes: Any) -> Path:
    """A recipe whose model and tokenizer are not there, so that loading either would be another error."""
    values = {
        "output_dir": str(folder / "run"),
        "steps": 2,
        "model": {"name_or_path": str(folder / "no_model")},
        "data": {"train": write(folder / "good.jsonl", GOOD), "cache_dir": None},
        "colm": {"large_batch_size": 16, "coreset_size": 8, "probe": {"estimator": "tokens"}},
        "deepspeed": {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


BAD: dict[str, tuple[Callable[[list[dict[str, Any]]], list[Any]], str]] = {
    "empty": (lambda rows: [], "no records in the file"),
    "columns": (lambda rows: [{"foo": 1, "bar": row["output"]} for row in rows], "which no schema has"),
    "broken": (lambda rows: [*rows[:9], '{"instruction": "x", ', *rows[9:]], "broken.jsonl:10: not JSON"),
    "few": (lambda rows: rows[:5], "colm.large_batch_size = 16: more than the 5 examples of data.train"),
    "key": (
        lambda rows: [{**row, "output": ""} for row in rows],
        "The same problem in 39 more rows.",
    ),
}


def test_every_command_says_it_before_torch(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    calls = []
    for name, (change, says) in BAD.items():
        place = write(tmp_path / f"{name}.jsonl", change(GOOD))
        score = ["score", "--at", "x", "--out", "x.pt"]
        select = ["select", "--method", "ccs", "--size", "0.3", "--out", "x.json"]
        for words in (["train"], ["train", "--num-gpus", "2"], ["preview"], ["check"], select, score):
            command, *options = words
            calls.append(([command, str(recipe), f"data.train={place}", *options], says))
    code = f"""
import contextlib, io, os, sys
from colm_ds.cli import main
for name in ("RANK", "MASTER_ADDR", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)
for words, says in {calls!r}:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = main(words)
    heavy = {{"torch", "transformers", "deepspeed", "matplotlib", "pandas"}} & set(sys.modules)
    if code != 2 or heavy or says not in told.getvalue():
        sys.exit(f"{{words}}: {{code}} {{heavy}} {{told.getvalue()}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(CoLMError) as caught:
        data_check.load_checked_recipe(recipe, overrides)
    return str(caught.value)


def test_all_faults_of_the_data_are_in_one_message(tmp_path: Path) -> None:
    few, empty = write(tmp_path / "few.jsonl", GOOD[:5]), write(tmp_path / "empty.jsonl", [])
    recipe = recipe_in(tmp_path, made_by="a script")
    said = message(recipe, f"data.train={few}", f"data.heldout={empty}")
    assert said.startswith(f"2 problems in the data of {recipe}\n")
    assert "more than the 5 examples" in said
    assert "empty.jsonl: no records" in said
    assert said.endswith("The files of this recipe are made by: a script")
    assert "more than the 12 examples" in message(recipe, "data.limit=12")
    same = message(recipe, f"data.heldout={tmp_path / 'good.jsonl'}")
    assert "is trained on too" in same
    assert "cannot be read" in message(recipe, f"data.chat_template={tmp_path}")


def test_good_data_passes_and_the_hub_is_left_for_later(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    data_check.load_checked_recipe(recipe, ["colm.large_batch_size=40"])
    data_check.check_data(load_recipe(recipe, ["data.train=hub:nobody/nothing", "colm.large_batch_size=4000"]))


def test_rows_are_counted_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*GOOD * 40, {**GOOD[0], "output": ""}]  # in four parts of at most 512
    entries = as_entries([write(tmp_path / "long.jsonl", rows), write(tmp_path / "short.jsonl", GOOD)])
    assert check_entries(entries, 600) is None
    with pytest.raises(DataError, match=r"long.jsonl:1601: example with an empty output"):
        check_entries(entries, 2000)
    assert check_entries(entries[1:], 40 + 1) == 40
    assert check_entries([*entries[1:], *as_entries("hub:a/b")], 41) is None
    recipe = recipe_in(tmp_path, data={"train": str(tmp_path / "long.jsonl")})
    monkeypatch.setattr(data_check, "ROWS_LOOKED_AT", 600)
    data_check.load_checked_recipe(recipe)  # the bad row is behind them


def test_classification_and_stores(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": n % 3} for n in range(6)]
    (tmp_path / "cb").mkdir()
    write(tmp_path / "cb" / "train.jsonl", rows)
    choices = recipe_in(tmp_path, task="choices", data={"task": "cb", "folder": str(tmp_path)})
    said = message(choices)
    assert "large_batch_size = 16: more than the 6 examples" in said
    assert "holds none of superglue/cb/validation, cb/validation" in said
    bad = write(tmp_path / "cb" / "validation.jsonl", [*rows, {"premise": "a"}])
    assert f"{bad}:7: no key 'hypothesis'" in message(choices, "colm.large_batch_size=6", "colm.coreset_size=2")
    store = recipe_in(tmp_path, task="pretraining", data={"store": str(tmp_path)})
    assert "holds no prepared data" in message(store)


def test_a_source_key_that_no_row_has_is_said_once(tmp_path: Path) -> None:
    said = message(recipe_in(tmp_path), "data.source_key=sourse")
    assert said.count("sourse") == 1
    assert f"{tmp_path / 'good.jsonl'}:1: no key 'sourse'. Did you mean 'source'? " in said
    assert said.endswith(" The same problem in 39 more rows.")
    assert "Did you mean" not in message(recipe_in(tmp_path), "data.source_key=zebra")


def test_what_it_says_is_what_loading_says(tmp_path: Path) -> None:
    from colm_ds.data.examples import load_examples
    from tests.data.chats import chat_tokenizer

    for name, (change, _) in BAD.items():
        place = write(tmp_path / f"{name}.jsonl", change(GOOD))
        if name == "few":
            continue
        with pytest.raises(CoLMError) as caught:
            load_examples(place, chat_tokenizer(), 64)
        assert message(recipe_in(tmp_path), f"data.train={place}") == str(caught.value)


def test_many_files_share_what_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = as_entries([write(tmp_path / f"{n}.jsonl", GOOD * 40) for n in range(5)])  # four parts each
    seen: list[int] = []
    check = parts.check_rows
    monkeypatch.setattr(parts, "check_rows", lambda number, *rest: (seen.append(number), check(number, *rest))[1])
    assert check_entries(entries, 1000) is None
    assert seen == [0, 0, 1, 2, 3, 4]  # two parts, and the first of every other file


def test_rows_without_a_source_are_all_counted(tmp_path: Path) -> None:
    rows = [GOOD[0], *[{key: value for key, value in GOOD[0].items() if key != "source"}] * 3000]
    path = write(tmp_path / "some.jsonl", rows)
    with pytest.raises(DataError, match=r"The same problem in 2,999 more rows\."):
        check_entries(as_entries(path), 20_000)


def test_too_few_examples_are_counted_with_what_was_left_out(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_in(tmp_path), needs_files=False)
    with pytest.raises(ConfigError) as caught:
        data_check.check_large_batch(recipe, 6, {"dropped": 491, "held out": 3, "not in data.subset": 0})
    assert "more than the 6 examples of data.train, 491 dropped, 3 held out. Choose fewer" in str(caught.value)
