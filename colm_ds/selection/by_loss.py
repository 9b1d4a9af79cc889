"""Selectors by losses: of the current model, of earlier steps, and beside a reference model's.

Selective backprop (Jiang et al. 2019), RHO-LOSS (Mindermann et al., ICML 2022), InfoBatch (Qin et al., ICLR 2024), and
DataFlex's loss bands and loss differences (2026).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection.baselines import largest
from colm_ds.selection.draws import inclusion_probabilities, softmax_draw, uniform_draw, weighted_draw
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector
from colm_ds.types import LargeBatch, PastLosses


def rank_probabilities(losses: Tensor, power: float) -> Tensor:
    """Return ((k + 1/2) / n)^power for the k-th smallest loss, float64 `[n]`; of equal losses the lower place has more.

    Args:
        losses: `[n]`; inf is the largest.
        power: 0 makes all alike.
    """
    n = len(losses)
    backwards = torch.sort(losses.double().flip(0), stable=True).indices
    rank = torch.empty(n, dtype=torch.float64)
    rank[n - 1 - backwards] = torch.arange(n, dtype=torch.float64)
    return ((rank + 0.5) / n).pow(power)


def infobatch_draw(losses: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw fewer of the examples whose last loss is below the mean, and weight what is drawn by what it stands for.

    Args:
        losses: `[n]`, NaN where unknown; these belong to the others.
        count: 0 < count < n.
        generator: private CPU generator.

    Returns:
        Ascending places, int64 `[count]`, and weights whose sums over places are unbiased, float64 `[count]`.
    """
    below, others = split_by_mean(losses)
    n_others, n_below = infobatch_quotas(len(below), len(others), count)
    if count == 1 or not (n_others and n_below):
        return uniform_draw(len(losses), count, generator), torch.ones(count, dtype=torch.float64)
    drawn = [part[uniform_draw(len(part), quota, generator)] for part, quota in ((others, n_others), (below, n_below))]
    weights = torch.cat(
        [
            torch.full((quota,), len(part) / quota, dtype=torch.float64)
            for part, quota in ((others, n_others), (below, n_below))
        ]
    )
    places = torch.cat(drawn)
    order = places.argsort()
    return places[order], weights[order]


