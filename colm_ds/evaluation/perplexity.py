"""Perplexity per source of texts in the Pile's format or of a store's held-out chunks, weighted by tokens."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colm_ds.data.formats import Records
from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.pile import source_of
from colm_ds.data.pretraining.token_store import HELDOUT, MANIFEST, TokenStore
from colm_ds.data.prompt import leading_special_ids
from colm_ds.data.records import text_of
from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.errors import ConfigError
from colm_ds.evaluation.backend import Backend
from colm_ds.evaluation.task import Answered, Row, WithTokenizer

DOCUMENTS_AT_ONCE = 512
"""Documents tokenised in one call: enough for all threads."""


@dataclass(frozen=True)
class TextChunk:
    """Tokens of one source, possibly of several documents.

    Attributes:
        source: name of the source.
        ids: token ids, at least two.
    """

    source: str
    ids: array[int]


@dataclass
class PerplexityTask:
    """Loss on chunks of text, source by source.

    Documents of a source follow each other with an end-of-sequence token between them and are cut into chunks, as in
    pretraining; the first token of a chunk is not predicted.

    Attributes:
        settings: `chunk_tokens`, maximum tokens of a chunk.
    """

    name: str = "perplexity"
    subpaths: tuple[str, ...] = ("pile5", "perplexity", "pile")
    settings: dict[str, Any] = field(default_factory=lambda: {"chunk_tokens": 1024})

    def read(self, records: Records, words: WithTokenizer) -> list[TextChunk]:
        """See `EvaluationTask.read`."""
        return list(chunks(records, words.tokenizer, self.settings["chunk_tokens"]))

    def read_store(self, folder: str, words: WithTokenizer) -> list[TextChunk]:
        """Read the held-out chunks of a token store.

        Raises:
            ConfigError: if it was made with another tokenizer than the model's.
            DataError: if it is damaged.
        """
        store = TokenStore(folder)
        if describe_tokenizer(words.tokenizer) != store.manifest["tokenizer"]:
            raise ConfigError(
                f"perplexity: {folder} was made with another tokenizer than the model's. Give texts instead: "
                "--data perplexity=FILE."
            )
        held = ChunkDataset(store, HELDOUT, self.settings["chunk_tokens"])
        examples = (held[index] for index in range(len(held)))
        return [TextChunk(held.source_names[each.source], array("i", each.input_ids.tolist())) for each in examples]

    def size(self, question: TextChunk) -> int:
        """See `EvaluationTask.size`."""
        return len(question.ids)

    def group(self, question: TextChunk) -> str:
        """See `EvaluationTask.group`."""
        return question.source

    def answer(self, backend: Backend, questions: Sequence[TextChunk]) -> Answered:
        """See `EvaluationTask.answer`."""
        for batch in backend.text_losses([question.ids for question in questions]):
            yield [
                (place, {"source": questions[place].source, "nats": nats, "num_tokens": len(questions[place].ids) - 1})
                for place, nats in batch
            ]

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return loss and perplexity per source and over all tokens, and `macro`, the mean of the sources' losses."""
        by_source: dict[str, list[Row]] = {}
        for row in rows:
            by_source.setdefault(row["source"], []).append(row)
        per_source = {source: _weighted(by_source[source]) for source in sorted(by_source)}
        macro = math.fsum(numbers["loss"] for numbers in per_source.values()) / len(per_source) if per_source else None
        return {**_weighted(rows), "macro_loss": macro, "per_source": per_source}


def _weighted(rows: Sequence[Row]) -> dict[str, Any]:
    num_tokens = sum(row["num_tokens"] for row in rows)
    # fsum is exact: the order of the chunks, and so the number of ranks, does not matter.
    loss = math.fsum(row["nats"] for row in rows) / num_tokens if num_tokens else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"n": len(rows), "num_tokens": num_tokens, "loss": loss, "perplexity": perplexity}


def is_store(place: str) -> bool:
    """Return whether a place is the folder of a finished token store."""
    return (Path(place) / MANIFEST).is_file()


def chunks(records: Records, tokenizer: Any, chunk_tokens: int) -> Iterator[TextChunk]:
    """Cut the documents of every source into chunks, in the order of the records.

    Args:
        records: `{"text", "meta": {"pile_set_name"}}`; `source` names the source as well.
        tokenizer: tokenizer with an end-of-sequence token.
        chunk_tokens: maximum tokens of a chunk; the rest of a source is a shorter one.

    Raises:
        DataError: for a record without text or source.
    """
    leading = leading_special_ids(tokenizer)
    open_chunks: dict[str, array[int]] = {}
    for sources, texts in _in_groups(records):
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for source, ids in zip(sources, encoded, strict=True):
            tokens = open_chunks.setdefault(source, array("i"))
            tokens.extend([*leading, *ids, tokenizer.eos_token_id])
            while len(tokens) >= chunk_tokens:
                yield TextChunk(source, tokens[:chunk_tokens])
                del tokens[:chunk_tokens]
    for source, tokens in open_chunks.items():
        if len(tokens) > 1:
            yield TextChunk(source, tokens)


def _in_groups(records: Records) -> Iterator[tuple[list[str], list[str]]]:
    sources: list[str] = []
    texts: list[str] = []
    for where, record in records:
        sources.append(source_of(record, where))
        texts.append(text_of(where, record, "text"))
        if len(texts) == DOCUMENTS_AT_ONCE:
            yield sources, texts
            sources, texts = [], []
    if texts:
        yield sources, texts
