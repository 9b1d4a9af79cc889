"""Held-out examples: the asked sizes, and no instruction on both sides."""

from __future__ import annotations

import mmap
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from colm_ds.batching.mixture import seeded_permutation
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


def test_prompts_are_drawn_as_by_a_plain_loop(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Groups by a dictionary of whole prompts, in the order of their first examples, drawn one after another."""
    rows = [
        {"source": "abc"[number % 3], "instruction": f"question {number * 7 % 40}", "output": str(number)}
        for number in range(150)
    ]
    dataset = load_examples(write_jsonl(rows), tokenizer, 1000)
    groups: dict[bytes, list[int]] = {}
    for index, (example, length) in enumerate(zip(dataset, dataset.prompt_lengths, strict=True)):
        groups.setdefault(bytes(example.input_ids[: int(length)].numpy()), []).append(index)
    for per_source in (1, 4, 9):
        wanted, held = dict.fromkeys(range(3), per_source), set()
        for number in seeded_permutation(len(groups), 5, "holdout"):
            group = list(groups.values())[number]
            needed = Counter(dataset.source_ids[group].tolist())
            if all(needed[source] <= wanted[source] for source in wanted):
                held |= set(group)
                wanted = {source: wanted[source] - needed[source] for source in wanted}
        _, heldout = split_holdout(dataset, per_source=per_source, seed=5)
        assert {bytes(each.input_ids.numpy()) for each in heldout} == {
            bytes(dataset[index].input_ids.numpy()) for index in held
        }
        assert len(held) > 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages cannot be given back here")
def test_reading_all_of_a_mapped_dataset_keeps_little_of_it(tmp_path: Path) -> None:
    """Digest and held-out split read 64 MiB of tokens; a few MiB of them are in memory afterwards."""
    size, count = 1 << 24, 1 << 10
    np.save(tmp_path / "tokens.npy", np.arange(size, dtype=np.int32))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    each = np.full(count, size // count, dtype=np.int32)
    sources = np.zeros(count, dtype=np.int32)
    dataset = TokenDataset(tokens, np.cumsum(each, dtype=np.int64) - each, each, each - 1, sources, ["a"], {})
    mapped = mapped_bytes(tmp_path / "tokens.npy")
    train, heldout = split_holdout(dataset, per_source=8)
    after_split = mapped_bytes(tmp_path / "tokens.npy")
    assert train.digest() != heldout.digest()
    assert max(mapped, after_split, mapped_bytes(tmp_path / "tokens.npy")) < 16 << 20
    assert int(tokens[-1]) == size - 1


def mapped_bytes(file: Path) -> int:
    """Return how much of a mapped file is in this process's memory."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(re.findall(r"^Rss: +(\d+)", each, re.MULTILINE)[0]) << 10 for each in maps if str(file) in each)
