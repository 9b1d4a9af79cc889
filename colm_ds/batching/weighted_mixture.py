"""Draw large batches in which every source has a given share, independent of its share of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from colm_ds.batching.mixture import IndexArray, seeded_permutation
from colm_ds.errors import ConfigError, SelectionError


def counts_by_weight(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` in proportion to weights: largest remainder, ties to the first.

    Args:
        weights: above 0, of any sum.
        total: what to share.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def checked_weights(weights: Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
    """Return the weights in the order of the known sources.

    Raises:
        ConfigError: for a source that is not known or a weight that is not above 0.
    """
    for name, weight in weights.items():
        if name not in known:
            raise ConfigError(f"data.weights: no source {name!r}. Its sources: {', '.join(map(repr, known))}.")
        if not weight > 0:
            raise ConfigError(f"data.weights.{name} = {weight}: must be above 0. Leave the source out instead.")
    return {name: float(weights[name]) for name in known if name in weights}


class WeightedSampler:
    """Draws the r examples of each large batch by the sources' shares; stateless, as a step determines its batch.

    Steps come in rounds as long as the data: in a round every source has its share exactly, in a random order. Each
    source has its own stream, one epoch after another, each in a new order; the rounds take from the streams in
    turn. So a source with less data than its share is seen more often, and one with more is seen in part.

    Args:
        starts: first dataset index of each source, whose examples follow each other, `[num_sources]`.
        sizes: examples of each source, `[num_sources]`.
        weights: shares of the sources, of any sum, `[num_sources]`.
        large_batch_size: r.
        seed: seed of the run.

    Raises:
        SelectionError: if there are fewer examples than r, a source has none, or a weight is for none.
    """

    def __init__(
        self, starts: Sequence[int], sizes: Sequence[int], weights: Sequence[float], large_batch_size: int, seed: int
    ) -> None:
        if min(sizes, default=0) < 1 or not 1 <= large_batch_size <= sum(sizes):
            raise SelectionError(
                f"large_batch_size = {large_batch_size}: the sources have {list(sizes)} examples. Every source needs "
                "at least one, and together they must fill a large batch."
            )
        self.large_batch_size = large_batch_size
        self.steps_per_epoch = sum(sizes) // large_batch_size
        self.counts = counts_by_weight(weights, self.steps_per_epoch * large_batch_size)
        if 0 in self.counts:
            least = self.counts.index(0)
            share = weights[least] / sum(weights)
            raise SelectionError(
                f"weight {weights[least]:g} of source {least} is {share:.2g} of all: less than one of the "
                f"{sum(self.counts):,} examples of a round, so that it would never be drawn. Give it a larger weight "
                "or leave it out."
            )
        self._starts, self._sizes, self._seed = list(starts), list(sizes), seed
        self._last: tuple[int, IndexArray, IndexArray] | None = None

    def epoch(self, step: int) -> int:
        """Return the 0-based round of a 1-based step."""
        if step < 1:
            raise SelectionError(f"step = {step}: steps count from 1.")
        return (int(step) - 1) // self.steps_per_epoch

    def indices(self, step: int) -> IndexArray:
        """Return the dataset indices of the large batch of a 1-based step, int64 `[r]`.

        They are distinct unless a source begins an epoch in this step or has fewer examples than its share of r.
        """
        indices, _ = self._round(self.epoch(step))
        start = (step - 1) % self.steps_per_epoch * self.large_batch_size
        return indices[start : start + self.large_batch_size].copy()

    def epochs(self, step: int) -> list[float]:
        """Return the passes over each source's data up to the end of a 1-based step, `[num_sources]`."""
        number = self.epoch(step)
        _, sources = self._round(number)
        stop = ((step - 1) % self.steps_per_epoch + 1) * self.large_batch_size
        seen = np.bincount(sources[:stop], minlength=len(self._sizes))
        return [
            (number * count + int(own)) / size for count, own, size in zip(self.counts, seen, self._sizes, strict=True)
        ]

    def _round(self, number: int) -> tuple[IndexArray, IndexArray]:
        """Return the dataset indices and sources of a round in order."""
        last = self._last  # read once: threads may ask for different rounds
        if last is None or last[0] != number:
            order = seeded_permutation(sum(self.counts), self._seed, "mixture", number)
            sources = np.repeat(np.arange(len(self.counts)), self.counts)[order]
            indices = np.empty_like(order)
            for source, (start, count) in enumerate(zip(self._starts, self.counts, strict=True)):
                indices[sources == source] = start + self._stream(source, number * count, count)
            last = self._last = number, indices, sources
        return last[1], last[2]

    def _stream(self, source: int, start: int, count: int) -> IndexArray:
        """Return `count` examples of a source, from index `start` of its stream."""
        size = self._sizes[source]
        first, last = start // size, max(start, start + count - 1) // size
        orders = [seeded_permutation(size, self._seed, "source", source, epoch) for epoch in range(first, last + 1)]
        return np.concatenate(orders)[start - first * size :][:count]
