"""Rows of all schemas and formats as datasets: labels, sources, weights, faults, other processes, memory."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colm_ds.data import DataEntry, TokenDataset, load_examples, split_holdout, workers
from colm_ds.data.examples import describe_read
from colm_ds.data.formats import read_records
from colm_ds.data.holdout import count_common
from colm_ds.data.prompt import PROMPT_TEMPLATE
from colm_ds.data.schemas import SCHEMAS, Conversation, read_sample
from colm_ds.errors import ConfigError, DataError

from .chats import TURNS, as_chatml, chat_tokenizer
from .conftest import Writer
from .test_examples import contents
from .test_formats import FORMATS, write_rows
from .waiting import KillWorker

ROOT = Path(__file__).resolve().parents[2]
_FROM = {"system": "system", "user": "human", "assistant": "gpt"}


def rows_of(schema: str, count: int = 9) -> list[dict[str, Any]]:
    """Rows of a schema, numbered in their texts."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        turns = [{**turn, "content": f"{turn['content']} {number}"} for turn in TURNS]
        rows.append(
            {
                "messages": {"messages": turns},
                "sharegpt": {"conversations": [{"from": _FROM[t["role"]], "value": t["content"]} for t in turns]},
                "alpaca": {"instruction": f"add {number}", "output": str(number)},
                "prompt_completion": {"prompt": f"{number} is", "completion": f" {number}"},
                "text": {"text": f"text {number}"},
            }[schema]
        )
    return rows


