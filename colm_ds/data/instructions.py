"""Instruction data (MathInstruct's schema) as a compact, cached dataset of tokens with sources."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.mixture import seeded_permutation
from colm_ds.data.jsonl import PathLike
from colm_ds.data.prompt import PROMPT_TEMPLATE, check_encoding, encode_examples
from colm_ds.data.records import describe_places, find_places, read_place
from colm_ds.data.token_cache import cache_key, describe_tokenizer, load_arrays, store_arrays
from colm_ds.errors import ConfigError, DataError, Problems
from colm_ds.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2  # of the cache; raise it whenever the same files would give different tokens
SPLIT = "train"  # default split of a hub name
ONE_SOURCE = "all"  # name of the source of records that name none
MAX_PROBLEMS = 20  # shown for one file
_CHUNK_EXAMPLES = 4096  # tokenised at once: enough for all threads at little memory
_DTYPES = {"tokens": "int32", "offsets": "int64", "prompt_lengths": "int32", "source_ids": "int32"}


class InstructionDataset:
    """Tokenised instructions and responses with their sources; implements `colm_ds.types.SourcedDataset`.

    The tokens lie flat in one array, which may be memory-mapped from the cache; a subset shares it.

    Args:
        tokens: concatenated token ids of all examples, int32 `[num_tokens]`.
        starts: where each example starts in `tokens`, int64 `[num_examples]`.
        lengths: tokens of each example, prompt included, int32 `[num_examples]`.
        prompt_lengths: tokens of each example's prompt, which carry no label, int32 `[num_examples]`.
        source_ids: source id of each example, int32 `[num_examples]`.
        source_names: name of each source id, sorted.
        num_dropped: examples left out, by reason.
        cache: folder and name of these examples' cache entry; None: not cached.
        lost: by source name, records left out ("dropped") or with a truncated response ("cut") at `max_length`;
            sources without any are absent.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        prompt_lengths: npt.NDArray[np.int32],
        source_ids: npt.NDArray[np.int32],
        source_names: Sequence[str],
        num_dropped: dict[str, int],
        cache: tuple[Path, str] | None = None,
        lost: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.lost = lost or {"dropped": {}, "cut": {}}
        self.tokens = tokens
        self.starts = starts
        self.prompt_lengths = prompt_lengths
        self.lengths: np.ndarray = lengths
        self.source_ids: np.ndarray = source_ids
        self.num_label_tokens: np.ndarray = lengths - prompt_lengths
        self.source_names: Sequence[str] = tuple(source_names)
        self.num_dropped = dict(num_dropped)
        self.cache = cache

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a dataset of {len(self)} examples")
        index = int(index) % len(self)  # negative ones count from the end
        start, length = int(self.starts[index]), int(self.lengths[index])
        input_ids = torch.from_numpy(self.tokens[start : start + length].astype(np.int64))
        labels = input_ids.clone()
        labels[: int(self.prompt_lengths[index])] = IGNORE_INDEX
        return Example(input_ids, labels, source=int(self.source_ids[index]), index=index)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> InstructionDataset:
        """Return the examples at `indices`, in that order, with the same source ids and names; the tokens are shared.

        `Example.index` counts within the subset.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        cache = None
        if self.cache is not None:
            cache = (
                self.cache[0],
                cache_key({"of": self.cache[1], "subset": hashlib.sha256(chosen.tobytes()).hexdigest()}),
            )
        return InstructionDataset(
            self.tokens,
            self.starts[chosen],
            self.lengths[chosen],
            self.prompt_lengths[chosen],
            self.source_ids[chosen],
            self.source_names,
            self.num_dropped,
            cache,
            self.lost,
        )

    def digest(self) -> str:
        """Return a digest of all examples in their order: tokens, prompts and sources."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.starts, self.lengths, self.prompt_lengths, self.source_ids):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(json.dumps(list(self.source_names)).encode())
        return digest.hexdigest()

    def source_counts(self) -> dict[str, int]:
        """Return the examples of each source by name, in the order of the ids; 0 for a source without any left."""
        counts = np.bincount(self.source_ids, minlength=len(self.source_names))
        return {name: int(count) for name, count in zip(self.source_names, counts, strict=True)}


