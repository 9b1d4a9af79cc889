"""Draw the examples of a step's large batch from the seed and the step alone."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from colm_ds.errors import SelectionError
from colm_ds.randomness import derive_seed

IndexArray = npt.NDArray[np.int64]


def seeded_permutation(num_examples: int, seed: int, *purpose: int | str) -> IndexArray:
    """Return a random order of examples for one purpose; same arguments, same order, on every machine.

    Sorts raw PCG64 words, whose stream numpy keeps the same between versions (its `permutation` it does not).

    Args:
        num_examples: examples to order, n.
        seed: seed of the run.
        purpose: what the order is for, such as `"mixture", epoch`.

    Returns:
        A permutation of `0..n-1`, int64 `[n]`.
    """
    words = np.random.PCG64(derive_seed(int(seed), *purpose)).random_raw(num_examples)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class Sampler(Protocol):
    """Source of a step's examples, from the step alone.

    Attributes:
        steps_per_epoch: large batches in one pass over the data.
    """

    steps_per_epoch: int

    def epoch(self, step: int) -> int:
        """Return the 0-based epoch of a 1-based step."""
        ...

    def indices(self, step: int) -> IndexArray:
        """Return the dataset indices of the large batch of a 1-based step, int64 `[r]`, the caller's own copy."""
        ...


class MixtureSampler:
    """Draws the r examples of each large batch: the natural mixture of the sources, without replacement in an epoch.

    Every epoch is a fresh permutation cut into floor(n / r) large batches; the n mod r examples left over are not seen
    in that epoch, so that no large batch holds an example twice. There is no state to save: a step gives its batch.

    Args:
        num_examples: examples in the dataset, n.
        large_batch_size: examples of a large batch, r.
        seed: seed of the run.

    Raises:
        SelectionError: if r is below 1 or more than n.
    """

    def __init__(self, num_examples: int, large_batch_size: int, seed: int = 0) -> None:
        if large_batch_size < 1:
            raise SelectionError(f"large_batch_size = {large_batch_size}: must be at least 1.")
        if large_batch_size > num_examples:
            raise SelectionError(
                f"large_batch_size = {large_batch_size}: more than the {num_examples} examples of the dataset. "
                f"Choose at most {num_examples}, or add data."
            )
        self.num_examples = num_examples
        self.large_batch_size = large_batch_size
        self.seed = seed
        self.steps_per_epoch = num_examples // large_batch_size
        self._last: tuple[int, IndexArray] | None = None

    def epoch(self, step: int) -> int:
        """Return the 0-based epoch of a 1-based step.

        Raises:
            SelectionError: if `step` is below 1.
        """
        if step < 1:
            raise SelectionError(f"step = {step}: steps count from 1.")
        return (int(step) - 1) // self.steps_per_epoch

    def indices(self, step: int) -> IndexArray:
        """Return the dataset indices of the large batch of a 1-based step.

        Returns:
            r distinct indices, int64 `[r]`, the caller's own copy.

        Raises:
            SelectionError: if `step` is below 1.
        """
        epoch = self.epoch(step)
        last = self._last  # read once: threads may ask for different epochs
        if last is None or last[0] != epoch:
            last = self._last = (epoch, seeded_permutation(self.num_examples, self.seed, "mixture", epoch))
        start = (step - 1) % self.steps_per_epoch * self.large_batch_size
        return last[1][start : start + self.large_batch_size].copy()