def expected(schema: str, tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row, put together from pieces."""
    row = rows_of(schema, number + 1)[number]
    if schema in ("messages", "sharegpt"):
        return as_chatml(tokenizer, rows_of("messages", number + 1)[number]["messages"], [2, 4])
    if schema == "text":
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        return ids, ids
    prompt, answer = (
        (PROMPT_TEMPLATE.format(instruction=row["instruction"]), row["output"])
        if schema == "alpaca"
        else (row["prompt"], row["completion"])
    )
    first, second = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return first + second, [-100] * len(first) + second


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_schema_in_each_format(tmp_path: Path, schema: str, name: str) -> None:
    tokenizer = chat_tokenizer()
    dataset = load_examples(write_rows(rows_of(schema), tmp_path / name), tokenizer, 1000)
    assert [(ids, labels) for ids, labels, *_ in contents(dataset)] == [
        expected(schema, tokenizer, number) for number in range(9)
    ]
    for example, trained in zip(dataset, dataset.num_label_tokens, strict=True):
        assert int((example.labels[1:] != -100).sum()) == trained  # nothing is predicted at the first token
    assert dataset.source_counts() == {"rows": 9}
    assert dataset.read == {schema: 9}
    assert describe_read(dataset.read)[0].startswith(f"reads {schema}: 9 ")


def test_all_schemas_together(tmp_path: Path) -> None:
    """Each file is recognised by itself; the cache gives the same, also of a subset."""
    tokenizer = chat_tokenizer()
    entries = [
        DataEntry(path=str(write_rows(rows_of(schema), tmp_path / f"{schema}.jsonl")), name=f"of {schema}")
        for schema in SCHEMAS
    ]
    fresh = load_examples(entries, tokenizer, 1000)
    for _ in range(2):
        cached = load_examples(entries, tokenizer, 1000, cache_dir=tmp_path / "cache")
        assert contents(cached) == contents(fresh)
        assert cached.digest() == fresh.digest()
        assert isinstance(cached.trained, np.memmap)
        assert cached.read == fresh.read == dict.fromkeys(SCHEMAS, 9)
    assert fresh.source_counts() == {f"of {schema}": 9 for schema in sorted(SCHEMAS)}
    part = fresh.subset([40, 0, 30])
    assert [row[:2] for row in contents(part)] == [row[:2] for row in (contents(fresh)[i] for i in (40, 0, 30))]
    assert part.num_label_tokens.tolist() == fresh.num_label_tokens[[40, 0, 30]].tolist()


def test_the_digest_sees_labels(write_jsonl: Writer) -> None:
    path, tokenizer = write_jsonl(rows_of("messages")), chat_tokenizer()
    both, last = (load_examples(path, tokenizer, 1000, train_on=which) for which in ("all", "last"))  # type: ignore[arg-type]
    assert both.tokens.tolist() == last.tokens.tolist()
    assert both.digest() != last.digest()
    assert last.num_label_tokens.sum() < both.num_label_tokens.sum()


def test_the_cache_sees_what_changes_tokens(write_jsonl: Writer, tmp_path: Path) -> None:
    path, cache = write_jsonl(rows_of("messages")), tmp_path / "cache"
    tokenizer = chat_tokenizer()
    changes: list[dict[str, Any]] = [
        {},
        {"train_on": "last"},
        {"chat_template": "{# changed #}" + tokenizer.chat_template},
        {"chat_template_kwargs": {"x": 1}},
        {"data": DataEntry(path=str(path), name="chats")},
    ]
    for number, change in enumerate(changes, start=1):
        arguments: dict[str, Any] = {"data": path, "tokenizer": tokenizer, "max_length": 1000} | change
        cached = load_examples(**arguments, cache_dir=cache)
        assert len(list(cache.iterdir())) == number, change
        assert contents(cached) == contents(load_examples(**arguments))


def test_truncated_conversations(write_jsonl: Writer) -> None:
    tokenizer = chat_tokenizer()
    ids, labels = as_chatml(tokenizer, rows_of("messages", 1)[0]["messages"], [2, 4])
    trained = [place for place, label in enumerate(labels) if label != -100]
    path = write_jsonl(rows_of("messages", 1))
    for length in (trained[0] + 1, trained[0] + 5, trained[-1], len(ids)):
        dataset = load_examples(path, tokenizer, length)
        assert contents(dataset)[0][:2] == (ids[:length], labels[:length])
        assert dataset.lost["cut"] == ({"train": 1} if trained[-1] >= length else {})
    with pytest.raises(DataError, match="no examples left"):
        load_examples(path, tokenizer, trained[0])


# Sources


def test_sources(tmp_path: Path) -> None:
    """A row's own, else the entry's name, else the file's; each file by itself."""
    tokenizer = chat_tokenizer()
    own = write_rows([{**row, "source": "own"} for row in rows_of("text", 2)], tmp_path / "own.jsonl")
    bare = write_rows(rows_of("text", 3), tmp_path / "bare.text.parquet")
    named = DataEntry(path=str(write_rows(rows_of("text", 4), tmp_path / "x.csv")), name="named")
    assert load_examples([own, bare, named], tokenizer, 99).source_counts() == {"bare": 3, "named": 4, "own": 2}
    whole = load_examples([own, bare, named], tokenizer, 99, source_key=None)
    assert whole.source_counts() == {"all": 5, "named": 4}
    assert load_examples([own], tokenizer, 99, source_key="text").source_counts() == {"text 0": 1, "text 1": 1}
    with pytest.raises(DataError, match=r"bare.text.parquet\[row 1\]: no key 'kind'. Add it, or name the right key"):
        load_examples(bare, tokenizer, 99, source_key="kind")


def test_a_row_without_source_among_others(write_jsonl: Writer, tmp_path: Path) -> None:
    rows = [{**row, "source": "own"} for row in rows_of("text", 4)]
    del rows[2]["source"]
    with pytest.raises(DataError, match=r"1 problem in .*\n.*train.jsonl:3: no key 'source'. Add it"):
        load_examples(write_jsonl(rows), chat_tokenizer(), 99)
    with pytest.raises(DataError, match=r"rows.parquet\[row 3\]: the key 'source' is null"):
        load_examples(write_rows(rows, tmp_path / "rows.parquet"), chat_tokenizer(), 99)


@pytest.mark.parametrize("prompt", ["auto", "chat"])
def test_messages_in_cells_of_a_table_of_text(prompt: str, tmp_path: Path) -> None:
    """The JSON of messages in a CSV file is messages; a text that begins with a bracket is a text."""
    tokenizer = chat_tokenizer()
    asked, answered = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]
    whole = write_rows([{"prompt": asked, "completion": answered}], tmp_path / "rows.jsonl")
    cells = tmp_path / "rows.csv"
    with cells.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "completion"], [json.dumps(asked), json.dumps(answered)]])
    expected = load_examples(DataEntry(path=str(whole), prompt="chat"), tokenizer, 99)
    read = load_examples(DataEntry(path=str(cells), prompt=prompt), tokenizer, 99)
    assert read[0].input_ids.tolist() == expected[0].input_ids.tolist()
    assert read[0].labels.tolist() == expected[0].labels.tolist()
    text = write_rows([{"prompt": "[INST] hi [/INST]", "completion": "[1, 2]"}], tmp_path / "text.jsonl")
    assert load_examples(str(text), tokenizer, 99).prompts == ("plain",)


def test_a_null_of_ones_own_stays(tmp_path: Path) -> None:
    """An argument that is null in JSON lines is null in the prompt; what a table fills in is not there."""
    calls = [{"type": "function", "function": {"name": "find", "arguments": {"city": "Paris", "unit": None}}}]
    messages = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    path = write_rows([{"messages": messages}], tmp_path / "rows.jsonl")
    (_, row), *_ = read_records(path)
    sample = read_sample(row, "messages", "chat")
    assert isinstance(sample, Conversation)
    assert sample.messages[0] == {"role": "user", "content": "hi"}
    assert sample.messages[1]["tool_calls"] == calls
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [messages]}), table)
    (_, row), *_ = read_records(table)
    assert "unit" not in row["messages"][1]["tool_calls"][0]["function"]["arguments"]


