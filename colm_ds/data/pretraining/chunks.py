"""Chunks of a token store as examples: a dataset with its mixture of sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from colm_ds.batching.mixture import MixtureSampler, Sampler, seeded_permutation
from colm_ds.batching.weighted_mixture import WeightedSampler, checked_weights, counts_by_weight
from colm_ds.data.pretraining.token_store import HELDOUT, TRAIN, TokenStore
from colm_ds.data.token_cache import cache_key
from colm_ds.errors import ConfigError
from colm_ds.types import Example

CACHE = "cache"
"""Folder in a store for what is computed from its chunks: the table of the estimator `tokens`."""


class ChunkDataset:
    """Chunks of every source, one source after the other; implements `colm_ds.types.SourcedDataset`.

    Every token but the first of a chunk is predicted.

    Attributes:
        mixture_counts: chunks by source as the sampler sees them: all, or the same total shared by weight.
        sizes: chunks of each source, `[num_sources]`.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        chunk_tokens: int,
        weights: Mapping[str, float] | None = None,
        limit: int | None = None,
    ) -> None:
        """Find the chunks; nothing is read yet.

        Args:
            store: the tokens.
            split: `train`, in whole chunks; or `heldout`, where the rest of a source is a shorter chunk.
            chunk_tokens: tokens of a chunk, at least 2.
            weights: shares of the sources in the mixture; sources without one are left out. None: natural proportions.
            limit: maximum chunks of each source, drawn at random but always the same.

        Raises:
            ConfigError: for weights of unknown sources, or if a source to train on has no whole chunk.
        """
        self._store, self._split, self._chunk_tokens = store, split, chunk_tokens
        self.weights = None if weights is None else checked_weights(weights, store.source_names)
        self.source_names: Sequence[str] = tuple(store.source_names if self.weights is None else self.weights)
        tokens = [store.num_tokens(split, name) for name in self.source_names]
        rests = [count % chunk_tokens if split == HELDOUT and count % chunk_tokens > 1 else 0 for count in tokens]
        there = [count // chunk_tokens + (rest > 0) for count, rest in zip(tokens, rests, strict=True)]
        if split == TRAIN and 0 in there:
            empty = [name for name, size in zip(self.source_names, there, strict=True) if not size]
            raise ConfigError(
                f"data.chunk_tokens = {chunk_tokens}: no whole chunk of {', '.join(empty)} in {store.folder}. "
                "Choose shorter chunks or add data."
            )
        chosen = [np.sort(seeded_permutation(size, 0, "chunks", split)[:limit]) for size in there]
        self.sizes = [len(numbers) for numbers in chosen]
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)[:-1]
        self._numbers = np.concatenate(chosen)
        self.source_ids: np.ndarray = np.repeat(np.arange(len(there), dtype=np.int32), self.sizes)
        last_ones = self._numbers == np.asarray(there)[self.source_ids] - 1
        rest_of = np.asarray(rests)[self.source_ids]
        self.lengths: np.ndarray = np.where(last_ones & (rest_of > 0), rest_of, chunk_tokens).astype(np.int32)
        self.num_label_tokens: np.ndarray = self.lengths - 1
        counts = self.sizes if self.weights is None else counts_by_weight(list(self.weights.values()), len(self))
        self.mixture_counts = dict(zip(self.source_names, counts, strict=True))

    def __len__(self) -> int:
        return len(self.source_ids)

    @property
    def cache(self) -> tuple[Path, str]:
        """Folder and name of these chunks' cache entry, the same for the same tokens wherever they lie."""
        chunks = hashlib.sha256(self._numbers.data).hexdigest()
        facts = {"store": self._store.digest, "split": self._split, "tokens": self._chunk_tokens, "chunks": chunks}
        return self._store.folder / CACHE, cache_key({**facts, "sources": list(self.source_names)})

    def __getitem__(self, index: int) -> Example:
        source = int(self.source_ids[index])
        start = int(self._numbers[index]) * self._chunk_tokens
        tokens = self._store.read(self._split, self.source_names[source], start, int(self.lengths[index]))
        ids = torch.from_numpy(tokens)
        return Example(ids, ids.clone(), source=source, index=index)

    def sampler(self, large_batch_size: int, seed: int) -> Sampler:
        """Return a sampler of large batches from the mixture."""
        if self.weights is None:
            return MixtureSampler(len(self), large_batch_size, seed)
        return WeightedSampler(self._starts.tolist(), self.sizes, list(self.weights.values()), large_batch_size, seed)
