"""GraB: one half of the examples, by signs that keep a running sum of gradient differences short (Lu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.selection.draws import first_largest
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector


def balance_signs(vectors: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give every vector the sign that keeps the running signed sum s shorter: +1 if |s + v| <= |s - v|, else -1.

    Args:
        vectors: in the order in which they come, `[p, K]`.
        start: s before the first, `[K]`; default 0.

    Returns:
        Signs, float64 `[p]`, and s after the last, float64 `[K]`.
    """
    wide = vectors.double()
    begin = torch.zeros(wide.shape[1], dtype=torch.float64) if start is None else start.double()
    along, products = wide @ begin, wide @ wide.T  # s . v_t is along[t] + sum_{j<t} sign_j v_j . v_t
    signs = torch.zeros(len(wide), dtype=torch.float64)
    for place in range(len(wide)):
        signs[place] = 1.0 if float(along[place]) <= 0.0 else -1.0
        along += signs[place] * products[place]
    return signs, begin + signs @ wide


def balanced_half(
    vectors: Tensor, count: int, generator: torch.Generator, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `count` of n by pair balancing, each as likely as any other.

    The examples are shuffled and paired; of each pair the sign of its difference chooses one. More than twice `count`
    are halved again and again (an odd one out stays by a coin); of fewer, only as many random pairs are split as there
    are too many examples, and a split pair's pick stands for two. Every pass begins at s = 0 but the first, as a sum
    that knows the survivors would prefer some of them; for one halving mean(chosen) - mean(all) = (s - start) / n.

    Args:
        vectors: `[n, K]`.
        count: 0 < count < n.
        generator: private CPU generator.
        start: s before the first pair, `[K]`; default 0.

    Returns:
        Ascending places, int64 `[count]`; how many examples of the last pass each stands for, float64 `[count]`; and s
        after the first pass.
    """
    zero = torch.zeros(vectors.shape[1], dtype=torch.float64)
    begin = zero if start is None else start.double()
    after: Tensor | None = None
    places = torch.arange(len(vectors))
    while len(places) >= 2 * count:
        (chosen, odd), total = _split(vectors, places, len(places) // 2, generator, begin)
        begin, after = zero, total if after is None else after
        lucky = odd if len(odd) and float(torch.rand((), generator=generator)) < 0.5 else odd[:0]
        places = torch.cat([chosen, lucky]).sort().values
    stands_for = torch.ones(len(places), dtype=torch.float64)
    if len(places) > count:
        (chosen, whole), total = _split(vectors, places, len(places) - count, generator, begin)
        after = total if after is None else after
        both = torch.cat([chosen, whole])
        order = both.argsort()
        places, stands_for = both[order], torch.where(order < len(chosen), 2.0, 1.0).double()
    assert after is not None
    return places, stands_for, after


def _split(
    vectors: Tensor, places: Tensor, num_pairs: int, generator: torch.Generator, start: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Shuffle, choose one of each of the first pairs; return the chosen and the unpaired ones, and s."""
    shuffled = places[torch.randperm(len(places), generator=generator)]
    first, second = shuffled[: 2 * num_pairs : 2], shuffled[1 : 2 * num_pairs : 2]
    signs, total = balance_signs(vectors[first] - vectors[second], start)
    return (torch.where(signs > 0, first, second), shuffled[2 * num_pairs :]), total


def herd(vectors: Tensor, count: int) -> Tensor:
    """Pick greedily the example that brings the sum of the picks nearest to as many times the mean.

    Args:
        vectors: `[n, K]`.
        count: at most n.

    Returns:
        Places in pick order, int64 `[count]`; ties go to the lower place.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    products = centred @ centred.T
    squares = products.diagonal().clone()
    along = torch.zeros_like(squares)  # running sum times each
    scale = float(squares.max()) * max(1, count) if len(squares) else 0.0
    taken = torch.zeros(len(squares), dtype=torch.bool)
    picks: list[int] = []
    for _ in range(count):
        lengths = 2.0 * along + squares  # beside the running sum's own length
        chosen = first_largest(torch.where(taken, -torch.inf, -lengths), scale)
        picks.append(chosen)
        taken[chosen] = True
        along += products[chosen]
    return torch.tensor(picks, dtype=torch.int64)


@dataclass(frozen=True)
class GrabOptions:
    """Options of `grab`."""

    rule: str = option("pair", "pair balancing (unbiased) or greedy herding", choices=("pair", "herding"))
    weights: str = option("pair", "a split pair's pick counts twice, or all alike", choices=("pair", "uniform"))
    carry: bool = option(False, "start from the last step's running sum; needs probe.refresh run, or tokens")
    decay: float = option(1.0, "factor of the carried sum", low=0.0, high=1.0)


class GrabSelector(PoolSelector):
    """A balanced choice by gradients: unbiased, and nearer to the large batch's mean than a random one."""

    name = "grab"
    signal: str | None = "gradient"
    Options = GrabOptions

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._sums: dict[int, Tensor] = {}
        self.can_choose_ahead = not self.options.carry

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        if self.options.rule == "herding":
            return Picks(herd(pool.signals, quota))
        start = self._sums.get(pool.source) if self.options.carry else None
        rows, stands_for, total = balanced_half(
            pool.signals, quota, generator, None if start is None else start * self.options.decay
        )
        if self.options.carry:
            self._sums[pool.source] = total
        return Picks(rows, stands_for if self.options.weights == "pair" else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums by source, if they carry over."""
        return {"sums": dict(self._sums)} if self._sums else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._sums = dict(state.get("sums", {}))
