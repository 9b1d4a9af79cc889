"""Held-out examples that training never sees, not even as another answer to the same instruction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from colm_ds.batching.mixture import seeded_permutation
from colm_ds.data.token_dataset import TokenDataset
from colm_ds.errors import ConfigError


def split_holdout(
    dataset: TokenDataset, *, fraction: float | None = None, per_source: int | None = None, seed: int = 0
) -> tuple[TokenDataset, TokenDataset]:
    """Take held-out examples out of every source.

    Examples with the same prompt stay on one side, whatever their source and response; so a source may give fewer than
    asked for where many of its examples share a prompt. Texts without a prompt are compared as wholes.

    Args:
        dataset: the examples to split.
        fraction: share of each source to hold out, 0 to below 1, rounded to whole examples.
        per_source: examples of each source to hold out, at most half of what the source has.
        seed: seed of the draw.

    Returns:
        `(train, heldout)`, both in the order of `dataset` with its source ids and names.

    Raises:
        ConfigError: unless exactly one of `fraction` and `per_source` is given, and in its range.
    """
    if (fraction is None) == (per_source is None):
        raise ConfigError("split_holdout: give either fraction or per_source.")
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError(f"fraction = {fraction}: must be 0 or more and below 1.")
    if per_source is not None and per_source < 0:
        raise ConfigError(f"per_source = {per_source}: must be 0 or more.")
    counts = np.bincount(dataset.source_ids, minlength=len(dataset.source_names)).tolist()
    if fraction is not None:
        wanted = [round(fraction * count) for count in counts]
    else:
        wanted = [min(per_source or 0, count // 2) for count in counts]
    held = np.zeros(len(dataset), dtype=bool)
    for group in _prompts_in_random_order(dataset, seed):
        if not any(wanted):
            break
        needed = np.bincount(dataset.source_ids[group], minlength=len(counts)).tolist()
        if all(need <= want for need, want in zip(needed, wanted, strict=True)):
            held[group] = True
            wanted = [want - need for need, want in zip(needed, wanted, strict=True)]
    return dataset.subset(np.flatnonzero(~held)), dataset.subset(np.flatnonzero(held))


def _prompts_in_random_order(dataset: TokenDataset, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the indices of the examples of every prompt, ascending."""
    keys = dataset.prompt_keys()
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    del keys
    ends = np.append(starts[1:], len(order))
    by_first = np.argsort(order[starts])  # prompts in the order of their first examples, as the order is drawn of these
    for number in seeded_permutation(len(starts), seed, "holdout"):
        place = by_first[number]
        yield order[starts[place] : ends[place]]


def count_common(train: TokenDataset, heldout: TokenDataset) -> int:
    """Return how many held-out examples are also trained on, token by token."""
    keys = {heldout.example_key(index): 0 for index in range(len(heldout))}
    for index in np.flatnonzero(np.isin(train.lengths, heldout.lengths)):
        key = train.example_key(int(index))
        if key in keys:
            keys[key] = 1
    return sum(keys[heldout.example_key(index)] for index in range(len(heldout)))
