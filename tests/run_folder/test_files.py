"""A file is put in place whole or stays as it was; what cannot be read is empty."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from colm_ds.run_folder.contents import BEST_MODEL, CHECKPOINTS, LOCK, METRICS, SUMMARY
from colm_ds.run_folder.files import read_object, replacing, write_object, write_whole
from colm_ds.run_folder.follow import MetricsTail
from colm_ds.run_folder.read import parse_entry, read_metrics


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    write_object(path, {"a": "é"})
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines(["half", 2])
    assert read_object(path) == {"a": "é"}
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1', '"text"', "[" * 100_000])
def test_what_is_no_object_is_empty_and_said(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    problems: list[str] = []
    assert read_object(path, problems) == {}
    assert len(problems) == 1
    assert problems[0].startswith("config.json ")


def test_a_missing_file_is_empty_and_no_problem(tmp_path: Path) -> None:
    problems: list[str] = []
    assert read_object(tmp_path / "config.json", problems) == {}
    assert problems == []


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ('{"step": 3, "loss": 1.0}', 3),
        ('{"step": 3.0}', 3),
        ('{"step": 2, "lo{"step": 3, "loss": 1.0}', 3),  # a kill cut the first off, the resumed run wrote behind it
        ('{"step": -1}', None),
        ('{"step": true}', None),
        ('{"loss": 1.0}', None),
        ('{"step": 3, "lo', None),
        ("[3]", None),
        ("", None),
    ],
)
def test_lines_of_metrics(line: str, step: int | None) -> None:
    entry = parse_entry(line)
    assert (None if entry is None else entry["step"]) == step


def test_all_readers_of_metrics_agree(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 0}\n{"step": 2}\nhalf\n{"step": 1, "lo{"step": 1, "loss": 2.0}\n\xff\xfe\n{"step": 3}\n'
    )
    problems: list[str] = []
    entries = read_metrics(path, problems)
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert problems == ["2 lines of metrics.jsonl could not be read."]
    followed, replaced = MetricsTail(path).read()
    assert not replaced
    assert sorted(followed, key=lambda entry: entry["step"]) == entries


def test_only_this_room_knows_the_names_of_a_runs_files(repo_root: Path) -> None:
    names = {METRICS, SUMMARY, LOCK, CHECKPOINTS, BEST_MODEL}
    spelled = []
    for path in (repo_root / "colm_ds").rglob("*.py"):
        if path.parent.name != "run_folder":
            constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            spelled += [f"{path.name}:{node.lineno}" for node in constants if node.value in names]
    assert spelled == []
