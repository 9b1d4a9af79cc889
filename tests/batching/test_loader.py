"""Datasets as users have them, and the large batches that ranks get of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from colm_ds.batching.loader import LargeBatchLoader, RecordDataset, source_counts
from colm_ds.batching.mixture import MixtureSampler
from colm_ds.errors import DataError, SelectionError
from colm_ds.types import LargeBatch
from tests.engine.training import SOURCES, Record, records

COUNTS = {"algebra": 10, "biology": 8, "code": 3}


def examples_of(dataset: RecordDataset) -> list[tuple[list[int], list[int], str]]:
    """Tokens, labels and source name of every example."""
    return [
        (one.input_ids.tolist(), one.labels.tolist(), dataset.source_names[one.source])
        for one in (dataset[index] for index in range(len(dataset)))
    ]


def as_padded(record: Record) -> Record:
    """A record as a tokenizer that pads to both sides leaves it."""
    length = len(record["input_ids"])
    return {
        "input_ids": [0] * 3 + record["input_ids"] + [0] * 2,
        "labels": [7] * 3 + record["labels"] + [-100] * 2,
        "attention_mask": [0] * 3 + [1] * length + [0] * 2,
        "source": record["source"],
    }


def as_tensors(record: Record) -> Record:
    """A record of tensors."""
    return {key: value if key == "source" else torch.tensor(value) for key, value in record.items()}


def as_arrays(record: Record) -> Record:
    """A record of numpy arrays of a short type."""
    return {key: value if key == "source" else np.array(value, dtype=np.int32) for key, value in record.items()}


@pytest.mark.parametrize("change", [dict, as_padded, as_tensors, as_arrays])
def test_list_of_records(change: Callable[[Record], Record]) -> None:
    plain = records(COUNTS)
    dataset = RecordDataset([change(record) for record in plain])
    assert examples_of(dataset) == [(one["input_ids"], one["labels"], one["source"]) for one in plain]
    assert dataset.lengths.tolist() == [len(one["input_ids"]) for one in plain]
    assert dataset.num_label_tokens.tolist() == [sum(label != -100 for label in one["labels"][1:]) for one in plain]
    assert source_counts(dataset) == COUNTS


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_hugging_face_dataset(kind: str | None) -> None:
    """Also where its format gives every number as a tensor, the source's too."""
    datasets = pytest.importorskip("datasets")
    numbers = {"algebra": 10, "biology": 7, "code": 2}
    plain = [{**record, "source": numbers[record["source"]]} for record in records(COUNTS)]
    dataset = RecordDataset(datasets.Dataset.from_list(plain).with_format(kind))
    assert examples_of(dataset) == [(one["input_ids"], one["labels"], str(one["source"])) for one in plain]
    assert source_counts(dataset) == {"2": 3, "7": 8, "10": 10}  # by number, not by name


def test_mixed_names_and_numbers() -> None:
    plain = records(COUNTS)
    mixed = [{**record, "source": {"algebra": 10, "biology": 9}.get(record["source"], "code")} for record in plain]
    assert source_counts(RecordDataset(mixed)) == {"9": 8, "10": 10, "code": 3}


def test_labels_default_to_tokens() -> None:
    dataset = RecordDataset(
        [{"input_ids": [5, 6, 7], "source": "a"}, {"input_ids": [8, 9], "labels": None, "source": "a"}]
    )
    assert [one.labels.tolist() for one in (dataset[0], dataset[1])] == [[5, 6, 7], [8, 9]]
    assert dataset.num_label_tokens.tolist() == [2, 1]  # nothing predicts the first


def test_another_source_key() -> None:
    dataset = RecordDataset([{"input_ids": [5, 6], "domain": "web"}], source_key="domain")
    assert list(dataset.source_names) == ["web"]


def test_records_without_a_label_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    good = {"input_ids": [1, 2, 3], "source": "a"}
    empty = [{"input_ids": [1, 2], "labels": [1, -100]}, {"input_ids": [1]}, {"input_ids": []}]
    records = [{"source": "b", **empty[0]}, good, {"source": "a", **empty[1]}, {"source": "a", **empty[2]}, good]
    with caplog.at_level("WARNING"):
        dataset = RecordDataset(records)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 5 examples have no label that is not -100 after the first token, so nothing to train on, and are left "
        "out: 0, 2, 3"
    ]
    assert dataset.num_dropped == 3
    assert source_counts(dataset) == {"a": 2}
    assert [dataset[index].input_ids.tolist() for index in range(len(dataset))] == [[1, 2, 3]] * 2
    assert [dataset[index].index for index in range(len(dataset))] == [0, 1]
    with pytest.raises(DataError, match="none of 1 examples has a label"):
        RecordDataset([{"source": "b", **empty[0]}])


def test_sources_are_needed_only_where_they_are_looked_at() -> None:
    dataset = RecordDataset([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], needs_sources=False)
    assert source_counts(dataset) == {"all": 2}


