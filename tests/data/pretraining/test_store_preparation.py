"""A prepared store: what it holds, that nothing about how it was made shows in it, and what it refuses."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colm_ds.data.generated.text import SHARES, write_text
from colm_ds.data.pretraining import store_preparation, token_store
from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.scan import Sample
from colm_ds.data.pretraining.store_preparation import Preparation, prepare
from colm_ds.data.pretraining.store_table import format_table, table_rows
from colm_ds.data.pretraining.token_store import HELDOUT, SPLITS, TRAIN, TokenStore
from colm_ds.engine.token_table import mean_table
from colm_ds.errors import CoLMError, ConfigError, DataError
from colm_ds.probe.tokens import mean_vectors, random_vectors
from colm_ds.run_folder.lock import RunLock
from colm_ds.selection import SINGLE_PROCESS

FORK = multiprocessing.get_context("fork")
SETTINGS: dict[str, Any] = {
    "vocabulary_size": 400,
    "weights": SHARES,
    "holdout": 0.2,
    "sample_mb": 0.05,
    "part_bytes": 30_000,
}


def quiet(message: str) -> None:
    """Takes progress."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of five sources, one of them compressed each way."""
    import zstandard

    folder = tmp_path_factory.mktemp("text")
    write_text(folder, 0.35, files_per_source=2)
    code, articles = folder / "code_0.jsonl", folder / "articles_1.jsonl"
    code.with_suffix(".jsonl.gz").write_bytes(gzip.compress(code.read_bytes(), mtime=0))
    articles.with_suffix(".jsonl.zst").write_bytes(zstandard.compress(articles.read_bytes()))
    code.unlink()
    articles.unlink()
    return folder


@pytest.fixture(scope="module")
def store(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store made by one process without a break."""
    return prepare(Preparation([text], tmp_path_factory.mktemp("store") / "s", **SETTINGS), say=quiet)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which names a process."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def records_of(folder: Path) -> Iterator[dict[str, Any]]:
    """All records, read plainly."""
    import zstandard

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if path.suffix == ".zst":
            data = zstandard.decompress(data)
        yield from map(json.loads, data.decode().splitlines())


def documents_in(store: TokenStore, split: str, source: str) -> list[str]:
    """The documents of a source, decoded from its tokens, cut at the end-of-sequence tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.folder / "tokenizer")
    tokens = store.read(split, source, 0, store.num_tokens(split, source))
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(piece[piece != tokenizer.eos_token_id]) for piece in np.split(tokens, ends[:-1] + 1)]


def test_every_document_is_there_once_with_its_end_and_on_one_side(text: Path, store: TokenStore) -> None:
    written: dict[str, list[str]] = {}
    for record in records_of(text):
        written.setdefault(record["meta"]["pile_set_name"], []).append(record["text"])
    for source, texts in written.items():
        train, held = (documents_in(store, split, source) for split in SPLITS)
        assert sorted(train + held) == sorted(texts)
        assert held
        assert not set(train) & set(held)
        facts = store.manifest["sources"][source]
        assert [facts[split]["documents"] for split in SPLITS] == [len(train), len(held)]
        assert facts[TRAIN]["text_bytes"] == sum(len(one.encode()) for one in train)


def test_no_chunk_to_train_on_has_a_held_out_document(store: TokenStore) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.folder / "tokenizer")
    train, held = ChunkDataset(store, TRAIN, 64), ChunkDataset(store, HELDOUT, 64)
    pieces = "".join(tokenizer.decode(train[index].input_ids) for index in range(len(train)))
    for source in store.source_names:
        for document in documents_in(store, HELDOUT, source):
            assert document[-60:] not in pieces
    for dataset, split in ((train, TRAIN), (held, HELDOUT)):
        for number, source in enumerate(dataset.source_names):
            indices = np.flatnonzero(dataset.source_ids == number)
            joined = np.concatenate([dataset[int(index)].input_ids.numpy() for index in indices])
            whole = store.read(split, source, 0, store.num_tokens(split, source))
            assert (joined == whole[: len(joined)]).all()
            rest = len(whole) - len(joined)
            assert rest < 64 if split == TRAIN else rest <= 1


