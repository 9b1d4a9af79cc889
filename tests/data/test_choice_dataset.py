"""Classification examples: what is computed of them, their tokens as evaluation has them, the cache, bad records."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from colm_ds.batching.candidates import computed_rows
from colm_ds.batching.loader import LargeBatchLoader
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.data.choice_dataset import ChoiceDataset, load_choices
from colm_ds.data.choices import WRITERS
from colm_ds.data.prompt import encode_pair
from colm_ds.errors import ConfigError, DataError
from colm_ds.evaluation.backend import TransformersBackend
from colm_ds.evaluation.choices import CandidateTask
from colm_ds.evaluation.heldout import first_largest, heldout_loss
from colm_ds.models.example_loss import find_loss_head
from colm_ds.selection import SINGLE_PROCESS
from tests.choices import random_choices
from tests.tiny_models import tiny_model

from .conftest import Writer

CB: list[dict[str, Any]] = [
    {"premise": f"It rained on day {number}.", "hypothesis": "it was wet" * (1 + number % 3), "label": label}
    for number, label in enumerate(["entailment", "contradiction", "neutral"] * 4)
]
COPA = [
    {"premise": "It rained.", "choice1": "The street was wet.", "choice2": "I sang.", "question": "effect", "label": 1}
]


def tokens(dataset: ChoiceDataset) -> list[list[int]]:
    return [one.input_ids.tolist() for one in dataset]


def test_computed_rows_by_brute_force() -> None:
    """As few rows as can be, and every candidate's front is the beginning of its own."""
    words = [list(word) for size in (1, 2, 3) for word in itertools.product((1, 2), repeat=size)]
    fronts_of = [[*word, 9] for word in words]
    for sequences in itertools.combinations(fronts_of, 3):
        kept, row_of = computed_rows(sequences)
        fronts = [sequence[:-1] for sequence in sequences]
        for number, row in enumerate(row_of):
            assert fronts[kept[row]][: len(fronts[number])] == fronts[number]
        serves = [
            size
            for size in (1, 2, 3)
            if any(
                all(any(fronts[row][: len(front)] == front for row in rows) for front in fronts)
                for rows in itertools.combinations(range(3), size)
            )
        ]
        assert len(kept) == serves[0]
    assert computed_rows([[5, 1], [5, 1], [5, 2]]) == ([0], [0, 0, 0])


def test_examples_are_those_of_evaluation(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = load_choices("cb", write_jsonl(CB), tokenizer, 500)
    assert len(dataset) == 12
    assert dataset.num_dropped == {"candidate_longer_than_max_length": 0}
    for index, record in enumerate(CB):
        question = WRITERS["cb"]("here", record)
        example = dataset[index]
        assert example.candidates is not None
        assert example.candidates.gold == question.gold
        pairs = [encode_pair(tokenizer, question.prompt, candidate) for candidate in question.candidates]
        assert example.candidates.lengths == tuple(len(pair.ids) for pair in pairs)
        assert example.input_ids.tolist() == [token for pair in pairs for token in pair.ids]
        wanted = [label for pair in pairs for label in [-100] * pair.start + list(pair.ids[pair.start :])]
        assert example.labels.tolist() == wanted
    batch = make_micro_batch([dataset[index] for index in range(3)])
    assert batch.counts.tolist() == [1.0] * 3
    rows = dataset.candidates.num_rows
    assert len(batch.input_ids) == int(rows[:3].sum())
    assert dataset.lengths[:3].sum() == sum(batch.lengths)


def test_truncation_limit_and_cache(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_jsonl(CB), tmp_path / "cache"
    whole = load_choices("cb", path, tokenizer, 500, cache_dir=cache)
    with monkeypatch.context() as patched:
        patched.setattr("colm_ds.data.choice_dataset._tokenise", None)  # not called again
        again = load_choices("cb", path, tokenizer, 500, cache_dir=cache)
    assert tokens(again) == tokens(whole)
    assert torch.equal(again.candidates.golds, whole.candidates.golds)
    part = load_choices("cb", path, tokenizer, 500, limit=5, seed=1, cache_dir=cache)
    assert len(part) == 5
    assert all(row in tokens(whole) for row in tokens(part))
    short = load_choices("cb", path, tokenizer, 40)
    assert max(max(one.candidates.lengths) for one in short if one.candidates) == 40
    assert (short.num_at_max_length, whole.num_at_max_length) == (12, 0)
    assert [one.input_ids[-3:].tolist() for one in short] == [one.input_ids[-3:].tolist() for one in whole]
    write_jsonl([{**CB[0], "label": "neutral"}, *CB[1:]])
    changed = load_choices("cb", path, tokenizer, 500, cache_dir=cache)
    assert int(changed.candidates.golds[0]) == 2
    dropped = load_choices("copa", write_jsonl([*COPA, {**COPA[0], "choice1": "x" * 90}]), tokenizer, 60)
    assert (len(dropped), dropped.num_dropped) == (1, {"candidate_longer_than_max_length": 1})
    with pytest.raises(DataError, match="no examples left"):
        load_choices("copa", path, tokenizer, 10)


def test_bad_input(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([CB[0], {**CB[1], "label": "perhaps"}, {"premise": "x"}])
    with pytest.raises(DataError, match=r"2 problems in .*\n.*:2: 'label' is 'perhaps'.*\n.*:3: no key 'hypothesis'"):
        load_choices("cb", path, tokenizer, 500)
    for limits, message in (((1, None), "max_length = 1"), ((9, 0), "limit = 0")):
        with pytest.raises(ConfigError, match=message):
            load_choices("cb", path, tokenizer, limits[0], limit=limits[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_large_batches(num_workers: int) -> None:
    dataset = random_choices(12)
    loader = LargeBatchLoader(dataset, 6, seed=0, rank=0, world_size=2, num_workers=num_workers)
    batch = next(iter(loader))
    assert batch.candidates is not None
    for position, example in batch.examples.items():
        wanted = dataset[int(batch.indices[position])]
        assert torch.equal(example.input_ids, wanted.input_ids)
        assert example.candidates == wanted.candidates == batch.candidates.of(position)
        assert int(batch.stored_lengths[position]) == len(wanted.input_ids)


def test_accuracy_is_that_of_evaluation(write_jsonl: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    """What training measures is what `finetune/evaluate.py` counts."""
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    dataset = load_choices("cb", write_jsonl(CB), tokenizer, 500)
    found = heldout_loss(
        model,
        model,
        find_loss_head(model),
        dataset,
        device=torch.device("cpu"),
        exchange=SINGLE_PROCESS,
        rank=0,
        max_tokens=600,
    )
    task = CandidateTask("cb", WRITERS["cb"])
    backend = TransformersBackend(model, tokenizer, torch.device("cpu"))
    questions = [WRITERS["cb"]("here", record) for record in CB]
    rows = [row for batch in task.answer(backend, questions) for _, row in batch]
    assert found["accuracy"] == sum(row["correct"] for row in rows) / len(rows)
    sums, sizes = (torch.tensor([row[key] for row in rows]) for key in ("log_probabilities", "num_tokens"))
    golds = torch.tensor([row["gold"] for row in rows])
    assert found["overall"] == pytest.approx(float(torch.nn.functional.cross_entropy(sums / sizes, golds)), rel=1e-5)


def test_first_of_equals() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0], [0.0, -1.0, 5.0], [1.0, 2.0, -torch.inf]])
    assert first_largest(scores).tolist() == [1, 0, 2, 1]
