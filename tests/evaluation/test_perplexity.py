"""Perplexity per source: the chunks, the oracle, and that batches do not matter."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
import torch

from colm_ds.errors import ConfigError, DataError
from colm_ds.evaluation.perplexity import PerplexityTask, TextChunk, chunks
from tests.evaluation.stubs import StubBackend, make_backend

DOCUMENTS = [
    ("news", "Add 1 and 2. The answer is 3."),
    ("code", "x = 1\nprint(x)\n" * 9),
    ("news", "Is 11 even or odd? " * 12),
    ("tiny", "ok"),
]


def records(documents: list[tuple[str, str]] = DOCUMENTS) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"file:{line}", {"text": text, "meta": {"pile_set_name": source}})
        for line, (source, text) in enumerate(documents, start=1)
    ]


def measure(backend: Any, chunk_tokens: int = 32) -> dict[str, Any]:
    task = PerplexityTask(settings={"chunk_tokens": chunk_tokens})
    questions = task.read(records(), backend)
    return task.summarise([row for batch in task.answer(backend, questions) for _, row in batch])


def test_chunks_hold_every_token_of_a_source_in_order(tokenizer: Any) -> None:
    found = list(chunks(records(), tokenizer, 32))
    for source in ("news", "code", "tiny"):
        texts = [text for name, text in DOCUMENTS if name == source]
        expected = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        assert [token for chunk in found if chunk.source == source for token in chunk.ids] == expected
    assert {len(chunk.ids) for chunk in found[:-3]} == {32}


def test_a_single_token_left_over_predicts_nothing(tokenizer: Any) -> None:
    length = len(tokenizer("a b c d")["input_ids"])
    assert [len(chunk.ids) for chunk in chunks(records([("s", "a b c d")]), tokenizer, length)] == [length]


@pytest.mark.parametrize("budget", [{}, {"max_tokens": 1}, {"max_tokens": 100}, {"max_examples": 3}])
def test_equals_the_oracle_at_any_batch_size(budget: dict[str, int], tokenizer: Any) -> None:
    backend = make_backend(tokenizer, **budget)
    found = measure(backend)
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for chunk in chunks(records(), tokenizer, 32):
        ids = torch.tensor([list(chunk.ids)])
        with torch.no_grad():
            logits = backend.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        nats[chunk.source] = nats.get(chunk.source, 0.0) + float(loss)
        tokens[chunk.source] = tokens.get(chunk.source, 0) + len(chunk.ids) - 1
    assert set(found["per_source"]) == set(nats)
    for source, numbers in found["per_source"].items():
        assert numbers["num_tokens"] == tokens[source]
        assert numbers["loss"] == pytest.approx(nats[source] / tokens[source], rel=1e-6)
        assert numbers["perplexity"] == pytest.approx(math.exp(nats[source] / tokens[source]), rel=1e-5)
    overall = sum(nats.values()) / sum(tokens.values())
    assert found["loss"] == pytest.approx(overall, rel=1e-6)
    assert found["macro_loss"] == pytest.approx(sum(nats[s] / tokens[s] for s in nats) / 3, rel=1e-6)


def test_weights_are_tokens_not_chunks() -> None:
    rows = [{"source": "a", "nats": 30.0, "num_tokens": 10}, {"source": "a", "nats": 0.0, "num_tokens": 90}]
    assert PerplexityTask().summarise(rows)["loss"] == pytest.approx(0.3)
    assert PerplexityTask().summarise(rows)["perplexity"] == pytest.approx(math.exp(0.3))


def test_stub_of_one_nat_per_token_has_perplexity_e(tokenizer: Any) -> None:
    found = measure(StubBackend(tokenizer=tokenizer))
    assert found["perplexity"] == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "file:1: no source. Write 'meta'"),
        ({"source": "a"}, "file:1: no key 'text'"),
        ({"text": "a", "meta": {"pile_set_name": 3}}, "file:1: no source"),
    ],
)
def test_bad_record_is_named(record: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        list(chunks([("file:1", record)], tokenizer, 8))


def test_chunk_longer_than_the_model(tokenizer: Any) -> None:
    backend = make_backend(tokenizer)
    with pytest.raises(ConfigError, match="--chunk-tokens 1100: the model has 1024 positions"):
        list(backend.text_losses([TextChunk("s", array("i", [3] * 1100)).ids]))