@pytest.mark.parametrize("source", [None, 1.5, ["a", "b"], torch.ones(2)], ids=["None", "number", "list", "tensor"])
@pytest.mark.parametrize("by_column", [False, True])
def test_a_source_that_is_none_is_read_only_where_it_is_needed(source: Any, by_column: bool) -> None:
    """Otherwise all rows are of one source; sources that are names or numbers still count."""

    def read(*sources: Any) -> dict[str, int]:
        rows = [{"input_ids": [1, 2, 3], "source": value} for value in sources]
        rows = datasets.Dataset.from_list(rows).with_format("torch") if by_column else rows
        return source_counts(RecordDataset(rows, needs_sources=False))

    datasets = pytest.importorskip("datasets")
    assert read(*([source] * 3 if by_column else ["a", source, source])) == {"all": 3}
    assert read("a", "b", "a") == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"labels": [1, 2], "source": "a"}, "example 1: no 'input_ids'. Its keys: labels, source"),
        ({"input_ids": [1, 2]}, "example 1: no 'source'. Its keys: input_ids"),
        ({"input_ids": [1, 2], "source": None}, "example 1: source None. Give a name or a whole number"),
        ({"input_ids": [1, 2], "source": 1.5}, "example 1: source 1.5"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2], "source": "a"}, "example 1: 3 tokens, 2 labels"),
        ({"input_ids": [1, 2], "attention_mask": [1], "source": "a"}, "example 1: .*attention_mask"),
        ({"input_ids": "text", "source": "a"}, "example 1: .*as lists"),
        ({"input_ids": [[1, 2]], "source": "a"}, r"example 1: input_ids has shape \[1, 2\], not \[tokens\]"),
        ({"input_ids": [1, 2], "labels": 3, "source": "a"}, r"example 1: labels has shape \[\], not \[tokens\]"),
    ],
)
def test_broken_record(record: Record, says: str) -> None:
    with pytest.raises(DataError, match=says):
        RecordDataset([{"input_ids": [1, 2], "source": "a"}, record])


def test_columns_that_the_format_hides() -> None:
    """Rows are counted as they are read: without the column."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 7, 7, -100, 5], "attention_mask": [1] * size + [0] * (5 - size)}
        for size in (3, 5)
    ]
    data = datasets.Dataset.from_list(rows)
    for columns in (["input_ids", "labels"], ["input_ids", "attention_mask"], list(rows[0])):
        dataset = RecordDataset(data.with_format("torch", columns=columns), needs_sources=False)
        read = [dataset[index] for index in range(2)]
        assert dataset.lengths.tolist() == [len(one.input_ids) for one in read]
        assert dataset.num_label_tokens.tolist() == [int((one.labels[1:] != -100).sum()) for one in read]


def loaders(world_size: int, large_batch_size: int = 29, **arguments: Any) -> list[LargeBatchLoader]:
    """A loader for every rank."""
    dataset = RecordDataset(records(SOURCES))
    return [
        LargeBatchLoader(dataset, large_batch_size, seed=3, rank=rank, world_size=world_size, **arguments)
        for rank in range(world_size)
    ]


def facts(batch: LargeBatch) -> dict[str, list[int]]:
    """What every rank knows of a large batch."""
    names = ("indices", "sources", "lengths", "num_label_tokens", "home")
    return {name: getattr(batch, name).tolist() for name in names}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_large_batch(world_size: int) -> None:
    dataset = RecordDataset(records(SOURCES))
    for step in (1, 2, 7):
        batches = [loader.batch(step) for loader in loaders(world_size)]
        assert all(facts(batch) == facts(batches[0]) for batch in batches)
        assert batches[0].size == 29
        held = [position for batch in batches for position in batch.examples]
        assert sorted(held) == list(range(29))
        for rank, batch in enumerate(batches):
            for position, example in batch.examples.items():
                assert int(batch.home[position]) == rank
                assert example.index == int(batch.indices[position])
                assert torch.equal(example.input_ids, dataset[example.index].input_ids)
                assert len(example.input_ids) == int(batch.lengths[position])
                assert example.source == int(batch.sources[position])


def test_ranks_share_what_is_probed() -> None:
    """Examples of small sources, which are not probed, are dealt out after the others."""
    for step in (1, 2, 3):
        batch = loaders(2, kept_sources=[3, 4])[0].batch(step)
        probed = ~torch.isin(batch.sources, torch.tensor([3, 4]))
        for members in (probed, torch.ones_like(probed)):
            counts = torch.bincount(batch.home[members], minlength=2)
            assert abs(int(counts[0] - counts[1])) <= 1


def test_more_ranks_change_nothing_but_the_home() -> None:
    one, three = loaders(1)[0].batch(5), loaders(3)[2].batch(5)
    for name in ("indices", "sources", "lengths", "num_label_tokens"):
        assert torch.equal(getattr(one, name), getattr(three, name))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating(num_workers: int) -> None:
    """Steps from `next_step` on, the same with worker processes; the global random state is left alone."""
    loader = loaders(2, num_workers=num_workers)[1]
    loader.next_step = 4
    state = torch.get_rng_state()
    batches = list(islice(loader, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert [batch.step for batch in batches] == [4, 5, 6, 7]
    assert loader.next_step == 8
    assert next(iter(loader)).step == 8
    for batch in batches:
        plain = loaders(2)[1].batch(batch.step)
        assert facts(batch) == facts(plain)
        assert batch.examples.keys() == plain.examples.keys()
        for position, example in batch.examples.items():
            assert torch.equal(example.input_ids, plain.examples[position].input_ids)
            assert torch.equal(example.labels, plain.examples[position].labels)


def test_large_batches_are_the_samplers() -> None:
    loader, sampler = loaders(1)[0], MixtureSampler(sum(SOURCES.values()), 29, seed=3)
    for step in (1, 4, 5, 40):
        assert loader.batch(step).indices.tolist() == sampler.indices(step).tolist()
        assert loader.epoch(step) == (step - 1) // 4


def test_more_than_the_dataset_has() -> None:
    with pytest.raises(SelectionError, match=r"large_batch_size = 124: more than the 123 examples.*Choose at most 123"):
        loaders(1, large_batch_size=124)
