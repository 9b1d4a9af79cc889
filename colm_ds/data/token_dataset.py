"""Tokenised examples with their sources and the tokens to train on, memory-mapped from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.mixture import MixtureSampler, Sampler
from colm_ds.batching.weighted_mixture import WeightedSampler, counts_by_weight
from colm_ds.data.token_cache import cache_key, release_pages
from colm_ds.types import Example

_EXAMPLES_AT_ONCE = 1 << 16  # read before their pages are given back
_BYTES_AT_ONCE = 1 << 26


class TokenDataset:
    """Tokenised examples with their sources; implements `colm_ds.types.SourcedDataset`.

    The tokens lie flat in one array, which may be memory-mapped from the cache; a subset shares it.

    Args:
        tokens: concatenated token ids of all examples, int32 `[num_tokens]`.
        starts: where each example starts in `tokens`, int64 `[num_examples]`.
        lengths: tokens of each example, prompt included, int32 `[num_examples]`.
        prompt_lengths: tokens before the first that is trained on, int32 `[num_examples]`; 0: a text without a prompt,
            all of whose tokens but the first are predicted.
        source_ids: source id of each example, int32 `[num_examples]`.
        source_names: name of each source id, sorted.
        num_dropped: examples left out, by reason.
        trained: whether each token is trained on, bool `[num_tokens]`; None: all after the prompts.
        num_trained: tokens of each example that are, int32 `[num_examples]`; given with `trained`.
        cache: folder and name of these examples' cache entry; None: not cached.
        lost: by source name, records left out ("dropped") or with a truncated response ("cut") at `max_length`;
            sources without any are absent.
        read: rows that were read, by schema.
        num_special: conversations in which the text of a special token became that token.
        entry_ids: entry of the recipe that each example comes from, int32 `[num_examples]`; given with `weights`.
        weights: shares of the entries in every large batch, of any sum; None: natural proportions.
        prompts: styles of the prompts, each once, as in `schemas.check_style`.
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
        *,
        trained: npt.NDArray[np.bool_] | None = None,
        num_trained: npt.NDArray[np.int32] | None = None,
        cache: tuple[Path, str] | None = None,
        lost: dict[str, dict[str, int]] | None = None,
        read: Mapping[str, int] | None = None,
        num_special: int = 0,
        entry_ids: npt.NDArray[np.int32] | None = None,
        weights: Sequence[float] | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        self.lost = lost or {"dropped": {}, "cut": {}}
        self.read = dict(read or {})
        self.num_special = num_special
        self.tokens = tokens
        self._flat = np.asarray(tokens)  # the same as a plain array, which is quicker to take slices of than a memmap
        self.starts = starts
        self.prompt_lengths = prompt_lengths
        self.lengths: np.ndarray = lengths
        self.source_ids: np.ndarray = source_ids
        self.trained = trained
        self.num_label_tokens: np.ndarray = lengths - np.maximum(prompt_lengths, 1)
        if num_trained is not None:
            self.num_label_tokens = num_trained - (prompt_lengths == 0)
        self._num_trained = num_trained
        self.source_names: Sequence[str] = tuple(source_names)
        self.num_dropped = dict(num_dropped)
        self.cache = cache
        self.entry_ids = entry_ids
        self.weights = weights
        self.prompts = tuple(prompts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a dataset of {len(self)} examples")
        index = int(index) % len(self)  # negative ones count from the end
        start, length = int(self.starts[index]), int(self.lengths[index])
        input_ids = torch.from_numpy(self._flat[start : start + length].astype(np.int64))
        labels = input_ids.clone()
        labels[: int(self.prompt_lengths[index])] = IGNORE_INDEX
        if self.trained is not None:
            labels[torch.from_numpy(~self.trained[start : start + length])] = IGNORE_INDEX
        return Example(input_ids, labels, source=int(self.source_ids[index]), index=index)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> TokenDataset:
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
        return TokenDataset(
            self.tokens,
            self.starts[chosen],
            self.lengths[chosen],
            self.prompt_lengths[chosen],
            self.source_ids[chosen],
            self.source_names,
            self.num_dropped,
            trained=self.trained,
            num_trained=None if self._num_trained is None else self._num_trained[chosen],
            cache=cache,
            lost=self.lost,
            read=self.read,
            num_special=self.num_special,
            entry_ids=None if self.entry_ids is None else self.entry_ids[chosen],
            weights=self.weights,
            prompts=self.prompts,
        )

    def digest(self) -> str:
        """Return a digest of all examples in their order: tokens, labels, sources and weights."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.starts, self.lengths, self.prompt_lengths, self.source_ids):
            _update(digest, array)
        digest.update(json.dumps(list(self.source_names)).encode())
        if self.trained is not None:
            _update(digest, self.trained)
        if self.weights is not None and self.entry_ids is not None:
            digest.update(np.ascontiguousarray(self.entry_ids).data)
            digest.update(json.dumps(list(self.weights)).encode())
        return digest.hexdigest()

    def prompt_keys(self) -> npt.NDArray[np.uint64]:
        """Return a digest of every example's prompt, or of all of an example that has none, uint64 `[num_examples]`."""
        keys = np.empty(len(self), dtype=np.uint64)
        ends = self.starts + np.where(self.prompt_lengths == 0, self.lengths, self.prompt_lengths)
        for first in range(0, len(self), _EXAMPLES_AT_ONCE):
            places = slice(first, first + _EXAMPLES_AT_ONCE)
            for number, (start, end) in enumerate(
                zip(self.starts[places].tolist(), ends[places].tolist(), strict=True), start=first
            ):
                key = hashlib.blake2b(self._flat[start:end].tobytes(), digest_size=8).digest()
                keys[number] = int.from_bytes(key, "little")
            release_pages(self.tokens)
        return keys

    def example_key(self, index: int) -> bytes:
        """Return a digest of an example's tokens, 16 bytes."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        return hashlib.blake2b(self._flat[start : start + length].tobytes(), digest_size=16).digest()

    def source_counts(self) -> dict[str, int]:
        """Return the examples of each source by name, in the order of the ids; 0 for a source without any left."""
        counts = np.bincount(self.source_ids, minlength=len(self.source_names))
        return {name: int(count) for name, count in zip(self.source_names, counts, strict=True)}

    @property
    def mixture_counts(self) -> dict[str, int] | None:
        """Examples of each source in as many draws as there are examples; None without weights."""
        if self.weights is None or self.entry_ids is None:
            return None
        by_entry = counts_by_weight(self.weights, len(self))
        counts = np.zeros(len(self.source_names), dtype=np.int64)
        for entry, total in enumerate(by_entry):
            own = np.bincount(self.source_ids[self.entry_ids == entry], minlength=len(counts))
            there = np.flatnonzero(own)
            counts[there] += counts_by_weight(own[there].tolist(), total)
        return dict(zip(self.source_names, counts.tolist(), strict=True))

    def sampler(self, large_batch_size: int, seed: int) -> Sampler:
        """Return a sampler of large batches: by the entries' weights, or the natural mixture.

        Raises:
            SelectionError: if there are fewer examples than r.
        """
        if self.weights is None or self.entry_ids is None:
            return MixtureSampler(len(self), large_batch_size, seed)
        sizes = np.bincount(self.entry_ids, minlength=len(self.weights))
        starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        return WeightedSampler(starts.tolist(), sizes.tolist(), list(self.weights), large_batch_size, seed)


def _update(digest: Any, array: np.ndarray) -> None:
    """Add an array's bytes to a digest, with few of its pages in memory."""
    content = np.ascontiguousarray(array).view(np.uint8).data
    for start in range(0, len(content), _BYTES_AT_ONCE):
        digest.update(content[start : start + _BYTES_AT_ONCE])
        release_pages(array)