def test_a_limit_takes_the_same_chunks_of_every_source(store: TokenStore) -> None:
    whole, some = ChunkDataset(store, HELDOUT, 64), ChunkDataset(store, HELDOUT, 64, limit=3)
    assert some.sizes == [min(3, size) for size in whole.sizes]
    there = {(whole.source_ids[i], tuple(whole[i].input_ids.tolist())) for i in range(len(whole))}
    chosen = [(some.source_ids[i], tuple(some[i].input_ids.tolist())) for i in range(len(some))]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= there


def test_the_table_of_tokens_is_computed_once(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start reads it from the store's folder, also under another name; other chunks have another one."""
    shutil.copytree(store.folder, tmp_path / "store")
    data = ChunkDataset(TokenStore(tmp_path / "store"), TRAIN, 64)
    vectors = random_vectors(int(store.manifest["vocabulary_size"]), 0, 16)
    first = mean_table(data, vectors, SINGLE_PROCESS, 0, data.cache)
    assert first is not None
    assert torch.equal(first, mean_vectors([data[index] for index in range(len(data))], vectors))
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = TokenStore(tmp_path / "moved")
    same, other = ChunkDataset(moved, TRAIN, 64), ChunkDataset(moved, TRAIN, 64, limit=3)
    assert same.cache[1] == data.cache[1] != other.cache[1]
    monkeypatch.setattr(TokenStore, "read", None)
    again = mean_table(same, vectors, SINGLE_PROCESS, 0, same.cache)
    assert again is not None
    assert torch.equal(first, again)
    with pytest.raises(TypeError):  # it would have to read
        mean_table(other, vectors, SINGLE_PROCESS, 0, other.cache)


@pytest.mark.parametrize("num_processes", [3])
def test_processes_do_not_show(text: Path, store: TokenStore, tmp_path: Path, num_processes: int) -> None:
    other = prepare(Preparation([text], tmp_path / "s", **SETTINGS), num_processes, say=quiet)
    assert contents(other.folder) == contents(store.folder)


def prepare_until(wanted: Preparation, writes: int, said: Any) -> None:
    """In a process of its own: stop in the middle of a write, half of it on the disk, and wait to be killed."""
    write, left = token_store.write_whole, writes

    def slow(path: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            path.with_name(f".{path.name}.1").write_bytes(data[: len(data) // 2])
            said.send("now")
            time.sleep(60)
        write(path, data)

    token_store.write_whole = store_preparation.write_whole = slow
    prepare(wanted, say=quiet)


def test_kills_do_not_show(text: Path, store: TokenStore, tmp_path: Path) -> None:
    wanted = Preparation([text], tmp_path / "s", **SETTINGS)
    for writes in (2, 3, 9):
        heard, said = FORK.Pipe(duplex=False)
        process = FORK.Process(target=prepare_until, args=(wanted, writes, said))
        process.start()
        assert heard.recv() == "now"
        process.kill()
        process.join()
        with pytest.raises(DataError, match="is not finished"):
            TokenStore(tmp_path / "s")
    done = len(list((tmp_path / "s" / "parts").glob("*.json")))
    assert done > 2
    broken = tmp_path / "s" / "parts" / "000000.bin"
    broken.write_bytes(broken.read_bytes()[:-2] + b"\0\0")  # a disk that lost what it had
    other = prepare(wanted, say=quiet)
    assert contents(other.folder) == contents(store.folder)


def test_processes_end_with_the_one_that_started_them(text: Path, tmp_path: Path) -> None:
    wanted = Preparation([text], tmp_path / "s", **SETTINGS)
    process = FORK.Process(target=prepare, args=(wanted, 2), kwargs={"say": quiet})
    process.start()
    children: list[str] = []
    while not children and process.is_alive():
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        children = found.stdout.split()
    process.kill()
    process.join()
    assert children
    for _ in range(200):
        if not any(_runs(int(child)) for child in children):
            return
        time.sleep(0.05)
    pytest.fail("a process goes on without its parent")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of the store in this folder."""
    data = {"store": str(folder / "s"), "chunk_tokens": 64, "weights": SHARES}
    asked = {"vocabulary_size": 400, "holdout": 0.2, "sample_mb": 0.05}
    values: dict[str, Any] = {"task": "pretraining", "output_dir": str(folder / "run"), "steps": 1, "data": data}
    values |= {"model": {"config": {"model_type": "llama"}}, "prepare": asked, "deepspeed": {}}
    values |= {"colm": {"large_batch_size": 8, "coreset_size": 4}, **changes}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def test_the_command_line_prints_the_table(text: Path, store: TokenStore, tmp_path: Path, capsys: Any) -> None:
    from pretrain.prepare import main

    arguments = [str(recipe(tmp_path)), "--data", str(text), "--processes", "1"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert table.strip() == format_table(store, 64, SHARES).strip()
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().err
    assert main([*arguments, "prepare.holdout=0.3"]) == 2
    assert "holdout: 0.2 there, 0.3 here" in capsys.readouterr().err


def test_changes_may_stand_behind_the_data(text: Path, tmp_path: Path, capsys: Any) -> None:
    from pretrain.prepare import main

    odd = text / "odd=name.jsonl"  # a file all the same
    odd.write_text((text / "comments_0.jsonl").read_text())
    (text / "comments_0.jsonl").rename(tmp_path / "comments_0.jsonl")
    try:
        files = [str(file) for file in sorted(text.iterdir())]
        words = ["--data", *files, f"data.store={tmp_path / 'other'}", "prepare.sample_mb=0.06", "--processes", "1"]
        assert main([str(recipe(tmp_path)), *words]) == 0
    finally:
        (tmp_path / "comments_0.jsonl").rename(text / "comments_0.jsonl")
        odd.unlink()
    asked = TokenStore(tmp_path / "other").manifest["settings"]
    assert asked["sample_mb"] == 0.06
    assert [name for name, _ in asked["files"]] == [Path(file).name for file in files]
    assert main([str(recipe(tmp_path)), "--data", "prepare.sample_mb=0.06"]) == 2
    assert "names no file or folder" in capsys.readouterr().err


def test_shares_of_the_mixture_are_those_asked_for(store: TokenStore) -> None:
    rows = {row["source"]: row for row in table_rows(store, 64, SHARES)}
    for source, share in SHARES.items():
        assert abs(100 * rows[source]["mixture_share"] - share) < 0.5
        assert rows[source]["small"] == (share < 20)
    assert sum(row["mixture_chunks"] for row in rows.values()) == sum(row["chunks"] for row in rows.values())
    natural = table_rows(store, 64, None)
    assert all(row["mixture_chunks"] == row["chunks"] for row in natural)


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def good(number: int, source: str = "a") -> str:
    return json.dumps({"text": f"some words about {number} things {number * 7}", "meta": {"pile_set_name": source}})


BAD = {
    "not json": ("{", "not JSON"),
    "a list": ("[1]", "not an object"),
    "no source": ('{"text": "a"}', "no source"),
    "no text": ('{"meta": {"pile_set_name": "a"}}', "no text"),
    "half a pair": ('{"text": "\\ud800", "meta": {"pile_set_name": "a"}}', "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_counted_shown_and_put_up_with(tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    path = write_lines(tmp_path, *map(good, range(20)), line, *map(good, range(20, 60)))
    wanted = {"vocabulary_size": 300, "holdout": 0.1, "tokenizer": None, "sample_mb": 1.0}
    with pytest.raises(DataError, match="1 of 61 lines are bad") as caught:
        prepare(Preparation([path], tmp_path / "s", **wanted), say=quiet)
    assert f"{path}:21: " in str(caught.value)
    assert message in str(caught.value)
    said: list[str] = []
    store = prepare(Preparation([path], tmp_path / "t", **wanted, max_bad_fraction=0.02), say=said.append)
    assert any(f"{path}:21" in one for one in said)
    assert store.manifest["bad_lines"]["count"] == 1
    counts = store.manifest["sources"]["a"]
    assert counts[TRAIN]["documents"] + counts[HELDOUT]["documents"] == 60


def test_unknown_sources_are_listed_or_left_out(tmp_path: Path) -> None:
    lines = [good(number, "abc"[number % 3]) for number in range(90)]
    path = write_lines(tmp_path, *lines)
    wanted: dict[str, Any] = {"vocabulary_size": 300, "holdout": 0.1, "weights": {"a": 1, "b": 2}}
    with pytest.raises(DataError, match=r"does not name: \['c'\]") as caught:
        prepare(Preparation([path], tmp_path / "s", **wanted), say=quiet)
    assert "a: 30 documents" in str(caught.value)
    store = prepare(Preparation([path], tmp_path / "t", **wanted, skip_others=True), say=quiet)
    assert store.source_names == ("a", "b")
    assert store.manifest["left_out"]["c"]["documents"] == 30
    with pytest.raises(DataError, match=r"not in the files: \['d'\]"):
        prepare(Preparation([path], tmp_path / "u", **(wanted | {"weights": {"d": 1}})), say=quiet)


def test_what_a_refusal_advises_is_taken(tmp_path: Path) -> None:
    """Both faults are told at once; nothing was made yet, so other settings are no reason to start over."""
    path = write_lines(tmp_path, *map(good, range(30)), good(1, "b"), "{broken")
    wanted: dict[str, Any] = {"vocabulary_size": 300, "sample_mb": 1, "holdout": 0.2, "weights": {"a": 1.0}}
    with pytest.raises(ConfigError) as refused:
        prepare(Preparation([path], tmp_path / "s", **wanted), say=quiet)
    assert "skip_other_sources" in str(refused.value)
    assert "max_bad_fraction" in str(refused.value)
    store = prepare(Preparation([path], tmp_path / "s", **wanted, skip_others=True, max_bad_fraction=0.1), say=quiet)
    assert store.why_not_whole() is None
    with pytest.raises(ConfigError, match="was prepared with other settings"):
        prepare(Preparation([path], tmp_path / "s", **wanted, max_bad_fraction=0.1), say=quiet)


def test_a_vocabulary_that_is_too_small_can_be_made_larger(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *map(good, range(30)))
    with pytest.raises(DataError, match="Choose at least"):
        prepare(Preparation([path], tmp_path / "s", vocabulary_size=20, holdout=0.1), say=quiet)
    store = prepare(Preparation([path], tmp_path / "s", vocabulary_size=300, holdout=0.1), say=quiet)
    assert store.why_not_whole() is None


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.json"])
def test_files_without_lines_of_json(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text,meta")
    with pytest.raises(DataError, match=r"not read here\. Write one document a line"):
        prepare(Preparation([tmp_path / name], tmp_path / "s", **SETTINGS), say=quiet)


def test_no_file_of_a_store_stays_open(store: TokenStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened = TokenStore(store.folder)
    for split, source in opened._segments:
        for start in range(0, opened.num_tokens(split, source) - 5, 97):
            opened.read(split, source, start, 5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_becomes_shorter(store: TokenStore, tmp_path: Path) -> None:
    copy = shutil.copytree(store.folder, tmp_path / "s")
    opened = TokenStore(copy)
    for part in (copy / "parts").glob("*.bin"):
        part.write_bytes(b"")
    with pytest.raises(DataError, match="has become shorter"):
        opened.read(TRAIN, opened.source_names[0], 0, 5)


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *map(good, range(30)))
    with pytest.raises(ConfigError, match=r"data\.store = .*: cannot be written: Not a directory"):
        prepare(Preparation([path], path / "s", **SETTINGS), say=quiet)


def test_files_that_change_meanwhile_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path, *map(good, range(40)))
    wanted = Preparation([path], tmp_path / "s", vocabulary_size=300, holdout=0.1)
    monkeypatch.setattr("colm_ds.data.pretraining.store_preparation.tokenise_part", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, say=quiet)
    monkeypatch.undo()
    path.write_text(path.read_text().replace("some words", "nice words"))
    with pytest.raises(DataError, match="has changed since it was scanned"):
        prepare(wanted, say=quiet)
    with pytest.raises(ConfigError, match="was prepared with other settings"):
        prepare(Preparation([path], tmp_path / "s", vocabulary_size=310, holdout=0.1), say=quiet)
    assert len(prepare(wanted, overwrite=True, say=quiet).source_names) == 1


def test_overwriting_removes_a_store_and_nothing_else(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *map(good, range(40)))
    project, disk, link = tmp_path / "project", tmp_path / "disk", tmp_path / "link"
    for folder in (project, disk):
        folder.mkdir()
    (project / "settings.json").write_text('{"editor.fontSize": 12}')
    (project / "thesis.tex").write_text("years of work")
    link.symlink_to(disk)
    wanted = Preparation([path], project, vocabulary_size=300, holdout=0.1)
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(wanted, overwrite=True, say=quiet)
    assert (project / "thesis.tex").exists()
    assert not (project / "run.lock").exists()
    prepare(replace(wanted, folder=link), say=quiet)
    (disk / "notes.txt").write_text("mine")
    other = prepare(replace(wanted, folder=link, vocabulary_size=310), overwrite=True, say=quiet)
    assert other.why_not_whole() is None
    assert other.manifest["vocabulary_size"] == 310
    assert len(AutoTokenizer.from_pretrained(link / "tokenizer")) == 310
    assert (disk / "notes.txt").exists()


def test_two_preparations_of_a_store_at_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *map(good, range(40)))
    wanted = Preparation([path], tmp_path / "s", vocabulary_size=300, holdout=0.1)
    lock = RunLock(tmp_path / "s", "data.store =", "a store")
    with pytest.raises(ConfigError, match=r"data\.store = .*: process \d+ on .* is writing a store there"):
        prepare(wanted, say=quiet)
    lock.release()
    store = prepare(wanted, say=quiet)
    lock = RunLock(tmp_path / "s", "data.store =", "a store")
    assert contents(prepare(wanted, say=quiet).folder) == contents(store.folder)  # only read
    lock.release()


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_broken_store_is_not_opened(store: TokenStore, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(store.folder, tmp_path / "s")
    assert TokenStore(copy).why_not_whole() is None
    part = copy / "parts" / "000001.bin"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "checksum" in str(TokenStore(copy).why_not_whole())
    part.write_bytes(data[:-1])
    with pytest.raises(DataError, match="bytes, not"):
        TokenStore(copy)
    with pytest.raises(DataError, match="no prepared data"):
        TokenStore(tmp_path)


def test_a_tokenizer_of_ones_own(text: Path, store: TokenStore, tmp_path: Path) -> None:
    trained = store.folder / "tokenizer"
    by_place = {}
    for place in (trained, trained / "sentencepiece.model"):
        settings = SETTINGS | {"tokenizer": str(place)}
        by_place[place] = prepare(Preparation([text], tmp_path / place.name, **settings), say=quiet)
        assert by_place[place].manifest["sources"] == store.manifest["sources"]
        assert [part["checksum"] for part in by_place[place].manifest["parts"]] == [
            part["checksum"] for part in store.manifest["parts"]
        ]
    nothing = SETTINGS | {"tokenizer": str(tmp_path / "nothing.model")}
    with pytest.raises(CoLMError, match="cannot be read"):
        prepare(Preparation([text], tmp_path / "u", **nothing), say=quiet)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), max_size=30, unique_by=lambda one: one[0]), st.data())
def test_a_sample_does_not_depend_on_the_order(documents: list[tuple[int, int]], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, 60))
    sample = Sample(budget)
    for place, size in data.draw(st.permutations(documents)):
        sample.offer(place / 100, f"{place}", size)
    expected, total = [], 0
    for place, size in sorted(documents):
        if total >= budget:
            break
        expected.append(f"{place}")
        total += size
    assert sample.texts() == expected


def test_what_was_read_is_a_copy(store: TokenStore) -> None:
    source = store.source_names[0]
    chunk = store.read(TRAIN, source, 0, 10)
    chunk[:] = 0
    assert store.read(TRAIN, source, 0, 10).any()
    with pytest.raises(IndexError):
        store.read(TRAIN, source, store.num_tokens(TRAIN, source), 1)
