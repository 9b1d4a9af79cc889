"""Instruction data from other places than files with a source in every record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from colm_ds.data import DataEntry, TokenDataset, load_examples
from colm_ds.errors import DataError

from .conftest import Writer
from .test_examples import RECORDS, contents


def test_one_source(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{key: value for key, value in row.items() if key != "source"} for row in RECORDS]
    dataset = load_examples(write_jsonl(rows), tokenizer, 1000, source_key=None)
    assert dataset.source_counts() == {"all": 5}


def test_hub_name(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the hub are those of a file, and the cache sees when they change."""
    import datasets

    rows = [dict(row) for row in RECORDS]
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*name: Any, split: str) -> list[dict[str, Any]]:
        calls.append((*name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def load() -> TokenDataset:
        return load_examples("hub:a/math", tokenizer, 1000, cache_dir=tmp_path / "cache")

    expected = contents(load_examples(write_jsonl(RECORDS), tokenizer, 1000))
    assert contents(load()) == contents(load()) == expected
    assert set(calls) == {("a/math", None, "train")}
    assert len(list((tmp_path / "cache").iterdir())) == 1
    rows[0]["output"] = "another"
    assert contents(load()) != expected
    both = load_examples([write_jsonl(RECORDS), "hub:a/math:main:test"], tokenizer, 1000)
    assert len(both) == 10
    assert calls[-1] == ("a/math", "main", "test")
    weighted = [DataEntry(path="hub:a/math", weight=3), DataEntry(path=str(write_jsonl(RECORDS * 4)), weight=1)]
    entries = load_examples(weighted, tokenizer, 1000)  # where the hub's come behind those of files
    drawn = entries.mixture_counts
    assert drawn is not None
    assert np.bincount(entries.entry_ids).tolist() == [20, 5]
    assert entries.weights == [1, 3]
    del rows[2]["source"]
    with pytest.raises(DataError, match=r"hub:a/math\[item 3\]: no key 'source'"):
        load()
