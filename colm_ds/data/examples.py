"""Read, check and tokenise rows of any schema into a dataset: streamed, in several processes, cached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colm_ds.batching.mixture import seeded_permutation
from colm_ds.data.chat import ChatEncoder, TemplateError, TrainOn
from colm_ds.data.entries import Data, DataEntry, as_entries
from colm_ds.data.formats import (
    HUB,
    PathLike,
    RowBatch,
    describe_places,
)
from colm_ds.data.parts import SOURCE, CheckedRows, DataFile, RowCount, RowProblem, check_rows, find_parts, rows_of
from colm_ds.data.prompt import PROMPT_TEMPLATE, check_encoding, encode_completions, encode_texts
from colm_ds.data.schemas import (
    UNITS,
    Completion,
    Conversation,
    RowError,
    Sample,
    Text,
)
from colm_ds.data.token_cache import (
    Arrays,
    ArrayWriter,
    cache_key,
    describe_tokenizer,
    load_arrays,
    log_uncached,
)
from colm_ds.data.token_dataset import TokenDataset
from colm_ds.data.workers import MAX_PROCESSES, map_in_order
from colm_ds.errors import ConfigError, DataError
from colm_ds.process.cores import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2  # of the cache; raise it whenever the same files would give different tokens
_CHAT_VERSION = 2
"""Raised where the tokens or labels of conversations change, so that caches of earlier versions are left alone."""

_PRELOADED = ("transformers",)  # by processes that tokenise
_DTYPES = {"tokens": "int32", "offsets": "int64", "prompt_lengths": "int32", "source_ids": "int32"}
_MASK_DTYPES = {"trained": "bool", "num_trained": "int32"}  # of conversations


@dataclass
class Encoded(CheckedRows):
    """Tokens of some rows of a part.

    Attributes:
        kept: rows with tokens, among these.
        lengths: tokens of each kept row.
        tokens: of all kept rows, int32.
        prompt_lengths: of each kept row.
        trained: whether each token is trained on.
        dropped: rows by source of which nothing would be trained.
        cut: rows by source that were truncated.
        num_special: conversations with the text of a special token.
    """

    kept: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    prompt_lengths: list[int] = field(default_factory=list)
    trained: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    num_special: int = 0


@dataclass(frozen=True)
class EncodingJob:
    """Some rows to work on.

    Attributes:
        part: number of the part.
        rows: of it.
        chosen: whether to tokenise each of them; None: all; empty: none, they are only checked.
    """

    part: int
    rows: RowBatch
    chosen: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class RowEncoder:
    """Checks and tokenises rows; can be sent to another process."""

    parts: Sequence[DataFile]
    tokenizer: Any
    chat: ChatEncoder | None
    max_length: int

    def __call__(self, job: EncodingJob) -> Encoded:
        """Work on some rows.

        Raises:
            TemplateError: naming the row with which the chat template does not work.
        """
        part = self.parts[job.part]
        checked = check_rows(job.part, part, job.rows, job.chosen)
        result = Encoded(job.part, checked.sources, problems=checked.problems, without=checked.without)
        self._encode(checked.samples, part, result)
        return result

    def _encode(self, samples: Sequence[tuple[int, str, Sample]], part: DataFile, result: Encoded) -> None:
        tokens, trained = [result.tokens], [result.trained]
        for number, ids, mask in self._ids_and_masks(samples, result):
            source = result.sources[number] or part.source
            kept = mask[: self.max_length]
            if not kept[1:].any():  # nothing is predicted from no token
                result.dropped[source] += 1
                continue
            result.cut[source] += int(mask[self.max_length :].any())
            result.kept.append(number)
            result.lengths.append(len(kept))
            result.prompt_lengths.append(int(kept.argmax()))
            tokens.append(ids[: self.max_length])
            trained.append(kept)
        result.tokens, result.trained = np.concatenate(tokens), np.concatenate(trained)

    def _ids_and_masks(
        self, samples: Sequence[tuple[int, str, Sample]], result: Encoded
    ) -> Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """Yield token ids of whole rows and which are trained, in the order of the rows."""
        encoded: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = {}
        completions = [(number, sample) for number, _, sample in samples if isinstance(sample, Completion)]
        if completions:
            prompts, responses = zip(*((sample.prompt, sample.response) for _, sample in completions), strict=True)
            whole = encode_completions(self.tokenizer, prompts, responses)
            for (number, _), (ids, prompt_length) in zip(completions, whole, strict=True):
                encoded[number] = np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt_length
        texts = [(number, sample.text) for number, _, sample in samples if isinstance(sample, Text)]
        if texts:
            for (number, _), ids in zip(texts, encode_texts(self.tokenizer, [text for _, text in texts]), strict=True):
                encoded[number] = np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)
        for number, where, sample in samples:
            if isinstance(sample, Conversation):
                assert self.chat is not None
                try:
                    chat = self.chat.encode(sample)
                except TemplateError as error:
                    raise TemplateError(f"{where}: {error}") from None
                except RowError as error:
                    result.problems += [RowProblem(number, where, problem) for problem in error.problems]
                    continue
                result.num_special += chat.holds_special
                encoded[number] = chat.ids, chat.trained
        for number in sorted(encoded):
            yield number, *encoded[number]


def load_examples(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    schema: str = "auto",
    prompt: str = "auto",
    source_key: str | None = SOURCE,
    train_on: TrainOn = "all",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    cache_dir: PathLike | None = None,
    limit: int | None = None,
    seed: int = 0,
    num_processes: int = 1,
) -> TokenDataset:
    """Read, check and tokenise rows of the schemas in `colm_ds.data.schemas`.

    Examples in which truncation leaves no labelled token are dropped and counted in `num_dropped`; duplicates are kept;
    keys that the schema does not know are ignored. Memory does not grow with the size of the files where there is a
    cache.

    Args:
        data: a file, a folder, `hub:NAME[:CONFIG[:SPLIT]]` (split: train), an entry, or a list of these.
        tokenizer: any Hugging Face tokenizer with an eos token; a fast one where there are conversations.
        max_length: maximum tokens of an example; longer ones are truncated on the right.
        schema: of the rows; `auto`: recognised from the first of each file.
        prompt: style of the prompts, see `schemas.check_style`.
        source_key: key that names the source of a row. Rows without it have the entry's name, or that of their file;
            None: all do, or are of one source.
        train_on: `all` turns of the assistant in conversations, or the `last`.
        chat_template: Jinja text; None: the tokenizer's own.
        chat_template_kwargs: further variables of it.
        cache_dir: folder to cache the tokens in, keyed by the content of the files, the tokenizer and the arguments;
            None: no cache, the tokens are held in memory.
        limit: use at most this many rows, drawn at random from all of them.
        seed: seed of that draw.
        num_processes: processes that tokenise, at most; 0: as many as there are cores, up to 16.

    Returns:
        The dataset, in the order of the files and rows; files come before hub names.

    Raises:
        DataError: for files that cannot be read, bad rows (up to 20 of a file, each with its line) or no example left.
        ConfigError: for a `max_length` or `limit` below 1, a tokenizer without an eos token, rows of no schema or of
            several, a prompt or chat template that does not fit.
    """
    check_encoding(tokenizer, max_length)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit}: must be at least 1.")
    entries = sorted(as_entries(data, schema, prompt, source_key), key=lambda entry: entry.path.startswith(HUB))
    _checked_weights(entries)
    parts = find_parts(entries)
    chat = None
    if any(part.style == "chat" for part in parts):
        chat = ChatEncoder(tokenizer, chat_template, train_on, chat_template_kwargs)
    encode = RowEncoder(parts, tokenizer, chat, max_length)
    styles = list(dict.fromkeys(part.style for part in parts))
    dtypes = _DTYPES if chat is None else _DTYPES | _MASK_DTYPES
    processes = num_processes or min(MAX_PROCESSES, usable_cores())
    if cache_dir is None:
        memory = _Memory(dtypes)
        facts = _tokenise(encode, memory, limit, seed, processes)
        return _dataset(memory.arrays(), facts, None, entries, styles)
    folder = Path(cache_dir)
    key = _key(entries, parts, encode, train_on, chat_template_kwargs or {}, source_key, limit, seed)
    cached = load_arrays(folder, key, dtypes, _is_consistent)
    if cached is None:
        try:
            with closing(_Disk(folder, key, dtypes)) as disk:
                facts = _tokenise(encode, disk, limit, seed, processes)
                disk.commit(facts)
            cached = load_arrays(folder, key, dtypes, _is_consistent)
        except _CacheError as lost:
            log_uncached(folder, lost.reason)
    if cached is None:
        memory = _Memory(dtypes)
        facts = _tokenise(encode, memory, limit, seed, processes)
        return _dataset(memory.arrays(), facts, (folder, key), entries, styles)
    return _dataset(*cached, (folder, key), entries, styles)


def describe_read(read: Mapping[str, int]) -> list[str]:
    """Return a line for each schema that was read, with the number of its rows."""
    return [f"reads {schema}: {count:,} {UNITS[schema]}" for schema, count in read.items()]  # type: ignore[index]


def _checked_weights(entries: Sequence[DataEntry]) -> list[float] | None:
    weights = [entry.weight for entry in entries if entry.weight is not None]
    if weights and len(weights) < len(entries):
        without = next(entry.path for entry in entries if entry.weight is None)
        raise ConfigError(f"data: {without} has no weight, but others have. Give every entry one, or none.")
    return weights or None


def _key(
    entries: Sequence[DataEntry],
    parts: Sequence[DataFile],
    encode: RowEncoder,
    train_on: str,
    variables: Mapping[str, Any],
    source_key: str | None,
    limit: int | None,
    seed: int,
) -> str:
    """Return the name of the cache entry; for instructions in plain files it is the one of earlier versions."""
    described = [[part.schema, part.style, part.source_key, entries[part.entry].name] for part in parts]
    facts: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "files": [line for part in parts for line in describe_places([part.place], part.split)],
        "tokenizer": describe_tokenizer(encode.tokenizer),
        "prompt": PROMPT_TEMPLATE,
        "max_length": encode.max_length,
        "source_key": source_key,
        "sample": None if limit is None else [limit, seed],
    }
    weighted = any(entry.weight is not None for entry in entries)
    if weighted or any(one != ["alpaca", "alpaca", source_key, None] for one in described):
        facts["parts"] = [[*one, part.entry] for one, part in zip(described, parts, strict=True)]
    if encode.chat is not None:
        facts["chat"] = [encode.chat.template, train_on, dict(variables), _CHAT_VERSION]
    return cache_key(facts)


def _dataset(
    arrays: Arrays,
    facts: dict[str, Any],
    cache: tuple[Path, str] | None,
    entries: Sequence[DataEntry],
    styles: Sequence[str],
) -> TokenDataset:
    offsets = np.array(arrays["offsets"])
    entry_ids, weights = None, _checked_weights(entries)
    if weights is not None:
        counts = facts["entry_counts"]
        if not all(counts):
            number = counts.index(0)
            raise ConfigError(
                f"data: nothing is left of {entries[number].path}, which has a weight. Choose a larger max_length or "
                "limit, or remove it."
            )
        entry_ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return TokenDataset(
        arrays["tokens"],
        offsets[:-1],
        np.diff(offsets).astype(np.int32),
        np.array(arrays["prompt_lengths"]),
        np.array(arrays["source_ids"]),
        facts["source_names"],
        facts["num_dropped"],
        trained=arrays.get("trained"),
        num_trained=np.array(arrays["num_trained"]) if "num_trained" in arrays else None,
        cache=cache,
        lost=facts["lost"],
        read=facts.get("read", {}),
        num_special=facts.get("num_special", 0),
        entry_ids=entry_ids,
        weights=weights,
        prompts=styles,
    )


def _is_consistent(arrays: Arrays, facts: dict[str, Any]) -> bool:
    """Return whether a readable cache entry is consistent."""
    offsets, prompt_lengths, source_ids = arrays["offsets"], arrays["prompt_lengths"], arrays["source_ids"]
    if not {"source_names", "num_dropped", "lost"} <= facts.keys() or not 0 < len(source_ids) == len(prompt_lengths):
        return False
    if len(offsets) != len(source_ids) + 1 or offsets[0] != 0 or offsets[-1] != len(arrays["tokens"]):
        return False
    if "trained" in arrays and (
        len(arrays["trained"]) != len(arrays["tokens"]) or len(arrays["num_trained"]) != len(source_ids)
    ):
        return False
    whole = bool((prompt_lengths < np.diff(offsets)).all() and (prompt_lengths >= 0).all())
    return whole and bool((source_ids >= 0).all() and (source_ids < len(facts["source_names"])).all())


class _CacheError(Exception):
    """A cache that cannot be written."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Disk:
    """Collects arrays in a cache entry."""

    def __init__(self, folder: Path, key: str, dtypes: Mapping[str, str]) -> None:
        try:
            self._writer = ArrayWriter(folder, key, dtypes)
        except OSError as error:
            raise _CacheError(error) from error
        self.close = self._writer.close

    def append(self, name: str, values: npt.ArrayLike) -> None:
        try:
            self._writer.append(name, values)
        except OSError as error:
            raise _CacheError(error) from error

    def commit(self, facts: Mapping[str, Any]) -> None:
        try:
            self._writer.commit(facts, _is_consistent)
        except OSError as error:
            raise _CacheError(error) from error


