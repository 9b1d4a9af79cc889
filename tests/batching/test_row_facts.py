"""What is known of rows before training, against a loop over plain lists."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from colm_ds.batching import row_facts
from colm_ds.batching.loader import RecordDataset
from colm_ds.batching.row_facts import (
    Labels,
    RowFacts,
    facts_of_columns,
    facts_of_rows,
    has_arrow_columns,
    hash_rows,
    hashes_of_columns,
    values_of_column,
)
from colm_ds.errors import DataError


def plain_facts(rows: list[dict[str, Any]], labels: Labels) -> dict[str, Any]:
    """The same facts by loops over lists; extremes are values alone."""
    lengths, counts, ids, targets = [], [], [], []
    for row in rows:
        own = row["input_ids"]
        given = row.get(labels.column) if labels.column else None
        wanted = [-100 if each == labels.ignored else each for each in (own if given is None else given)]
        mask = row.get("attention_mask") or [1] * len(own)
        kept = [(token, label) for token, label, keep in zip(own, wanted, mask, strict=True) if keep]
        lengths.append(len(kept))
        counts.append(sum(label != -100 for _, label in kept[1:]))
        ids += [token for token, _ in kept]
        targets += [label for _, label in kept[1:] if label != -100]
    extremes = (max(ids, default=None), min(ids, default=None), max(targets, default=None), min(targets, default=None))
    return {"lengths": lengths, "counts": counts, "extremes": extremes}


def check(facts: RowFacts, rows: list[dict[str, Any]], labels: Labels) -> None:
    wanted = plain_facts(rows, labels)
    assert facts.lengths.tolist() == wanted["lengths"]
    assert facts.num_label_tokens.tolist() == wanted["counts"]
    found = (facts.largest_id, facts.smallest_id, facts.largest_label, facts.smallest_label)
    assert tuple(each and each[1] for each in found) == wanted["extremes"]
    key = labels.column or "input_ids"
    for each, name in zip(found, ("input_ids", "input_ids", key, key), strict=True):
        if each is not None:
            row = rows[each[0]]
            assert each[1] in (row.get(name) or row["input_ids"])


def draw_rows(draw: random.Random, masked: bool) -> list[dict[str, Any]]:
    rows = []
    for _ in range(draw.randrange(1, 60)):
        length = draw.choice((0, 1, 2, 5, 30))
        ids = [draw.randrange(200) for _ in range(length)]
        labels = None if draw.random() < 0.2 else [draw.choice((-100, token)) for token in ids]
        row: dict[str, Any] = {"input_ids": ids, "labels": labels, "source": draw.choice("abc")}
        if masked:
            row["attention_mask"] = None if draw.random() < 0.2 else [draw.random() < 0.7 for _ in ids]
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_columns_say_what_a_loop_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parts in which the columns are read, and in whatever order the rows are."""
    draw = random.Random(seed)
    monkeypatch.setattr(row_facts, "_ROWS_AT_ONCE", draw.choice((1, 7, 1000)))
    monkeypatch.setattr(row_facts, "_TOKENS_AT_ONCE", draw.choice((1, 16, 1000)))
    rows = draw_rows(draw, masked=seed % 2 == 1)
    fields = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64()), "source": pa.string()}
    if seed % 2:
        fields["attention_mask"] = pa.list_(pa.bool_())
    dataset = Dataset(pa.Table.from_pylist(rows, schema=pa.schema(fields)))
    shuffled = dataset.shuffle(seed=seed)
    some = [draw.randrange(len(rows)) for _ in range(20)]  # some of them twice
    for one in (dataset, shuffled, dataset.select(some)):
        own = [{key: row[key] for key in row} for row in one]
        for labels in (Labels(), Labels(None), Labels(None, 7)):
            check(facts_of_columns(one, labels), own, labels)
        assert values_of_column(one, "source") == [row["source"] for row in own]
        equal = {
            (tuple(row["input_ids"]), hash_) for row, hash_ in zip(own, hashes_of_columns(one).tolist(), strict=True)
        }
        assert len(equal) == len({ids for ids, _ in equal}) == len({hash_ for _, hash_ in equal})


def test_fixed_and_large_lists_are_columns_too() -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}]
    for kind in (pa.list_(pa.int64(), 3), pa.large_list(pa.uint8())):
        dataset = Dataset(pa.Table.from_pylist(rows, schema=pa.schema({"input_ids": kind})))
        assert has_arrow_columns(dataset)
        check(facts_of_columns(dataset, Labels(None)), rows, Labels(None))


def test_what_is_no_column_of_ids() -> None:
    texts = Dataset.from_list([{"input_ids": ["a"]}])
    made = Dataset.from_list([{"input_ids": [1]}]).with_transform(lambda batch: batch)
    assert not any(map(has_arrow_columns, (texts, made, [{"input_ids": [1]}], Dataset.from_list([{"text": "a"}]))))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": None, "labels": [1]}, r"example 2: input_ids = None"),
        ({"input_ids": [1, None], "labels": [1, 1]}, r"example 2: input_ids has a None in its list"),
        ({"input_ids": [1, 2], "labels": [1]}, r"example 2: 2 tokens and 1 values of labels"),
    ],
)
def test_rows_that_are_none(row: dict[str, Any], says: str) -> None:
    fine = {"input_ids": [1, 2], "labels": [1, 2]}
    dataset = Dataset.from_list([fine, fine, row, fine])
    with pytest.raises(DataError, match=says):
        facts_of_columns(dataset, Labels())


def test_a_loop_reads_no_more_than_it_may() -> None:
    facts = facts_of_rows(lambda row: (torch.arange(row + 1), torch.arange(row + 1)), 9, most=4)
    assert (facts.num_rows, facts.num_read, facts.longest, facts.largest_id) == (9, 4, (3, 4), (3, 3))
    assert facts.without_label.tolist() == [0]


def test_hashes_tell_rows_apart_that_differ_in_order_or_length() -> None:
    rows = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [], [0], [0, 0], [1 << 40], [-1]]
    hashes = hash_rows(np.array([len(row) for row in rows]), np.concatenate(rows).astype(np.int64))
    assert len(set(hashes.tolist())) == len(rows)


def test_records_in_columns_are_as_records_in_a_list(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [row for row in draw_rows(draw, masked=False) if row["labels"] is not None]
    listed, columns = RecordDataset(rows), RecordDataset(Dataset.from_list(rows).shuffle(seed=0))
    again = RecordDataset(list(Dataset.from_list(rows).shuffle(seed=0)))
    assert list(listed.source_names) == list(columns.source_names)
    for name in ("source_ids", "lengths", "num_label_tokens"):
        assert getattr(columns, name).tolist() == getattr(again, name).tolist()
        assert getattr(columns, name).dtype == getattr(again, name).dtype
    assert columns.num_dropped == again.num_dropped == listed.num_dropped > 0
    for index in range(len(columns)):
        assert torch.equal(columns[index].labels, again[index].labels)
