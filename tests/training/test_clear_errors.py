"""The table of what is known before training is that of docs/RELIABILITY.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.training.clear_errors import CASES, DOCUMENT, HEAD, table, written


def documented() -> dict[str, str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = text[text.index(HEAD) + len(HEAD) :].split("\n\n")[0].splitlines()
    return dict(row.strip("| ").split(" | ", 1) for row in rows)


def test_every_case_is_documented_and_ends_as_it_may() -> None:
    rows = documented()
    assert list(rows) == list(CASES)
    for name, says in rows.items():
        assert "TRACEBACK" not in says, name
        assert re.match(r"exit code [012]: \S", says) or name.startswith("numbers"), (name, says)
        if "exit code 0" not in says and not name.startswith("numbers"):
            assert re.search(r"(Config|Data)Error: ", says), (name, says)


def test_rows_are_put_in_their_place() -> None:
    text = f"before\n\n{HEAD}| old | a |\n\nafter\n"
    assert written(text, ["| new | b |", "| more | c |"]) == f"before\n\n{HEAD}| new | b |\n| more | c |\n\nafter\n"


@pytest.mark.parametrize("word", ["a key twice in the DeepSpeed file", "rows without labels, `CoLMTrainer`"])
def test_some_cases_say_what_is_documented(word: str) -> None:
    """The others are run by the script."""
    (row,) = table([word])
    name, says = row.strip("| ").split(" | ", 1)
    assert documented()[name] == says


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_cases_say_what_is_documented(tmp_path: Path) -> None:
    rows = dict(row.strip("| ").split(" | ", 1) for row in table([]))
    assert {name: says for name, says in rows.items() if "train_runtime" not in says} == {
        name: says for name, says in documented().items() if "train_runtime" not in says
    }