def load_instructions(
    paths: PathLike | Sequence[PathLike],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    source_key: str | None = "source",
    cache_dir: PathLike | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> InstructionDataset:
    """Read, check and tokenise instruction data `{"source", "instruction", "output"}`.

    Examples in which truncation leaves no labelled token are dropped and counted in `num_dropped`; duplicates are kept;
    further keys are ignored, except an Alpaca `input` with text, without which the instruction is incomplete.

    Args:
        paths: a file, a folder, `hub:NAME[:CONFIG[:SPLIT]]` (split: train) or a list of these (`.json`, `.jsonl`,
            `.jsonl.gz`, `.jsonl.zst`).
        tokenizer: any Hugging Face tokenizer with an eos token; a fast one encodes on all cores.
        max_length: maximum tokens of an example; longer ones are truncated on the right.
        source_key: key that names the source of a record; None: all are of one source.
        cache_dir: folder to cache the tokens in, keyed by the content of the files, the tokenizer and the arguments;
            None: no cache.
        limit: read at most this many examples, drawn at random from all of the records.
        seed: seed of that draw.

    Returns:
        The dataset, in the order of the files and records.

    Raises:
        DataError: for files that cannot be read, bad records (up to 20 of a file, each with its line) or no example
            left.
        ConfigError: for a `max_length` or `limit` below 1, or a tokenizer without an eos token.
    """
    check_encoding(tokenizer, max_length)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit}: must be at least 1.")
    places = find_places(paths)
    key = ""
    if cache_dir is not None:
        key = cache_key(
            {
                "version": FORMAT_VERSION,
                "files": describe_places(places, SPLIT),
                "tokenizer": describe_tokenizer(tokenizer),
                "prompt": PROMPT_TEMPLATE,
                "max_length": max_length,
                "source_key": source_key,
                "sample": None if limit is None else [limit, seed],
            }
        )
        cached = load_arrays(Path(cache_dir), key, _DTYPES, _is_consistent)
        if cached is not None:
            return _from_arrays(*cached, (Path(cache_dir), key))
    records = [record for place in places for record in _read_checked(place, source_key)]
    source_names = sorted({source for source, _, _ in records})
    if limit is not None and limit < len(records):
        records = [records[index] for index in np.sort(seeded_permutation(len(records), seed, "limit")[:limit])]
    arrays, num_dropped, lost = _tokenise(records, source_names, tokenizer, max_length)
    if not len(arrays["source_ids"]):
        raise DataError(
            f"{', '.join(map(str, places))}: no examples left: all {len(records)} prompts fill "
            f"max_length = {max_length} tokens. Choose a larger one."
        )
    facts = {"source_names": source_names, "num_dropped": num_dropped, "lost": lost}
    if cache_dir is not None:
        store_arrays(Path(cache_dir), key, arrays, facts, _is_consistent)
        cached = load_arrays(Path(cache_dir), key, _DTYPES, _is_consistent)
        arrays = arrays if cached is None else cached[0]  # memory-mapped from here on, as from a cache hit
    return _from_arrays(arrays, facts, None if cache_dir is None else (Path(cache_dir), key))


def _from_arrays(
    arrays: dict[str, np.ndarray], facts: dict[str, Any], cache: tuple[Path, str] | None
) -> InstructionDataset:
    offsets = np.array(arrays["offsets"])
    return InstructionDataset(
        arrays["tokens"],
        offsets[:-1],
        np.diff(offsets).astype(np.int32),
        np.array(arrays["prompt_lengths"]),
        np.array(arrays["source_ids"]),
        facts["source_names"],
        facts["num_dropped"],
        cache,
        facts["lost"],
    )