# Weights


def test_weights(tmp_path: Path) -> None:
    """Every large batch of a round has the entries' shares; within an entry sources keep their proportion."""
    tokenizer = chat_tokenizer()
    rows = [{**row, "source": "ab"[number % 3 == 0]} for number, row in enumerate(rows_of("text", 30))]
    one = DataEntry(path=str(write_rows(rows, tmp_path / "one.jsonl")), weight=1)
    others = [{"text": f"other {number}"} for number in range(30)]
    two = DataEntry(path=str(write_rows(others, tmp_path / "two.jsonl")), weight=3)
    dataset = load_examples([one, two], tokenizer, 99, cache_dir=tmp_path / "cache")
    sampler = dataset.sampler(20, 0)
    drawn = np.concatenate([sampler.indices(step) for step in range(1, sampler.steps_per_epoch + 1)])
    counts = np.bincount(dataset.source_ids[drawn], minlength=3)
    assert counts[2] == 45
    assert counts[:2].sum() == 15
    assert dataset.mixture_counts == {"a": 10, "b": 5, "two": 45}
    held = split_holdout(dataset, per_source=2)[0]
    assert held.mixture_counts is not None
    assert sum(held.mixture_counts.values()) == len(held) == 54
    assert len(set(held.sampler(20, 0).indices(1).tolist())) == 20
    heavier = two.model_copy(update={"weight": 4.0})
    assert load_examples([one, heavier], tokenizer, 99).digest() != dataset.digest()
    with pytest.raises(ConfigError, match=r"one.jsonl has no weight, but others have"):
        load_examples([one.model_copy(update={"weight": None}), two], tokenizer, 99)
    long = write_rows([{"prompt": "x" * 200, "completion": "y"}], tmp_path / "long.jsonl")
    with pytest.raises(ConfigError, match=r"nothing is left of .*long.jsonl, which has a weight"):
        load_examples([DataEntry(path=str(long), weight=1), two], tokenizer, 99)


# Held-out


def test_texts_are_held_out_as_wholes(write_jsonl: Writer) -> None:
    rows = [*rows_of("text", 12), *rows_of("text", 12)]
    train, heldout = split_holdout(load_examples(write_jsonl(rows), chat_tokenizer(), 99), per_source=4)
    assert len(heldout) == 4
    assert count_common(train, heldout) == 0


def test_common_examples_are_counted(write_jsonl: Writer) -> None:
    tokenizer = chat_tokenizer()
    train = load_examples(write_jsonl(rows_of("messages", 9)), tokenizer, 1000)
    heldout = load_examples(
        write_jsonl([*rows_of("messages", 12)[6:], *rows_of("messages", 1)], "b.jsonl"), tokenizer, 1000
    )
    assert count_common(train, heldout) == 4


# Faults


def test_all_faults_of_a_file_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps(rows_of("messages", 1)[0])
    bad = json.dumps({"messages": [{"role": "user", "content": ""}]})
    path.write_bytes(b"\n".join([good.encode(), bad.encode(), b"{oops", b'{"messages": "\xff"}', b"[]", good.encode()]))
    with pytest.raises(DataError) as caught:
        load_examples(path, chat_tokenizer(), 1000)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"4 problems in {path}"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"  {path}:{number}" for number in (2, 3, 4, 5)]
    assert [
        part for part in ("is empty", "not JSON", "not UTF-8", "not an object") if part not in str(caught.value)
    ] == []


def test_faults_that_only_the_template_sees(write_jsonl: Writer) -> None:
    tokenizer = chat_tokenizer()
    picky = "{% if 'more? 1' in messages[3].content %}{{ raise_exception('No more.') }}{% endif %}"
    tokenizer.chat_template = picky + tokenizer.chat_template
    with pytest.raises(DataError, match=r"train.jsonl:2: the chat template refuses it: No more"):
        load_examples(write_jsonl(rows_of("messages", 3)), tokenizer, 1000)
    with pytest.raises(ConfigError, match=r"train.jsonl:1: message 3, of the assistant, does not end"):
        load_examples(write_jsonl(rows_of("messages", 3)), tokenizer, 1000, chat_template="{{ messages[0].content }}")


def test_a_file_that_breaks_off_after_bad_rows(tmp_path: Path) -> None:
    path = write_rows([*rows_of("text", 700), {"text": ""}, *rows_of("text", 700)], tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"2 problems(.|\n)*gz:701: example with an empty text(.|\n)*broken gzip"):
        load_examples(path, chat_tokenizer(), 99)