def split_by_mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places whose loss is below the mean of the known ones, and the others; ascending int64 each."""
    wide = losses.double()
    known = torch.isfinite(wide)
    below = known & (wide < wide[known].mean()) if bool(known.any()) else known
    return below.nonzero().flatten(), (~below).nonzero().flatten()


def infobatch_quotas(num_below: int, num_others: int, count: int) -> tuple[int, int]:
    """Share `count` picks: the others whole if a tenth of the picks is left for those below the mean.

    Returns:
        Picks of the others and of those below the mean; at least one of each where there are any and two picks.
    """
    if num_below == 0:
        return count, 0
    n_others = min(num_others, count - math.ceil(0.1 * count))
    n_below = min(num_below, count - n_others)
    return count - n_below, n_below


def band_probabilities(losses: Tensor, focus: str, weight: float, temperature: float) -> Tensor:
    """Return DataFlex's chances by the third of the losses that an example is in, float64 `[n]`, of any sum.

    Args:
        losses: `[n]`; NaN, unknown, counts as in focus.
        focus: `low`, `medium` or `high`: the band between the quantiles 0.33 and 0.66 is the medium one.
        weight: chance inside relative to outside, before the temperature.
        temperature: chances are raised to its inverse.
    """
    wide = losses.double()
    known = torch.isfinite(wide)
    if not bool(known.any()):
        return torch.ones(len(wide), dtype=torch.float64)
    low, high = torch.quantile(wide[known], torch.tensor([0.33, 0.66], dtype=torch.float64))
    band = {"low": wide <= low, "medium": (wide > low) & (wide <= high), "high": wide > high}[focus]
    chances = torch.where(band | ~known, weight, 1.0).double()
    return chances.pow(1.0 / temperature)


def window(progress: float, size: int, share: float) -> tuple[int, int]:
    """Return where DataFlex's window over a falling order of loss differences begins and ends.

    Args:
        progress: share of training that is over, 0 to 1.
        size: N, examples in the order.
        share: part of them that the window holds, at least one.
    """
    length = min(size, max(1, int(share * size + 1e-9)))
    start = int((1.0 - share) * size / (1.0 + math.exp(-10.0 * (progress - 0.5))) + 1e-9)
    return start, start + length


def delta_probabilities(differences: Tensor, progress: float, share: float, outside: float) -> Tensor:
    """Return chances by a window that moves from the largest loss differences to smaller ones.

    Args:
        differences: first loss less current loss, `[n]`; NaN, unknown, counts as inside.
        progress: share of training that is over.
        share: part of the known examples in the window.
        outside: chance outside of it; inside it is 1.

    Returns:
        float64 `[n]`. The window never passes the first difference below 0.
    """
    wide = differences.double()
    known = torch.isfinite(wide).nonzero().flatten()
    order = known[torch.sort(wide[known], descending=True, stable=True).indices]
    start, end = window(min(max(progress, 0.0), 1.0), len(order), share)
    last = int((wide[order] >= 0.0).sum())
    if end > last:
        start, end = max(0, start - (end - last)), last
    chances = torch.full((len(wide),), outside, dtype=torch.float64)
    chances[~torch.isfinite(wide)] = 1.0
    chances[order[start:end]] = 1.0
    return chances


class _ByLoss(PoolSelector):
    """Base of selectors by the current model's loss, or with `stale` by training's own in earlier steps."""

    signal: str | None = "loss"

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.signal = self.signal_with(self.options)

    @classmethod
    def signal_with(cls, options: Any) -> str | None:
        """See `PoolSelector.signal_with`."""
        return None if options.stale else "loss"

    @classmethod
    def past_with(cls, options: Any) -> bool:
        """See `PoolSelector.past_with`."""
        return bool(options.stale) or cls.needs_past

    def _losses(self, pool: PoolExamples) -> Tensor:
        """Return losses in nats, float64 `[n]`; NaN where only earlier ones count and there is none."""
        if not self.options.stale:
            return pool.signals[:, 0]
        return _past(pool.batch, self.name).last[pool.positions].double()


@dataclass(frozen=True)
class SelectiveBackpropOptions:
    """Options of `selective_backprop`."""

    power: str | float = option("auto", "of an example's rank; auto: n / b - 1", choices=("auto",), low=0.0)
    weights: str = option("none", "inverse: by 1 / chance, scaled to a mean of 1", choices=("none", "inverse"))
    stale: bool = option(False, "losses of earlier steps in place of a probe; what was never seen comes first")


class SelectiveBackpropSelector(_ByLoss):
    """Draws that prefer large losses by rank."""

    name = "selective_backprop"
    Options = SelectiveBackpropOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        losses = self._losses(pool).nan_to_num(nan=torch.inf)
        power = len(losses) / quota - 1.0 if self.options.power == "auto" else self.options.power
        chances = rank_probabilities(losses, power)
        rows = weighted_draw(chances, quota, generator)
        if self.options.weights == "none":
            return Picks(rows)
        return Picks(rows, 1.0 / inclusion_probabilities(chances, quota)[rows])


@dataclass(frozen=True)
class RhoLossOptions:
    """Options of `rho_loss`."""

    table: str = option("", "file of reference losses, written by colm-ds score")
    sample: str = option("top", "the largest, or draws by softmax", choices=("top", "softmax"))
    temperature: float = option(1.0, "of the softmax", low=1e-9)


class RhoLossSelector(PoolSelector):
    """The examples with the largest reducible loss: the model's less a reference model's."""

    name = "rho_loss"
    signal: str | None = "loss"
    needs_reference = True
    Options = RhoLossOptions

    def lacks(self, batch: LargeBatch) -> Tensor | None:
        """Return which examples the table does not know."""
        return ~torch.isfinite(self._reference(batch))

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        scores = pool.signals[:, 0] - self._reference(pool.batch)[pool.positions].double()
        if self.options.sample == "top":
            return Picks(largest(scores, quota))
        return Picks(softmax_draw(scores, quota, self.options.temperature, generator))

    def _reference(self, batch: LargeBatch) -> Tensor:
        if batch.reference is None:
            raise SelectionError("selector 'rho_loss' was given no reference losses. Write colm.options.table.")
        return batch.reference


class InfoBatchSelector(PoolSelector):
    """Unbiased pruning of what the model has learnt, by the last losses of training itself; no probe."""

    name = "infobatch"
    needs_past = True

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        return Picks(*infobatch_draw(_past(pool.batch, self.name).last[pool.positions], quota, generator))


@dataclass(frozen=True)
class LossBandOptions:
    """Options of `loss_band`."""

    focus: str = option("high", "third of the losses that is preferred", choices=("low", "medium", "high"))
    weight: float = option(5.0, "chance inside it relative to outside", low=0.0)
    temperature: float = option(1.0, "chances are raised to its inverse", low=1e-9)
    stale: bool = option(False, "losses of earlier steps in place of a probe; what was never seen counts as inside")


class LossBandSelector(_ByLoss):
    """Draws that prefer a third of the losses."""

    name = "loss_band"
    Options = LossBandOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        options = self.options
        chances = band_probabilities(self._losses(pool), options.focus, options.weight, options.temperature)
        return Picks(weighted_draw(chances, quota, generator))


@dataclass(frozen=True)
class DeltaLossOptions:
    """Options of `delta_loss`."""

    window: float = option(0.2, "share of the examples in the window", low=0.0, high=1.0)
    outside: float = option(0.025, "chance outside relative to inside", low=0.0, high=1.0)
    passes: float = option(3.0, "passes over the data in which the window moves from end to end", low=1e-9)
    stale: bool = option(False, "the last loss of training as the current one, in place of a probe")


class DeltaLossSelector(_ByLoss):
    """Draws that first prefer what was learnt most, later what was learnt less."""

    name = "delta_loss"
    needs_past = True
    Options = DeltaLossOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        past, options = _past(pool.batch, self.name), self.options
        differences = past.first[pool.positions].double() - self._losses(pool)
        progress = (pool.batch.step - 1) * pool.batch.size / (past.num_examples * options.passes)
        chances = delta_probabilities(differences, progress, options.window, options.outside)
        return Picks(weighted_draw(chances, quota, generator))


def _past(batch: LargeBatch, name: str) -> PastLosses:
    if batch.past is None:
        raise SelectionError(f"selector {name!r} was given no losses of earlier steps. Use colm_ds.initialize.")
    return batch.past
