"""Instruction data: tokens as the prompt says, every bad record named, and a cache that is never wrong."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from colm_ds.data import TokenDataset, encode_example, examples, formats, load_examples, token_cache
from colm_ds.errors import ConfigError, DataError
from colm_ds.types import SourcedDataset

from .conftest import Writer, byte_tokenizer


def record(number: int, source: str = "b", output: str | None = None) -> dict[str, Any]:
    return {"source": source, "instruction": f"Add {number} and 1.", "output": output or str(number + 1)}


RECORDS = [record(1), record(2, "c"), record(3, "a"), record(1), record(40, "c", "x" * 30)]


def contents(dataset: TokenDataset) -> list[tuple[Any, ...]]:
    return [(example.input_ids.tolist(), example.labels.tolist(), example.source, example.index) for example in dataset]


def test_examples(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset: SourcedDataset = load_examples(write_jsonl(RECORDS), tokenizer, 1000)
    assert list(dataset.source_names) == ["a", "b", "c"]
    assert dataset.source_ids.tolist() == [1, 2, 0, 1, 2]
    assert len(dataset) == len(RECORDS)
    for index, row in enumerate(RECORDS):
        ids, prompt_length = encode_example(tokenizer, row["instruction"], row["output"], 1000)
        example = dataset[index]
        assert example.input_ids.tolist() == ids
        assert example.labels.tolist() == [-100] * prompt_length + ids[prompt_length:]
        assert example.input_ids.dtype == example.labels.dtype == torch.int64
        assert (example.index, example.source) == (index, dataset.source_ids[index])
        assert dataset.lengths[index] == len(ids)
        assert dataset.num_label_tokens[index] == len(ids) - prompt_length == (example.labels != -100).sum()
    assert torch.equal(dataset[-1].input_ids, dataset[4].input_ids)
    assert dataset[-1].index == 4
    for outside in (5, -6):
        with pytest.raises(IndexError):
            dataset[outside]


def test_compact_types_and_counts(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = load_examples(write_jsonl(RECORDS), tokenizer, 1000)
    assert dataset.source_counts() == {"a": 1, "b": 2, "c": 2}
    arrays = (dataset.tokens, dataset.starts, dataset.prompt_lengths, dataset.source_ids, dataset.lengths)
    assert [array.dtype.name for array in arrays] == ["int32", "int64", "int32", "int32", "int32"]
    assert len(dataset.tokens) == dataset.lengths.sum()


def test_truncation_drops_and_counts(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*RECORDS, {"source": "long", "instruction": "y" * 500, "output": "1"}]
    path = write_jsonl(rows)
    prompt_length = encode_example(tokenizer, RECORDS[0]["instruction"], "2", 1000)[1]
    dataset = load_examples(path, tokenizer, prompt_length + 2)
    assert dataset.num_dropped == {"no_labels_after_truncation": 1}
    assert dataset.source_counts() == {"a": 1, "b": 2, "c": 2, "long": 0}
    assert dataset.lengths.max() == prompt_length + 2
    assert dataset.num_label_tokens.tolist() == [2, 2, 2, 2, 1]
    with pytest.raises(DataError, match=r"no examples left: all 6 prompts fill max_length = 20 tokens"):
        load_examples(path, tokenizer, 20)


def test_example_with_one_labelled_token_is_kept(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt_length = encode_example(tokenizer, RECORDS[0]["instruction"], "2", 1000)[1]
    path = write_jsonl(RECORDS[:1])
    assert load_examples(path, tokenizer, prompt_length + 1).num_label_tokens.tolist() == [1]
    with pytest.raises(DataError, match="no examples left"):
        load_examples(path, tokenizer, prompt_length)


def test_chunks_do_not_matter(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl([record(number, "abc"[number % 3]) for number in range(11)])
    whole = contents(load_examples(path, tokenizer, 1000))
    monkeypatch.setattr(formats, "CHUNK_ROWS", 3)
    assert contents(load_examples(path, tokenizer, 1000)) == whole


def test_several_files_and_other_source_key(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{**row, "kind": row.pop("source"), "level": 3, "input": "  "} for row in map(dict, RECORDS)]
    paths = [write_jsonl(rows[:2], "z.jsonl"), write_jsonl(rows[2:], "y.jsonl")]
    dataset = load_examples(paths, tokenizer, 1000, source_key="kind")
    assert dataset.source_ids.tolist() == [1, 2, 0, 1, 2]
    folder = load_examples(paths[0].parent, tokenizer, 1000, source_key="kind")
    assert folder.source_ids.tolist() == [0, 1, 2, 1, 2]  # y.jsonl first


def test_subset(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = load_examples(write_jsonl(RECORDS), tokenizer, 1000)
    part = dataset.subset(np.array([4, 1]))
    assert part.source_names == dataset.source_names
    assert part.source_counts() == {"a": 0, "b": 0, "c": 2}
    assert [example.input_ids.tolist() for example in part] == [dataset[i].input_ids.tolist() for i in (4, 1)]
    assert [example.index for example in part] == [0, 1]
    assert part.tokens is dataset.tokens
    assert len(dataset.subset([])) == 0


def test_limit_draws_at_random(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([record(number, "abc"[number % 3]) for number in range(60)])
    whole = [ids for ids, *_ in contents(load_examples(path, tokenizer, 1000))]

    def drawn(limit: int, seed: int) -> list[int]:
        dataset = load_examples(path, tokenizer, 1000, limit=limit, seed=seed)
        assert list(dataset.source_names) == ["a", "b", "c"]
        return [whole.index(ids) for ids, *_ in contents(dataset)]

    first = drawn(10, 0)
    assert first == sorted(set(first)) == drawn(10, 0)
    assert len(first) == 10
    assert first != drawn(10, 1)
    assert max(first) > 20
    assert drawn(100, 0) == list(range(60))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "'output' is of type NoneType, not text"),
        ({"output": 42}, "'output' is of type int, not text"),
        ({"instruction": ["x"]}, "'instruction' is of type list, not text"),
        ({"source": 1}, "'source' is of type int, not text"),
        ({"output": ""}, "example with an empty output"),
        ({"output": " \n\t"}, "example with an empty output"),
        ({"instruction": "\u3000"}, "example with an empty instruction"),
        ({"source": " "}, "example with an empty source"),
        ({"output": "\ud800"}, "half of a surrogate pair"),
        ({"input": ["3", "4"]}, "'input' is a list. Write one text, or a row for each entry"),
        ({"output": ...}, "no key 'output'. Add it; the record has 'source', 'instruction'"),
        ({"source": ...}, "or name the right key in source_key"),
    ],
)
def test_bad_record(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any], message: str
) -> None:
    bad = {key: value for key, value in {**record(1), **change}.items() if value is not ...}
    path = write_jsonl([record(1), bad, record(2)])
    with pytest.raises(DataError) as caught:
        load_examples(path, tokenizer, 1000)
    assert f"1 problem in {path}\n  {path}:2: " in str(caught.value)
    assert message in str(caught.value)


def test_problems_are_collected(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([record(1), {}, {**record(2), "output": ""}])
    with pytest.raises(DataError) as caught:
        load_examples(path, tokenizer, 1000)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"4 problems in {path}"
    assert [line.split(": ")[0].rsplit(":", 1)[-1] for line in lines[1:]] == ["2", "2", "2", "3"]
    path = write_jsonl([{**record(1), "output": ["x"] * n} for n in range(50)])  # of one kind: said once
    with pytest.raises(DataError) as caught:
        load_examples(path, tokenizer, 1000)
    head, line = str(caught.value).splitlines()
    assert head == f"1 problem in {path} (50 rows were read)"
    assert line.startswith(f"  {path}:1: 'output' is of type list, not text.")
    assert line.endswith(" The same problem in 49 more rows.")
    broken = [json.dumps(record(1))[: -n - 1] for n in range(25)]  # of 25 kinds
    path.write_text("\n".join(broken))
    with pytest.raises(DataError) as caught:
        load_examples(path, tokenizer, 1000, schema="alpaca")
    assert str(caught.value).startswith(f"20 problems in {path}")
    assert len(str(caught.value).splitlines()) == 21


def test_broken_line_after_bad_records(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{**record(1), "output": ""}])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"2 problems(.|\n)*:1: example with an empty output(.|\n)*:2: not JSON"):
        load_examples(path, tokenizer, 1000)


def test_bad_arguments(write_jsonl: Writer) -> None:
    path = write_jsonl(RECORDS)
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="limit = 0: must be at least 1"):
        load_examples(path, tokenizer, 100, limit=0)
    with pytest.raises(ConfigError, match="max_length = 0"):
        load_examples(path, tokenizer, 0)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        load_examples(path, tokenizer, 100)


# The cache


def no_tokenising(*_: Any) -> None:
    raise AssertionError("tokenised although it is in the cache")


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_cache_hit_is_equal_and_mapped(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_jsonl([*RECORDS, record(5, "only_dropped", "1")]), tmp_path / "deep" / "cache"
    fresh = load_examples(path, tokenizer, 1000)
    first = load_examples(path, tokenizer, 1000, cache_dir=cache)
    os.utime(path, (1, 1))  # the time does not matter
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=2)  # leaves its mark on the tokenizer
    monkeypatch.setattr(examples, "encode_completions", no_tokenising)
    second = load_examples(path, tokenizer, 1000, cache_dir=str(cache))
    assert contents(fresh) == contents(first) == contents(second)
    assert fresh.source_names == second.source_names
    assert fresh.num_dropped == second.num_dropped
    assert fresh.source_counts() == second.source_counts()
    assert isinstance(first.tokens, np.memmap)
    assert isinstance(second.tokens, np.memmap)
    assert len(entries(cache)) == 1


def test_cache_depends_on_everything(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path, cache = write_jsonl(RECORDS), tmp_path / "cache"
    other = byte_tokenizer(bos=True)
    renamed = byte_tokenizer()
    renamed.add_special_tokens({"eos_token": "<pad>"})
    changes: list[dict[str, Any]] = [
        {},
        {"max_length": 999},
        {"tokenizer": other},
        {"tokenizer": renamed},
        {"limit": 3},
        {"limit": 3, "seed": 1},
        {"limit": 4},
        {"source_key": "instruction"},
        {"data": write_jsonl(RECORDS, "other_name.jsonl")},
    ]
    for number, change in enumerate(changes, start=1):
        arguments = {"data": path, "tokenizer": tokenizer, "max_length": 1000, "cache_dir": cache, **change}
        cached = load_examples(**arguments)
        assert len(entries(cache)) == number, change
        assert contents(cached) == contents(load_examples(**{**arguments, "cache_dir": None}))
    write_jsonl([*RECORDS[:-1], record(41, "c", "x" * 30)])  # the same size, another content
    assert load_examples(path, tokenizer, 1000, cache_dir=cache)[4].input_ids.tolist() != cached[4].input_ids
    assert len(entries(cache)) == len(changes) + 1


@pytest.mark.parametrize("damage", ["cut", "zeros", "missing", "meta", "empty", "meta_type", "not_a_folder"])
def test_damaged_entry_is_built_again(
    write_jsonl: Writer,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, cache = write_jsonl(RECORDS), tmp_path / "cache"
    good = contents(load_examples(path, tokenizer, 1000, cache_dir=cache))
    entry = cache / entries(cache)[0]
    if damage == "cut":
        file = entry / "tokens.npy"
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "zeros":
        np.save(entry / "offsets.npy", np.zeros(len(RECORDS) + 1, np.int64))
    elif damage == "missing":
        (entry / "source_ids.npy").unlink()
    elif damage == "meta":
        (entry / "meta.json").write_text("{")
    elif damage == "empty":
        for file in entry.iterdir():
            file.unlink()
    elif damage == "meta_type":
        (entry / "meta.json").write_text("[]")
    else:
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
        entry.write_text("")
    with caplog.at_level(logging.WARNING):
        assert contents(load_examples(path, tokenizer, 1000, cache_dir=cache)) == good
    assert damage == "not_a_folder" or "damaged" in caplog.text
    assert entries(cache) == [entry.name]
    caplog.clear()
    assert isinstance(load_examples(path, tokenizer, 1000, cache_dir=cache).tokens, np.memmap)
    assert caplog.text == ""


def test_stopped_writer_leaves_no_entry(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_jsonl(RECORDS), tmp_path / "cache"
    append = token_cache.ArrayWriter.append

    def stop(writer: token_cache.ArrayWriter, name: str, values: Any) -> None:
        if name == "prompt_lengths":
            raise KeyboardInterrupt
        append(writer, name, values)

    monkeypatch.setattr(token_cache.ArrayWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        load_examples(path, tokenizer, 1000, cache_dir=cache)
    monkeypatch.undo()
    assert entries(cache) == []
    assert len(load_examples(path, tokenizer, 1000, cache_dir=cache)) == len(RECORDS)


def test_cache_that_can_not_be_written(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        dataset = load_examples(write_jsonl(RECORDS), tokenizer, 1000, cache_dir=tmp_path / "cache")
    assert len(dataset) == len(RECORDS)
    assert "could not be cached" in caplog.text


def test_concurrent_writers(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path, cache = write_jsonl(RECORDS), tmp_path / "cache"
    good = contents(load_examples(path, tokenizer, 1000))
    arrays: dict[str, np.ndarray] = {
        "tokens": np.arange(6, dtype=np.int32),
        "offsets": np.array([0, 6], np.int64),
        "prompt_lengths": np.array([2], np.int32),
        "source_ids": np.array([0], np.int32),
    }
    facts: dict[str, Any] = {"source_names": ["a"], "num_dropped": {}, "lost": {"dropped": {}, "cut": {}}}
    results: list[Any] = []
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        for key in range(20):
            token_cache.store_arrays(cache, str(key), arrays, facts, examples._is_consistent)
            found = token_cache.load_arrays(cache, str(key), examples._DTYPES, examples._is_consistent)
            results.append(found is not None and found[0]["tokens"].tolist() == list(range(6)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 120
    assert entries(cache) == sorted(str(key) for key in range(20))
    assert contents(load_examples(path, tokenizer, 1000, cache_dir=cache)) == good


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    """And not what another process may be writing, or what is no entry."""
    ages = {f".{'ab' * 12}.{'0' * 32}": 2 * 86400, f".{'ab' * 12}.{'1' * 32}": 3600, ".mine": 2 * 86400}
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.npy").write_bytes(b"0")
        for path in (tmp_path / name / "tokens.npy", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    token_cache.store_arrays(tmp_path, "key", {"a": np.arange(3)}, {}, lambda *_: True)
    assert {path.name for path in tmp_path.iterdir()} == {"key", *list(ages)[1:]}


def test_valid_entry_of_another_writer_is_kept(tmp_path: Path) -> None:
    for content in (1, 2):
        arrays = {"tokens": np.array([content], np.int32)}
        token_cache.store_arrays(tmp_path, "key", arrays, {}, lambda _, __: True)
    found = token_cache.load_arrays(tmp_path, "key", {"tokens": "int32"}, lambda _, __: True)
    assert found is not None
    assert found[0]["tokens"].tolist() == [1]


def test_real_data(shared_data: Path, gpt2: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = shared_data / "math_instruct" / "train.jsonl.gz"
    dataset = load_examples(path, gpt2, 512, cache_dir=tmp_path, limit=2000)
    assert len(dataset) + dataset.num_dropped["no_labels_after_truncation"] == 2000
    assert len(dataset.source_names) == 17
    assert dataset.lengths.max() <= 512
    assert dataset.num_label_tokens.min() >= 1
    assert json.loads(json.dumps(dataset.source_counts())) == dataset.source_counts()
    start = time.perf_counter()
    again = load_examples(path, gpt2, 512, cache_dir=tmp_path, limit=2000)
    assert time.perf_counter() - start < 5
    assert again.lengths.tolist() == dataset.lengths.tolist()


def test_what_max_length_takes_away_is_known_by_source(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"source": "short", "instruction": "a", "output": "b"},
        {"source": "long answer", "instruction": "a", "output": "b " * 300},
        {"source": "long question", "instruction": "a " * 300, "output": "b"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for _ in range(2):  # also from the cache
        dataset = load_examples(path, tokenizer, 300, cache_dir=tmp_path / "cache")
        assert dataset.lost == {"dropped": {"long question": 1}, "cut": {"long answer": 1}}
        assert dataset.subset([0]).lost == dataset.lost
        assert dataset.source_counts() == {"long answer": 1, "long question": 0, "short": 1}
