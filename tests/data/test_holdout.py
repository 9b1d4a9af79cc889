"""Held-out examples: the asked sizes, and no instruction on both sides."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from colm_ds.data import TokenDataset, load_examples, split_holdout
from colm_ds.errors import ConfigError

from .conftest import Writer


def prompts(dataset: TokenDataset) -> set[bytes]:
    return {
        bytes(example.input_ids[: int(length)].numpy())
        for example, length in zip(dataset, dataset.prompt_lengths, strict=True)
    }


@pytest.fixture
def dataset(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> TokenDataset:
    sizes = {"big": 100, "middle": 20, "small": 5, "one": 1}
    rows = [
        {"source": source, "instruction": f"{source} {number}", "output": str(number)}
        for source, size in sizes.items()
        for number in range(size)
    ]
    return load_examples(write_jsonl(rows), tokenizer, 1000)


def test_fraction(dataset: TokenDataset) -> None:
    train, heldout = split_holdout(dataset, fraction=0.1)
    assert heldout.source_counts() == {"big": 10, "middle": 2, "one": 0, "small": 0}
    assert len(train) + len(heldout) == len(dataset)
    assert not prompts(train) & prompts(heldout)
    assert train.source_names == heldout.source_names == dataset.source_names
    assert len(split_holdout(dataset, fraction=0)[1]) == 0


def test_per_source_takes_at_most_half(dataset: TokenDataset) -> None:
    _, heldout = split_holdout(dataset, per_source=8)
    assert heldout.source_counts() == {"big": 8, "middle": 8, "one": 0, "small": 2}


def test_seed(dataset: TokenDataset) -> None:
    draws = [prompts(split_holdout(dataset, fraction=0.2, seed=seed)[1]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_one_prompt_stays_on_one_side(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"source": "ab"[number % 2], "instruction": f"question {number // 4}", "output": str(number)}
        for number in range(120)
    ]
    train, heldout = split_holdout(load_examples(write_jsonl(rows), tokenizer, 1000), fraction=0.2)
    assert heldout.source_counts() == {"a": 12, "b": 12}
    assert not prompts(train) & prompts(heldout)


def test_source_with_a_single_prompt(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"source": "a", "instruction": "go on", "output": str(number)} for number in range(10)]
    train, heldout = split_holdout(load_examples(write_jsonl(rows), tokenizer, 1000), fraction=0.3)
    assert (len(train), len(heldout)) == (10, 0)


@pytest.mark.parametrize("arguments", [{}, {"fraction": 0.1, "per_source": 3}, {"fraction": 1.0}, {"per_source": -1}])
def test_errors(dataset: TokenDataset, arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        split_holdout(dataset, **arguments)  # type: ignore[arg-type]
