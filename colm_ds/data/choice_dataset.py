"""Classification examples as a compact, cached dataset: tokens of every prompt with each of its candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from colm_ds.batching.candidates import computed_rows
from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.mixture import seeded_permutation
from colm_ds.data.choices import ChoiceQuestion, read_questions
from colm_ds.data.formats import PathLike, find_places
from colm_ds.data.parts import ONE_SOURCE
from colm_ds.data.prompt import Continuation, encode_pairs, leading_special_ids
from colm_ds.data.token_cache import cache_key, describe_tokenizer, load_arrays, store_arrays
from colm_ds.errors import ConfigError, DataError
from colm_ds.types import CandidateTable, Example

FORMAT_VERSION = 1  # of the cache; raise it whenever the same questions would give different tokens
_CHUNK_QUESTIONS = 4096  # tokenised at once
_DTYPES = {"tokens": "int32", "lengths": "int32", "starts": "int32", "num_candidates": "int32", "golds": "int32"}


class ChoiceDataset:
    """Tokenised questions with their candidates; implements `colm_ds.types.SourcedDataset`, with one source.

    Args:
        tokens: concatenated tokens of every prompt with each candidate, int32 `[num_tokens]`.
        lengths: tokens of each, int32 `[num_candidates]`.
        starts: where in each the candidate begins, int32 `[num_candidates]`.
        num_candidates: of each example, int32 `[num_examples]`.
        golds: index of the gold candidate, int32 `[num_examples]`.
        num_dropped: examples left out, by reason.
        max_length: length that prompts were cut to.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        num_candidates: npt.NDArray[np.int32],
        golds: npt.NDArray[np.int32],
        num_dropped: dict[str, int],
        max_length: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.num_dropped = dict(num_dropped)
        count = len(golds)
        self._firsts = np.concatenate([[0], np.cumsum(num_candidates)]).astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._starts = starts
        self._num_candidates = num_candidates
        table = np.zeros((count, int(num_candidates.max())), dtype=np.int64)
        table[np.arange(table.shape[1]) < num_candidates[:, None]] = lengths
        rows = np.array([self._rows_of(index) for index in range(count)], dtype=np.int64)
        num_rows, widths = torch.from_numpy(rows[:, :2]).unbind(1)
        self.candidates = CandidateTable(
            torch.from_numpy(table), torch.from_numpy(golds.astype(np.int64)), num_rows, widths
        )
        self.lengths: np.ndarray = rows[:, 2].astype(np.int32)
        self.num_label_tokens: np.ndarray = np.ones(count, dtype=np.int32)
        self.source_names: Sequence[str] = (ONE_SOURCE,)
        self.source_ids: np.ndarray = np.zeros(count, dtype=np.int32)

        widest = self.candidates.lengths.max(dim=1).values
        self.num_at_max_length = 0 if max_length is None else int((widest == max_length).sum())

    def digest(self) -> str:
        """Return a digest of all examples in their order: tokens, candidates, gold ones."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self._offsets, self._starts, self._num_candidates, self.candidates.golds.numpy()):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a dataset of {len(self)} examples")
        index = int(index) % len(self)
        first, last = self._firsts[index : index + 2].tolist()
        offset = int(self._offsets[first])
        input_ids = torch.from_numpy(self.tokens[offset : self._offsets[last]].astype(np.int64))
        labels = input_ids.clone()
        for number in range(first, last):
            begin = int(self._offsets[number]) - offset
            labels[begin : begin + int(self._starts[number])] = IGNORE_INDEX
        return Example(input_ids, labels, source=0, index=index, candidates=self.candidates.of(index))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _rows_of(self, index: int) -> tuple[int, int, int]:
        """Return the sequences computed for an example, the tokens of the longest, and of all of them."""
        numbers = range(self._firsts[index], self._firsts[index + 1])
        sequences = [self.tokens[self._offsets[number] : self._offsets[number + 1]].tolist() for number in numbers]
        sizes = [len(sequences[kept]) - 1 for kept in computed_rows(sequences)[0]]
        return len(sizes), max(sizes), sum(sizes)


def load_choices(
    task: str,
    paths: PathLike | Sequence[PathLike],
    tokenizer: Any,
    max_length: int,
    *,
    split: str = "train",
    cache_dir: PathLike | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ChoiceDataset:
    """Read, check and tokenise the questions of a classification task.

    A prompt that does not fit is cut on the left, as evaluation cuts it; an example whose candidate alone does not fit
    is dropped and counted in `num_dropped`; `num_at_max_length` counts those that reach the limit, most of them cut.

    Args:
        task: one of `WRITERS`.
        paths: a file, a folder, `hub:NAME[:CONFIG[:SPLIT]]` or a list of these.
        tokenizer: any Hugging Face tokenizer; a fast one encodes on all cores.
        max_length: maximum tokens of a prompt with a candidate.
        split: default split of a hub name.
        cache_dir: folder to cache the tokens in, keyed by the questions as written, the tokenizer and `max_length`;
            None: no cache.
        limit: read at most this many examples, drawn at random from all of the records.
        seed: seed of that draw.

    Raises:
        DataError: for files that cannot be read, bad records (up to 20 of a place, each with its line) or no example
            left.
        ConfigError: for a `max_length` below 2 or a `limit` below 1.
    """
    for name, value, least in (("max_length", max_length, 2), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} = {value}: must be at least {least}.")
    places = find_places(paths)
    questions = [question for place in places for question in read_questions(task, place, split)]
    if limit is not None and limit < len(questions):
        questions = [questions[index] for index in np.sort(seeded_permutation(len(questions), seed, "limit")[:limit])]
    key = ""
    if cache_dir is not None:
        facts = {"version": FORMAT_VERSION, "questions": [list(vars(question).values()) for question in questions]}
        key = cache_key({**facts, "tokenizer": describe_tokenizer(tokenizer), "max_length": max_length})
        cached = load_arrays(Path(cache_dir), key, _DTYPES, _is_consistent)
        if cached is not None:
            return ChoiceDataset(**cached[0], num_dropped=cached[1]["num_dropped"], max_length=max_length)
    arrays, num_dropped = _tokenise(questions, tokenizer, max_length)
    if not len(arrays["golds"]):
        raise DataError(
            f"{', '.join(map(str, places))}: no examples left: the candidates of all {len(questions)} are longer than "
            f"max_length = {max_length} tokens. Choose a larger one."
        )
    if cache_dir is not None:
        store_arrays(Path(cache_dir), key, arrays, {"num_dropped": num_dropped}, _is_consistent)
    return ChoiceDataset(**arrays, num_dropped=num_dropped, max_length=max_length)


def _is_consistent(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bool:
    """Return whether a readable cache entry is consistent."""
    lengths, starts, counts, golds = (arrays[name] for name in ("lengths", "starts", "num_candidates", "golds"))
    if "num_dropped" not in facts or not 0 < len(golds) == len(counts) or counts.sum() != len(lengths):
        return False
    if len(starts) != len(lengths) or lengths.sum() != len(arrays["tokens"]):
        return False
    inside = bool((starts >= 1).all() and (starts < lengths).all())
    return inside and bool((golds >= 0).all() and (golds < counts).all() and (counts >= 1).all())


def _tokenise(
    questions: Sequence[ChoiceQuestion], tokenizer: Any, max_length: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    leading = leading_special_ids(tokenizer)
    kept: list[list[Continuation]] = []
    golds: list[int] = []
    for start in range(0, len(questions), _CHUNK_QUESTIONS):
        part = questions[start : start + _CHUNK_QUESTIONS]
        pairs = [(question.prompt, candidate) for question in part for candidate in question.candidates]
        encoded = iter(encode_pairs(tokenizer, pairs, leading, max_length - 1))
        for question in part:
            candidates = [next(encoded) for _ in question.candidates]
            if max(len(candidate.ids) for candidate in candidates) <= max_length:
                kept.append(candidates)
                golds.append(question.gold)
    flat = list(chain.from_iterable(kept))
    columns: dict[str, list[int]] = {
        "tokens": list(chain.from_iterable(candidate.ids for candidate in flat)),
        "lengths": [len(candidate.ids) for candidate in flat],
        "starts": [candidate.start for candidate in flat],
        "num_candidates": [len(candidates) for candidates in kept],
        "golds": golds,
    }
    arrays = {name: np.array(values, dtype=_DTYPES[name]) for name, values in columns.items()}
    return arrays, {"candidate_longer_than_max_length": len(questions) - len(kept)}
