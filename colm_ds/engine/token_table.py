"""Scan a dataset for the estimator `tokens` before training: ids that occur, every example's mean vector.

Each of the W ranks reads its share of the examples.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colm_ds.probe.tokens import counted_tokens, digest, mean_of_tokens, mean_vectors, no_vector, unknown_token
from colm_ds.process.progress import Progress
from colm_ds.selection import Exchange
from colm_ds.types import NumberedExamples, SourcedDataset

MOST_COUNTED = 1 << 14
"""Examples, evenly spaced, from which mean and deviation of the embeddings' coordinates are computed."""

MOST_TOKENS = 1 << 31
"""Labelled tokens up to which a table is made; for a larger dataset the r examples of each step are read instead."""

_ROWS_AT_ONCE = 4096
_SHOW_FROM = 100_000


def occurring_ids(dataset: NumberedExamples, size: int, exchange: Exchange, rank: int) -> Tensor:
    """Return which token ids occur among the counted tokens, bool `[size]`; all ranks call it together.

    Args:
        dataset: the examples, of which at most `MOST_COUNTED` are read.
        size: ids that the model knows.
        exchange: the ranks.
        rank: this rank.

    Raises:
        ProbeError: on every rank, if an example that any rank read has an unknown id.
    """
    number = min(len(dataset), MOST_COUNTED)
    places = np.linspace(0, len(dataset) - 1, number).round().astype(np.int64)[rank :: exchange.num_processes]
    seen = torch.zeros(size, dtype=torch.int32)
    bad: tuple[int, int] | None = None
    for place in places.tolist():
        tokens = counted_tokens(dataset[place])
        unknown = unknown_token(tokens, size)
        if unknown is None:
            seen[tokens] = 1
        else:
            bad = bad or (place, unknown)
    _raise_if_bad(bad, size, exchange, rank)
    return exchange.sum(seen) > 0


def mean_table(
    dataset: SourcedDataset, vectors: Tensor, exchange: Exchange, rank: int, cache: tuple[Path, str] | None = None
) -> Tensor | None:
    """Return the mean vector of every example, float16 `[N, width]` in a separate file; all ranks call it together.

    Args:
        dataset: the examples.
        vectors: from `vectors_of_model`.
        exchange: the ranks.
        rank: this rank.
        cache: folder and key of the dataset's cached tokens, if any; the table is cached beside them.

    Returns:
        The table on rank 0, memory-mapped; None on the others, and on all if the dataset has more than
        `MOST_TOKENS` labelled tokens.

    Raises:
        ProbeError: on every rank, if a token id has no vector.
    """
    if int(np.asarray(dataset.num_label_tokens, dtype=np.int64).sum()) > MOST_TOKENS:
        return None
    if cache is None:
        table = _computed(dataset, vectors, exchange, rank)
        return None if table is None else torch.from_numpy(table)
    from colm_ds.data.token_cache import cache_key, load_arrays, store_arrays  # only needed with a cache

    key = cache_key({"table": 1, "tokens": cache[1], "vectors": digest(vectors)})
    shape = (len(dataset), vectors.shape[1])

    def fits(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bool:
        return len(arrays["means"]) == shape[0] * shape[1]

    cached = load_arrays(cache[0], key, {"means": "float16"}, fits) if exchange.is_main else None
    known = torch.tensor(0 if cached is None else 1)
    if bool(exchange.broadcast(known)):
        if cached is None:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
            return torch.from_numpy(np.array(cached[0]["means"], copy=False)).view(shape)
    table = _computed(dataset, vectors, exchange, rank)
    if table is not None:
        store_arrays(cache[0], key, {"means": table.ravel()}, {}, fits)
    return None if table is None else torch.from_numpy(table)


def _computed(dataset: SourcedDataset, vectors: Tensor, exchange: Exchange, rank: int) -> np.ndarray | None:
    world, total, width = exchange.num_processes, len(dataset), vectors.shape[1]
    table = _scratch((total, width)) if exchange.is_main else None
    rows_at_once = _ROWS_AT_ONCE * world
    with Progress("looking up tokens", total, "examples", shown=rank == 0 and total >= _SHOW_FROM) as bar:
        for start in range(0, total, rows_at_once):
            places = np.arange(start, min(total, start + rows_at_once))
            mine = places[rank::world]
            tokens = [counted_tokens(dataset[int(place)]) for place in mine]
            unknown = [unknown_token(each, len(vectors)) for each in tokens]
            bad = next(
                ((int(place), token) for place, token in zip(mine, unknown, strict=True) if token is not None), None
            )
            _raise_if_bad(bad, len(vectors), exchange, rank)
            rows = exchange.gather_rows(mean_of_tokens(tokens, vectors), torch.from_numpy(mine - start), len(places))
            if table is not None:
                table[start : start + len(places)] = rows.numpy()
            bar.advance(len(places))
    return table


def _scratch(shape: tuple[int, int]) -> np.ndarray:
    """Return an array in an unnamed file, which is deleted when the process ends."""
    with tempfile.TemporaryFile() as file:
        file.truncate(max(1, 2 * shape[0] * shape[1]))
        return np.memmap(file, dtype=np.float16, mode="r+", shape=shape)


def _raise_if_bad(bad: tuple[int, int] | None, size: int, exchange: Exchange, rank: int) -> None:
    """Raise on every rank the error of the lowest rank that has one."""
    unknown = torch.zeros(exchange.num_processes, 2, dtype=torch.int64)
    if bad is not None:
        unknown[rank] = torch.tensor([bad[0] + 1, bad[1]])
    rows = [row for row in exchange.sum(unknown).tolist() if row[0] > 0]
    if rows:
        raise no_vector(rows[0][0] - 1, rows[0][1], size)


def means_of(dataset: SourcedDataset, vectors: Tensor, table: Tensor | None) -> Callable[[Sequence[int]], Tensor]:
    """Return a function for examples' mean vectors, float16 `[n, width]`, from the table or from examples as read."""
    if table is not None:
        return lambda indices: table[torch.as_tensor(indices, dtype=torch.int64)]
    return lambda indices: mean_vectors([dataset[int(index)] for index in indices], vectors)
