"""Keep examples by source and share picks among the pools of the others (CoLM, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from colm_ds.errors import SelectionError

Source = TypeVar("Source", bound=Hashable)

JOINT_POOL = -1
"""Source id of the pool that holds the examples of every big source (`per_source: false`)."""


def split_sources(counts: Mapping[Source, int]) -> tuple[list[Source], list[Source]]:
    """Split sources into small and big ones: small has fewer than |V|/c examples in the dataset.

    Args:
        counts: examples of each of the c sources in the dataset; |V| is their sum.

    Returns:
        Small sources and big sources, each in the order of `counts`.

    Raises:
        SelectionError: if there is no source or a count is negative.
    """
    if not counts:
        raise SelectionError("split_sources: no sources. Give the number of examples of at least one source.")
    negative = {source: count for source, count in counts.items() if count < 0}
    if negative:
        raise SelectionError(f"split_sources: negative counts {negative}. Counts are numbers of examples.")
    total, num_sources = sum(counts.values()), len(counts)
    small = [source for source, count in counts.items() if count * num_sources < total]
    big = [source for source, count in counts.items() if count * num_sources >= total]
    return small, big


def coreset_quotas(counts: Sequence[int], total: int) -> list[int]:
    """Share `total` picks among sources in proportion to their examples in the large batch.

    Largest remainder in exact integers, capped by what a source has; ties go to the lower source id (CoLM,
    section 4.1: b_q).

    Args:
        counts: examples of each source in the large batch, `[num_sources]`.
        total: picks to hand out, b - |S_small|; at most `sum(counts)`.

    Returns:
        Picks per source, `[num_sources]`, adding up to exactly `total`.

    Raises:
        SelectionError: if `total` is negative or more than there are examples.
    """
    available = sum(counts)
    if any(count < 0 for count in counts):
        raise SelectionError(f"coreset_quotas: negative count in {list(counts)}. Counts are numbers of examples.")
    if not 0 <= total <= available:
        raise SelectionError(f"coreset_quotas: {total} picks of {available} examples. Ask for 0 to {available}.")
    if available == 0:
        return [0] * len(counts)
    quotas = [total * count // available for count in counts]
    remainders = [total * count % available for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda source: (-remainders[source], source))
    for source in by_remainder[: total - sum(quotas)]:
        quotas[source] += 1
    return quotas


def carried_quotas(
    counts: Mapping[int, int], total: int, carry: Mapping[int, float]
) -> tuple[dict[int, int], dict[int, float]]:
    """Share `total` picks among sources in proportion, carrying over what earlier steps rounded off.

    A quota alone is off by up to a pick, in the same direction in every step: at 8 of 16 a source of 8% would hardly
    ever be picked. Here each source has its exact share plus its carry, rounded to whole picks (largest remainder, ties
    to the lower id) within what the batch has; the remainder is the next step's carry.

    Args:
        counts: examples of each source in the large batch, by id.
        total: picks to hand out, at most `sum(counts)`.
        carry: exact shares less picks so far, by id; 0 for a source that is missing.

    Returns:
        Picks by source, adding up to `total`, and the new carry, which keeps that of absent sources.

    Raises:
        SelectionError: if `total` is negative or more than there are examples.
    """
    available = sum(counts.values())
    if not 0 <= total <= available:
        raise SelectionError(f"carried_quotas: {total} picks of {available} examples. Ask for 0 to {available}.")
    ids = sorted(source for source, count in counts.items() if count > 0)
    wanted = {source: total * counts[source] / available + carry.get(source, 0.0) for source in ids}
    quotas = {source: min(max(math.floor(wanted[source] + _ROUND_OFF), 0), counts[source]) for source in ids}
    while (missing := total - sum(quotas.values())) != 0:
        # The largest deficit first, or, to take picks back, the largest surplus first.
        sign = 1 if missing > 0 else -1
        free = [source for source in ids if 0 <= quotas[source] + sign <= counts[source]]
        order = sorted(free, key=lambda source: (-sign * (wanted[source] - quotas[source]), source))
        for source in order[: abs(missing)]:
            quotas[source] += sign
    return quotas, {**carry, **{source: wanted[source] - quotas[source] for source in ids}}


_ROUND_OFF = 1e-9
"""A share this close below a whole number counts as that number."""


@dataclass(frozen=True)
class Pool:
    """Examples among which `quota` medoids are picked.

    Attributes:
        source: source id, or `JOINT_POOL`.
        positions: positions in the large batch, ascending, int64 `[n]`.
        quota: number of picks, at most n.
    """

    source: int
    positions: Tensor
    quota: int


@dataclass(frozen=True)
class Shares:
    """Division of the b places of a coreset before any signal is compared.

    Attributes:
        kept: positions of kept small-source examples, ascending, int64 `[num_kept]`.
        pools: pools of the other examples; empty pools and pools without picks are left out.
        num_dropped_small: small-source examples for which b had no room.
        carry: carry-over for the next step's quotas, by source id; unchanged if quotas do not carry over.
    """

    kept: Tensor
    pools: list[Pool]
    num_dropped_small: int
    carry: dict[int, float] = field(default_factory=dict)


def share_out(
    sources: Tensor,
    size: int,
    small: Collection[int],
    *,
    selectable: Tensor | None = None,
    per_source: bool = True,
    small_share: float | None = 1.0,
    carry: Mapping[int, float] | None = None,
    generator: torch.Generator | None = None,
) -> Shares:
    """Keep the examples of small sources and give every pool of the others its quota (CoLM, section 4.1).

    If the batch holds more small-source examples than may be kept, the maximum is kept, spread over the small sources
    in proportion, within a source in random order; the rest are treated as absent from the batch.

    Args:
        sources: source id of every example, int64 `[r]`.
        size: b, the size of the coreset.
        small: ids of the small sources; empty to keep nothing by source.
        selectable: False for examples to treat as absent from the batch, bool `[r]`.
        per_source: one pool per big source, or one joint pool.
        small_share: see `most_kept`.
        carry: quotas are `carried_quotas` from it; None: those of a step by itself, `coreset_quotas`.
        generator: private CPU generator for the random order; needed only if small sources exceed the maximum.

    Returns:
        The shares; kept plus quotas add up to min(size, number of selectable examples).

    Raises:
        SelectionError: if `size` is not positive.
    """
    if size < 1:
        raise SelectionError(f"share_out: coreset size {size}. Choose at least 1.")
    sources = sources.cpu()
    present = torch.ones_like(sources, dtype=torch.bool) if selectable is None else selectable.cpu()
    is_small = torch.isin(sources, torch.tensor(sorted(small), dtype=sources.dtype)) & present
    small_positions = is_small.nonzero().flatten()
    num_small = len(small_positions)
    rest = (present & ~is_small).nonzero().flatten()
    room = max(most_kept(num_small, size, len(sources), small_share), size - len(rest))
    if num_small > room:
        small_positions = _spread_small(sources, small_positions, room, generator)
    picks = min(size - len(small_positions), len(rest))
    ids = sorted(set(sources[rest].tolist())) if per_source else [JOINT_POOL] if len(rest) else []
    members = [rest[sources[rest] == source] if per_source else rest for source in ids]
    counts = [len(positions) for positions in members]
    left = dict(carry or {})
    if carry is None or not per_source:
        quotas = coreset_quotas(counts, picks)
    else:
        by_source, left = carried_quotas(dict(zip(ids, counts, strict=True)), picks, carry)
        quotas = [by_source[source] for source in ids]
    pools = [Pool(*pool) for pool in zip(ids, members, quotas, strict=True) if pool[2] > 0]
    return Shares(small_positions, pools, num_small - len(small_positions), left)


def most_kept(num_small: int, size: int, batch_size: int, small_share: float | None) -> int:
    """Return how many examples of small sources a coreset has room for.

    Args:
        num_small: examples of small sources in the large batch.
        size: b.
        batch_size: r.
        small_share: part of b that they may fill; None: with r above 2 b as many as 2 b examples would hold, since
            small sources would otherwise fill more of the coreset the larger r is.
    """
    if small_share is not None:
        return min(num_small, size, math.floor(small_share * size + 1e-9))
    met = num_small if batch_size <= 2 * size else -(-num_small * 2 * size // batch_size)
    return min(met, size)


def _spread_small(sources: Tensor, positions: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    ids = sorted(set(sources[positions].tolist()))
    members = [positions[sources[positions] == source] for source in ids]
    quotas = coreset_quotas([len(member) for member in members], size)
    kept = [
        member[torch.randperm(len(member), generator=generator)[:quota]]
        for member, quota in zip(members, quotas, strict=True)
    ]
    return torch.cat(kept).sort().values
