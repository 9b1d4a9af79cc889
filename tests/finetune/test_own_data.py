"""docs/DATA.md, executed: its rows, its recipe, its script, its commands."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.cli import main
from colm_ds.data import load_examples
from colm_ds.data.schemas import SCHEMAS
from colm_ds.recipes.recipe import Recipe, load_recipe
from colm_ds.training.preview import preview
from colm_ds.training.start_summary import is_weighted
from colm_ds.training.tasks.instructions import InstructionTask, load_data
from tests.data.chats import chat_tokenizer
from tests.data.test_formats import FORMATS, write_rows
from tests.data.test_rows import rows_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def blocks(opening: str) -> list[str]:
    """Return the blocks of the page that open with this line."""
    return re.findall(rf"```{re.escape(opening)}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(folder: Path, tokenizer: Path, data: dict[str, Any], **changes: Any) -> Path:
    """Write a recipe for a tiny model."""
    recipe = {
        "output_dir": str(folder / "run"),
        "steps": 2,
        "model": {"config": TINY},
        "tokenizer": str(tokenizer),
        "data": {"cache_dir": None} | data,
        "colm": {"large_batch_size": 4, "coreset_size": 2, "mask": {"size": 8}},
        "deepspeed": str(ROOT / "ds_configs" / "zero0.json"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return path


def loaded(path: Path, *overrides: str) -> Recipe:
    recipe = load_recipe(path, overrides)
    assert isinstance(recipe, Recipe)
    return recipe


@pytest.mark.parametrize("schema", SCHEMAS)
def test_rows_of_the_table(schema: str, tmp_path: Path) -> None:
    """Each schema has a row in the table, an example, and one that is read as what it is called."""
    assert f"| `{schema}` |" in TEXT
    examples = blocks(f"json {schema}")
    assert examples
    for number, block in enumerate(examples):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block, encoding="utf-8")
        assert load_examples(path, chat_tokenizer(), 999).read == {schema: 1}


def test_several_files(tmp_path: Path, tokenizer_folder: Path) -> None:
    (block,) = blocks("yaml data")
    data = yaml.safe_load(block)
    write_rows(rows_of("messages"), tmp_path / "chats.jsonl")
    write_rows(rows_of("alpaca"), tmp_path / "alpaca.parquet")
    write_rows(rows_of("prompt_completion"), tmp_path / "completions.csv")
    write_rows(rows_of("messages", 12)[7:], tmp_path / "held_out.jsonl")
    recipe = loaded(recipe_of(tmp_path, tokenizer_folder, data))  # paths are relative to the recipe
    task = InstructionTask(recipe, chat_tokenizer())
    assert task.describe()["prompts"] == ["chat", "Question: {prompt}\nAnswer:"]
    assert task.train.source_counts() == {"chats": 9, "completions": 9, "instructions": 9}
    assert task.train.mixture_counts == {"chats": 16, "completions": 5, "instructions": 6}
    assert "WARNING: 2 of 5 held-out examples are trained on too." in task.losses_of_data()
    assert "reads alpaca: 9 instructions" in task.losses_of_data()
    assert is_weighted(recipe)
    assert not is_weighted(loaded(recipe_of(tmp_path, tokenizer_folder, {"train": str(tmp_path / "chats.jsonl")})))
    completions = task.train.source_names.index("completions")
    (third,) = [example for example in task.train if example.source == completions and example.index % 9 == 2]
    assert chat_tokenizer().decode(third.input_ids) == "Question: 2 is\nAnswer: 2<|im_end|>"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_preview_marks_what_is_trained(schema: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = set()
    for name in FORMATS:
        path = write_rows(rows_of(schema), tmp_path / name)
        recipe = loaded(recipe_of(tmp_path, tokenizer_folder, {"train": str(path), "max_length": 300}))
        texts.add(preview(recipe, num_examples=1, with_coreset=False))
    (text,) = texts  # the same from every format
    assert f"reads {schema}: 9 " in text
    assert "passes over the data are inspected" in text
    marked = {
        "messages": "assistant\n>>>two words\nand a line 0<|im_end|><<<\n<|im_start|>user\n",
        "sharegpt": "assistant\n>>>e 0<|im_end|><<<\n",
        "alpaca": "### Response:>>>0<|im_end|><<<",
        "prompt_completion": "0 is>>> 0<|im_end|><<<",
        "text": ">>>text 0<|im_end|><<<",
    }
    assert marked[schema] in text


def test_the_same_file_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write_rows(rows_of("text"), tmp_path / "a.jsonl")
    link = tmp_path / "elsewhere" / "link.jsonl"
    link.parent.mkdir()
    link.symlink_to(path)
    for heldout in (path, link, tmp_path):
        recipe = loaded(recipe_of(tmp_path, tokenizer_folder, {"train": str(path), "heldout": str(heldout)}))
        with pytest.raises(Exception, match=r"(a|link).jsonl is trained on too. Name another file"):
            load_data(recipe, chat_tokenizer())


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"train": {"path": "nowhere.jsonl"}}, ["data.train.path = 'nowhere.jsonl': no such file or folder"]),
        ({"train": [{"path": "a.jsonl", "wieght": 2}]}, ["data.train.0.wieght: unknown key. Did you mean 'weight'?"]),
        ({"train": [{"path": "a.jsonl", "weight": 0}]}, ["data.train.0.weight = 0: must be more than 0"]),
        ({"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}, ["a.jsonl", "has no weight, but others have"]),
        ({"train": "a.jsonl", "heldout": {"path": "b.jsonl", "weight": 2}}, ["data.heldout", "Remove the weights"]),
        ({"train": "a.jsonl", "schema": "chat"}, ["data.schema = 'chat'", "'messages', 'sharegpt', 'alpaca'"]),
        ({"train": "a.jsonl", "train_on": "first"}, ["data.train_on = 'first'", "'all' or 'last'"]),
        ({"train": "a.jsonl", "chat_template": "x.jinja"}, ["data.chat_template = 'x.jinja': no such file"]),
        ({"train": 3}, ["data.train = 3"]),
    ],
)
def test_faults_of_the_section(tmp_path: Path, tokenizer_folder: Path, data: dict[str, Any], parts: list[str]) -> None:
    for name in ("a", "b"):
        write_rows(rows_of("text"), tmp_path / f"{name}.jsonl")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        load_recipe(recipe_of(tmp_path, tokenizer_folder, data))
    assert type(caught.value).__name__ == "ConfigError"
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_commands_name_the_arm_that_costs_no_pass() -> None:
    (name,) = set(re.findall(r"finetune/recipes/\w+\.yaml", TEXT))
    recipe = load_recipe(ROOT / name, needs_files=False)
    assert recipe.colm.probe.estimator == "tokens"
    assert f"colm-ds export {recipe.output_dir} --merge" in TEXT


@pytest.mark.slow
def test_from_instructions_to_a_chat_model(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script, a run, its export, and what transformers makes of it, with a template file of the recipe."""
    script, chat = blocks("python")
    (tmp_path / "to_chats.py").write_text(script, encoding="utf-8")
    rows = [{"source": "ab"[n % 2], "instruction": f"What is {n}+1?", "output": str(n + 1)} for n in range(20)]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    commands = [block.split("\n") for block in blocks("bash")]
    convert, train, export = commands[1][:3]
    subprocess.run([sys.executable, *convert.split()[1:]], cwd=tmp_path, check=True)
    template = chat_tokenizer().chat_template.replace("{{ message['role'] }}", "the {{ message['role'] }}")
    template = template.replace("<|im_start|>assistant", "<|im_start|>the assistant")
    (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
    data = {"train": "chats.jsonl", "max_length": 100, "chat_template": "own.jinja", "holdout_per_source": 2}
    path = recipe_of(tmp_path, tokenizer_folder, data, output_dir="runs/smollm2_chat_tokens", lora={"rank": 2})
    assert train.split()[:2] == ["colm-ds", "train"]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "colm_ds.cli", "train", str(path), train.split()[3]]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reads messages: 20 conversations" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert main(export.split()[1:]) == 0
    capsys.readouterr()
    exec(chat, {})
    assert capsys.readouterr().out.endswith("\n")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("chat_model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>the user\nhi<|im_end|>\n<|im_start|>the assistant\n"
