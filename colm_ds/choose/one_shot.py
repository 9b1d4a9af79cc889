"""Choose once from a whole dataset: a selector of training on one large batch that holds everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import ConfigError
from colm_ds.selection import SINGLE_PROCESS, SelectionSettings, SelectorContext, Signals, coreset_quotas, make_selector
from colm_ds.selection.vector_sum import fair_shares
from colm_ds.types import LargeBatch

METHODS = ("ccs", "simcore", "goracs", "vector_sum")
"""Selectors that also choose once, as their originals do."""

SHARES = ("whole", "proportional", "fair", "target")
"""Ways to share a selection among sources: not at all, by size, by AutoCoreset's mixture, or as the target has them."""

WITHOUT_WEIGHTS: dict[str, dict[str, Any]] = {"vector_sum": {"method": "best_of"}}
"""Options of a method in place of its defaults, as an index file has no weights."""


def choose_once(
    method: str,
    size: int,
    sources: Tensor,
    signals: Signals,
    *,
    shares: str = "whole",
    options: Mapping[str, Any] | None = None,
    target_shares: Sequence[float] = (),
    seed: int = 0,
) -> list[int]:
    """Choose examples of a dataset.

    Args:
        method: one of `METHODS`.
        size: examples to choose, at most N.
        sources: source id of every example, int64 `[N]`.
        signals: signals of every example, with the target's if the method compares with one.
        shares: one of `SHARES`.
        options: options of the selector.
        target_shares: share of every source in the target, for `shares: target`.
        seed: seed of random draws.

    Returns:
        Indices of the chosen examples: in each source in the order of choice if the method has one, else ascending.

    Raises:
        ConfigError: if the options give weights, which an index file does not have.
        SelectionError: if an option is wrong.
    """
    given = {**WITHOUT_WEIGHTS.get(method, {}), **(options or {})}
    if given.get("method") in ("caratheodory", "importance") or given.get("weights") == "inverse":
        raise ConfigError(
            f"--method {method} with {given}: chooses with weights, which an index file does not have. "
            "Take best_of or balanced, or choose in training with colm.selector."
        )
    everything = torch.arange(len(sources))
    if shares == "whole":
        pools, quotas = [everything], [min(size, len(sources))]
    else:
        ids = sorted(set(sources.tolist()))
        pools = [everything[sources == source] for source in ids]
        counts = [len(pool) for pool in pools]
        wanted = {
            "proportional": [count / len(sources) for count in counts],
            "fair": fair_shares(counts, size),
            "target": [target_shares[source] if source < len(target_shares) else 0.0 for source in ids],
        }[shares]
        quotas = quotas_of(wanted, counts, size) if shares != "proportional" else coreset_quotas(counts, size)
    chosen: list[int] = []
    for place, (pool, quota) in enumerate(zip(pools, quotas, strict=True), start=1):
        if quota:
            chosen += _choose(method, quota, pool, sources, signals, given, seed, place)
    return chosen


def quotas_of(shares: Sequence[float], counts: Sequence[int], size: int) -> list[int]:
    """Make shares whole picks by largest remainder; what a source does not have goes to the others, by share.

    Args:
        shares: at least 0, of any sum above 0.
        counts: examples of every source.
        size: picks, at most the sum of the counts.

    Returns:
        Picks of every source, adding up to `size`; ties go to the lower source.
    """
    quotas = [0] * len(counts)
    while (left := size - sum(quotas)) > 0:
        open_to = [place for place, count in enumerate(counts) if quotas[place] < count]
        total = sum(shares[place] for place in open_to)
        exact = {p: left * (shares[p] / total if total > 0 else 1.0 / len(open_to)) for p in open_to}
        whole = {p: int(exact[p] + 1e-9) for p in open_to}
        by_remainder = sorted(open_to, key=lambda p: (whole[p] - exact[p], p))
        for place in by_remainder[: left - sum(whole.values())]:
            whole[place] += 1
        for place in open_to:
            quotas[place] = min(counts[place], quotas[place] + whole[place])
    return quotas


def _choose(
    method: str,
    quota: int,
    pool: Tensor,
    sources: Tensor,
    signals: Signals,
    options: Mapping[str, Any],
    seed: int,
    place: int,
) -> list[int]:
    """Choose from some of the examples, as from a large batch of them at a step that numbers the pool."""
    assert signals.vectors is not None
    number = len(pool)
    zeros = torch.zeros(number, dtype=torch.int64)
    batch = LargeBatch(place, pool, sources[pool], zeros, zeros, zeros, {})
    part = Signals(
        torch.arange(number),
        signals.finite[pool],
        vectors=signals.vectors[pool],
        widths=signals.widths,
        target=signals.target,
        target_indices=signals.target_indices,
    )
    context = SelectorContext(
        quota, settings=SelectionSettings(geometry="plain", seed=seed), options=options, outer_rules="off"
    )
    coreset = make_selector(method, context).select(batch, part, SINGLE_PROCESS)
    return [int(index) for index in pool[coreset.positions]]