class _Memory:
    """Collects arrays in memory."""

    def __init__(self, dtypes: Mapping[str, str]) -> None:
        self._pieces: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in dtypes.items()}

    def append(self, name: str, values: npt.ArrayLike) -> None:
        self._pieces[name].append(np.asarray(values, dtype=self._pieces[name][0].dtype))

    def arrays(self) -> Arrays:
        """Return the arrays, and forget their pieces."""
        return {name: np.concatenate(self._pieces.pop(name)) for name in list(self._pieces)}


def _tokenise(
    encode: RowEncoder, sink: _Disk | _Memory, limit: int | None, seed: int, num_processes: int
) -> dict[str, Any]:
    """Tokenise the rows of all parts into arrays, and return the facts about them."""
    parts = encode.parts
    chosen, rows = None, RowCount(parts)
    if limit is not None:
        for some in map_in_order(encode, _jobs(parts, np.zeros(0, bool)), num_processes, _PRELOADED):
            rows.add(some)
        rows.check()
        chosen = np.zeros(rows.num_rows, dtype=bool)
        chosen[seeded_permutation(rows.num_rows, seed, "limit")[:limit]] = True
        looked_at, rows = rows, RowCount(parts)
        rows.names = looked_at.names
    dropped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    source_ids: list[npt.NDArray[np.int32]] = []
    num_tokens = num_special = 0
    entry_counts = [0] * (max(part.entry for part in parts) + 1)
    sink.append("offsets", [0])
    for some in map_in_order(encode, _jobs(parts, chosen), num_processes, _PRELOADED):
        sources = np.array(rows.add(some), dtype=np.int32)
        source_ids.append(sources[some.kept])
        ends = np.cumsum(some.lengths, dtype=np.int64)
        sink.append("tokens", some.tokens)
        sink.append("offsets", num_tokens + ends)
        sink.append("prompt_lengths", some.prompt_lengths)
        if encode.chat is not None:
            sink.append("trained", some.trained)
            if len(ends):
                sink.append("num_trained", np.add.reduceat(some.trained, ends - some.lengths, dtype=np.int32))
        num_tokens += len(some.tokens)
        num_special += some.num_special
        entry_counts[parts[some.part].entry] += len(some.kept)
        dropped += some.dropped
        cut += some.cut
    rows.check()
    if not num_tokens:
        raise DataError(
            f"{', '.join(str(part.place) for part in parts)}: no examples left: all "
            f"{rows.num_rows if limit is None else min(limit, rows.num_rows)} prompts fill "
            f"max_length = {encode.max_length} tokens. Choose a larger one."
        )
    names = sorted(rows.names)
    new_ids = np.empty(len(names), dtype=np.int32)
    new_ids[[rows.names[name] for name in names]] = np.arange(len(names))
    for some_ids in source_ids:
        sink.append("source_ids", new_ids[some_ids])
    return {
        "source_names": names,
        "num_dropped": {"no_labels_after_truncation": dropped.total()},
        "lost": {"dropped": dict(dropped), "cut": dict(cut)},
        "read": dict(rows.read),
        "num_special": num_special,
        "entry_counts": entry_counts,
    }


def _jobs(parts: Sequence[DataFile], chosen: npt.NDArray[np.bool_] | None) -> Iterator[EncodingJob]:
    """Yield the rows of all parts, those chosen marked."""
    place = 0
    for number, part in enumerate(parts):
        for rows in rows_of(part):
            mine = chosen if chosen is None or not len(chosen) else chosen[place : place + len(rows)]
            yield EncodingJob(number, rows, mine)
            place += len(rows)