def _is_consistent(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bool:
    """Return whether a readable cache entry is consistent."""
    offsets, prompt_lengths, source_ids = arrays["offsets"], arrays["prompt_lengths"], arrays["source_ids"]
    if not {"source_names", "num_dropped", "lost"} <= facts.keys() or not 0 < len(source_ids) == len(prompt_lengths):
        return False
    if len(offsets) != len(source_ids) + 1 or offsets[0] != 0 or offsets[-1] != len(arrays["tokens"]):
        return False
    whole = bool((prompt_lengths < np.diff(offsets)).all() and (prompt_lengths >= 0).all())
    return whole and bool((source_ids >= 0).all() and (source_ids < len(facts["source_names"])).all())


def _tokenise(
    records: list[tuple[str, str, str]],
    source_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, dict[str, int]]]:
    ids = {name: number for number, name in enumerate(source_names)}
    tokens: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
    lengths, prompt_lengths, source_ids = [0], [], []
    dropped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for start in range(0, len(records), _CHUNK_EXAMPLES):
        sources, instructions, outputs = zip(*records[start : start + _CHUNK_EXAMPLES], strict=True)
        flat: list[int] = []
        encoded = encode_examples(tokenizer, instructions, outputs, max_length)
        for source, (input_ids, prompt_length) in zip(sources, encoded, strict=True):
            if prompt_length >= len(input_ids):
                dropped[source] += 1
                continue
            cut[source] += int(len(input_ids) == max_length and input_ids[-1] != tokenizer.eos_token_id)
            flat.extend(input_ids)
            lengths.append(len(input_ids))
            prompt_lengths.append(prompt_length)
            source_ids.append(ids[source])
        tokens.append(np.array(flat, dtype=np.int32))
    arrays: dict[str, np.ndarray] = {
        "tokens": np.concatenate(tokens),
        "offsets": np.cumsum(np.array(lengths, dtype=np.int64)),
        "prompt_lengths": np.array(prompt_lengths, dtype=np.int32),
        "source_ids": np.array(source_ids, dtype=np.int32),
    }
    lost = {"dropped": dict(dropped), "cut": {source: count for source, count in cut.items() if count}}
    return arrays, {"no_labels_after_truncation": dropped.total()}, lost


def _read_checked(place: Path | str, source_key: str | None) -> list[tuple[str, str, str]]:
    """Read (source, instruction, output) of every record of a place; report up to 20 problems in one DataError."""
    problems = Problems(str(place))
    records: list[tuple[str, str, str]] = []
    try:
        for where, record in read_place(place, SPLIT):
            wrong = find_problems(record, source_key)
            problems.messages += [f"{where}: {problem}" for problem in wrong]
            if not wrong:
                records.append(
                    (record[source_key] if source_key else ONE_SOURCE, record["instruction"], record["output"])
                )
            if len(problems.messages) >= MAX_PROBLEMS:
                del problems.messages[MAX_PROBLEMS:]
                problems.where += f" (stopped reading after {MAX_PROBLEMS})"
                break
    except DataError as error:
        if not problems.messages:
            raise
        problems.messages.append(str(error))
    problems.raise_if_any(DataError)
    return records


def find_problems(record: dict[str, Any], source_key: str | None = "source") -> list[str]:
    """List the problems of one record of instruction data, each with its fix; empty if it is valid."""
    problems = []
    for key in filter(None, (source_key, "instruction", "output")):
        value = record.get(key)
        if key not in record:
            fix = "Add it, or name the right key in source_key" if key == source_key else "Add it"
            problems.append(f"no key {key!r}. {fix}; the record has {', '.join(map(repr, record)) or 'no keys'}.")
        elif not isinstance(value, str):
            problems.append(f"{key!r} is of type {type(value).__name__}, not text. Write a string.")
        elif not value.strip():
            problems.append(f"example with an empty {key}. Write one or remove the record.")
        elif not _is_unicode(value):
            problems.append(f"{key!r} holds half of a surrogate pair (\\ud800 to \\udfff). Write whole characters.")
    if isinstance(record.get("input"), str) and record["input"].strip():
        problems.append("key 'input' would be ignored. Append its text to 'instruction'.")
    return problems


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