def test_a_table_whose_texts_are_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"2+2?", b"\xbe\xff", b"3+3?"], pa.binary())
    texts = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": texts, "completion": ["4", "x", "6"]}), path)
    with pytest.raises(DataError, match=r"rows.parquet\[row 2\]: the file is damaged: .*UTF8.*Write it again"):
        load_examples(path, chat_tokenizer(), 99)


def test_a_style_that_does_not_fit_names_the_file(write_jsonl: Writer) -> None:
    path = write_jsonl(rows_of("text"))
    with pytest.raises(ConfigError, match=rf"{path}: prompt = 'chat': no style of text. Write 'plain'"):
        load_examples(path, chat_tokenizer(), 99, prompt="chat")


def test_a_schema_that_is_named(write_jsonl: Writer) -> None:
    rows = [{**row, "text": "unused"} for row in rows_of("alpaca")]
    path = write_jsonl(rows)
    with pytest.raises(ConfigError, match=r"`schema: alpaca` or `schema: text`"):
        load_examples(path, chat_tokenizer(), 999)
    assert load_examples(path, chat_tokenizer(), 999, schema="text").read == {"text": 9}
    with pytest.raises(DataError, match=r"train.jsonl:1: no key 'messages'. Add it"):
        load_examples(path, chat_tokenizer(), 999, schema="messages")


# Other processes and memory


def test_other_processes_give_the_same(tmp_path: Path, write_jsonl: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    from colm_ds.data import formats

    tokenizer = chat_tokenizer()
    paths = []
    for schema in ("messages", "alpaca"):
        rows = [{**row, "source": str(number % 3)} for number, row in enumerate(rows_of(schema, 60))]
        paths.append(write_jsonl(rows, f"{schema}.jsonl"))
    alone = load_examples(paths, tokenizer, 150, limit=100)
    monkeypatch.setattr(formats, "CHUNK_ROWS", 5)
    monkeypatch.setattr(workers, "SECONDS_HERE", 3)
    monkeypatch.setattr(workers, "monotonic", itertools.count().__next__)  # time for two parts here
    together = load_examples(paths, tokenizer, 150, limit=100, num_processes=2, cache_dir=tmp_path / "cache")
    assert contents(together) == contents(alone)
    assert (together.digest(), together.lost) == (alone.digest(), alone.lost)
    bad = write_jsonl([*rows_of("text", 60), {"text": ""}], "bad.jsonl")
    with pytest.raises(DataError, match=r"bad.jsonl:61: example with an empty text"):
        load_examples([*paths, bad], tokenizer, 150, num_processes=2)


def test_a_process_that_is_killed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_HERE", 0.0)
    with pytest.raises(DataError, match=r"ended abruptly.*data.num_processes"):
        list(workers.map_in_order(KillWorker(), range(9), 2))


LEFT_ALONE = """
import sys
from colm_ds.data import workers
from tests.data.waiting import WaitInWorker

workers.SECONDS_HERE = 0.0
list(workers.map_in_order(WaitInWorker(sys.argv[1]), range(9), 2))
"""


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    def alive() -> list[int]:
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    parent = subprocess.Popen([sys.executable, "-c", LEFT_ALONE, str(tmp_path)], cwd=ROOT)
    try:
        wait_until(lambda: len(alive()) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not alive())


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


MEASURE = """
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from colm_ds.data import load_examples

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

backend = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, unk_token="?"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
load_examples(sys.argv[1], tokenizer, 64, cache_dir=sys.argv[3])
before = anonymous()
dataset = load_examples(sys.argv[2], tokenizer, 64, cache_dir=sys.argv[3])
print(json.dumps([len(dataset), anonymous() - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path, write_jsonl: Writer) -> None:
    """40 MB of rows take less than half of that of the process's own memory, as they lie in the cache."""
    small = write_jsonl([{"text": "a word"}], "small.jsonl")
    large = write_jsonl(
        [{"text": f"{number} " + "somewhatlongerword " * 200} for number in range(10_000)], "large.jsonl"
    )
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    count, grown_kib = json.loads(done.stdout.split("\n")[-2])
    assert count == 10_000
    assert large.stat().st_size > 38e6
    assert grown_kib < 19_000, f"{grown_kib / 1024:.1f} MiB"


def test_dataset_without_weights_has_the_natural_mixture(write_jsonl: Writer) -> None:
    dataset: TokenDataset = load_examples(write_jsonl(rows_of("text")), chat_tokenizer(), 99)
    assert dataset.mixture_counts is None
    assert sorted(dataset.sampler(9, 0).indices(1).tolist()) == list(range(9))
