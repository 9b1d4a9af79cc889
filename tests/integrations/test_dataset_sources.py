"""Sources of the rows of a framework's datasets."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset

from colm_ds.errors import ConfigError, DataError, Problems
from colm_ds.integrations.dataset_sources import (
    by_source,
    check_block,
    dataset_names,
    process_by_source,
    replaced,
    row_sources,
    with_sources,
)


def table(number: int, seed: int = 0) -> Dataset:
    """Rows with a number each and a source among three."""
    generator = random.Random(seed)
    return Dataset.from_dict(
        {"number": list(range(number)), "source": [generator.choice("xyz") for _ in range(number)]}
    )


def test_the_column_or_else_the_name() -> None:
    rows = table(5)
    assert row_sources(rows, "maths", "source") == list(rows["source"])
    assert row_sources(rows, "maths", "number") == ["0", "1", "2", "3", "4"]
    assert row_sources(rows.remove_columns("source"), "maths", "source") == ["maths"] * 5
    assert with_sources(rows, "maths", "number")["number"] == ["0", "1", "2", "3", "4"]
    with pytest.raises(ConfigError, match=r"dataset maths has no such column \(it has number, source\)"):
        row_sources(rows, "maths", "domain")
    with pytest.raises(DataError, match="dataset maths: row 1 has no source"):
        row_sources(Dataset.from_dict({"source": ["x", None]}), "maths", "source")


def tokens(number: int) -> list[int]:
    return [number] * (1 + number % 3)


@pytest.mark.parametrize("mode", ["one into one", "rows are dropped", "rows are cut"])
def test_every_row_that_comes_out_has_its_source(mode: str) -> None:
    """Held against the source of the number that each row was made of."""
    rows = table(60)

    def process(part: Dataset) -> Dataset:
        if mode == "rows are dropped":
            part = part.filter(lambda row: row["number"] % 4 != 0)

        def made(batch: dict[str, list[int]]) -> dict[str, Any]:
            copies = 2 if mode == "rows are cut" else 1
            return {"input_ids": [tokens(number) for number in batch["number"] for _ in range(copies)]}

        return part.map(made, batched=True, remove_columns=part.column_names)

    result = process_by_source(rows, list(rows["source"]), "source", process)
    wanted: Counter[tuple[int, str]] = Counter()
    for number, source in zip(rows["number"], rows["source"], strict=True):
        wanted[number, source] += {"rows are dropped": number % 4 != 0, "rows are cut": 2}.get(mode, 1)
    assert (
        Counter((ids[0], source) for ids, source in zip(result["input_ids"], result["source"], strict=True)) == +wanted
    )
    if mode == "one into one":
        assert [ids[0] for ids in result["input_ids"]] == list(range(60))


def test_a_source_of_which_nothing_is_left() -> None:
    rows = table(30)
    only = process_by_source(
        rows, list(rows["source"]), "source", lambda part: part.filter(lambda row: row["source"] == "x")
    )
    assert set(only["source"]) == {"x"}
    nothing = process_by_source(rows, list(rows["source"]), "source", lambda part: part.select([]))
    assert len(nothing) == 0


def test_rows_of_one_source_are_processed_as_they_are() -> None:
    rows = table(4)
    seen = []
    process_by_source(rows, ["one"] * 4, "source", lambda part: (seen.append(part), part)[1])
    assert seen == [rows]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_blocks_are_cut_within_a_source(batch_size: int) -> None:
    """Every block of two numbers is of rows of one source, in their order; held against a loop over the batches."""
    rows = table(50)

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        assert set(batch) == {"number"}
        numbers = batch["number"]
        return {"pair": [numbers[start : start + 2] for start in range(0, len(numbers) - 1, 2)]}

    result = rows.map(by_source(pairs), batched=True, batch_size=batch_size, remove_columns=rows.column_names)
    wanted = []
    for start in range(0, 50, batch_size):
        held: dict[str, list[int]] = {}
        for number, source in zip(
            *(rows[start : start + batch_size][key] for key in ("number", "source")), strict=True
        ):
            held.setdefault(source, []).append(number)
            if len(held[source]) == 2:
                wanted.append((held.pop(source), source))
    assert sorted(zip(result["pair"], result["source"], strict=True)) == sorted(wanted) if wanted else len(result) == 0


def test_a_source_that_fills_no_block_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Its rows are lost without a word from the Trainer, which never sees them; sorted rows keep them."""
    rows = Dataset.from_dict({"number": list(range(40)), "source": ["big" if n % 20 else "small" for n in range(40)]})

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pair": [batch["number"][at : at + 2] for at in range(0, len(batch["number"]) - 1, 2)]}

    made = rows.map(by_source(pairs), batched=True, batch_size=10, remove_columns=rows.column_names)
    assert set(made["source"]) == {"big"}
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("colm_ds")]
    assert said.startswith("by_source: 1 rows of 'small' in a batch of map make no row, so they are lost. Sort")
    made = rows.sort("source").map(by_source(pairs), batched=True, batch_size=10, remove_columns=rows.column_names)
    assert made["source"].count("small") == 1


NAMES = [
    ([{"path": "org/maths"}, {"path": "org/code"}], ["org/maths", "org/code"]),
    (
        [{"path": "org/maths", "name": "easy"}, {"path": "org/maths", "name": "hard"}],
        ["org/maths:easy", "org/maths:hard"],
    ),
    ([{"path": "org/maths", "name": "easy"}, {"path": "org/maths"}], ["org/maths:easy", "org/maths"]),
    (
        [{"path": "json", "data_files": "d/maths.jsonl"}, {"path": "json", "data_files": "d/code.json"}],
        ["maths", "code"],
    ),
    ([{"path": "a/maths.json"}, {"path": "b/maths.json"}], ["a/maths.json", "b/maths.json"]),
    ([{"path": "a/maths.json"}, {"path": "a/maths.json"}], ["maths", "maths"]),
    ([{"path": "a/maths.json", "split": None}], ["maths"]),
]


@pytest.mark.parametrize(("entries", "names"), NAMES)
def test_names_of_datasets(entries: list[dict[str, Any]], names: list[str]) -> None:
    assert dataset_names(entries) == names


def test_a_block_is_checked_early() -> None:
    problems = Problems("x.yaml")
    assert (
        check_block({"large_batch_size": 16, "source_column": "domain", "log": "all"}, "x.yaml", problems) == "domain"
    )
    assert not problems.messages
    for block, said in (
        (None, 'x.yaml: no colm block. Add "colm:" with large_batch_size in it.'),
        ({}, "colm.large_batch_size = None: missing. Write r"),
        ({"large_batch_size": 16, "metrik": "l1"}, "colm.metrik: unknown key. Did you mean 'metric'?"),
        ({"large_batch_size": 16, "log": "some"}, "colm.log = 'some': unknown"),
        ("nowhere.yaml", "not readable"),
    ):
        problems = Problems("x.yaml")
        assert check_block(block, "x.yaml", problems) == "source"
        (message,) = problems.messages
        assert said in message


def test_names_are_put_back() -> None:
    class Module:
        one, two = 1, 2

    with replaced(Module, one=10, two=20):
        assert (Module.one, Module.two) == (10, 20)
    assert (Module.one, Module.two) == (1, 2)

    def fail() -> None:
        with replaced(Module, one=10):
            raise ValueError(Module.one)

    with pytest.raises(ValueError, match="10"):
        fail()
    assert Module.one == 1
