"""CoLM's outer rules around any rule of choice: small sources whole, quotas by source, then the rule inside each pool.

A rule sees the examples of one pool and a quota; where examples with a non-finite signal go, ties, what happens if
everything fits, and the order of random numbers are decided here, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection.coreset import Signals
from colm_ds.selection.exchange import Exchange
from colm_ds.selection.options import NoOptions, made_options
from colm_ds.selection.selectors import SelectorContext, StatelessSelector
from colm_ds.selection.sources import JOINT_POOL, Pool, Shares, share_out
from colm_ds.selection.transfer import to_cpu
from colm_ds.selection.weights import mean_one
from colm_ds.types import NUM_NAMED, Coreset, LargeBatch


@dataclass(frozen=True)
class PoolExamples:
    """Usable examples of one pool, as a rule sees them.

    Attributes:
        source: source id, or `JOINT_POOL`.
        positions: their positions in the large batch, ascending, int64 `[n]`.
        batch: the large batch.
        signals: their signals, float64 `[n, K]` on the CPU; K is 0 without a probe.
        widths: columns of each signal by name, in order, if the selector asked for several.
        target: signals of the target examples, float64 `[m, K]`; None without a target.
    """

    source: int
    positions: Tensor
    batch: LargeBatch
    signals: Tensor
    widths: dict[str, int]
    target: Tensor | None

    def named(self, name: str) -> Tensor:
        """Return the columns of one signal, float64 `[n, w]`."""
        return self.signals[:, self._columns(name)]

    def target_named(self, name: str) -> Tensor:
        """Return the columns of one signal of the target examples, float64 `[m, w]`."""
        assert self.target is not None
        return self.target[:, self._columns(name)]

    def _columns(self, name: str) -> slice:
        names = list(self.widths)
        start = sum(self.widths[before] for before in names[: names.index(name)])
        return slice(start, start + self.widths[name])


@dataclass(frozen=True)
class Picks:
    """Choice of a rule.

    Attributes:
        rows: rows of the pool, int64 `[at most quota]`: in pick order if the rule is greedy, else ascending.
        weights: loss weights of any mean, `[len(rows)]`; None: 1.
    """

    rows: Tensor
    weights: Tensor | None = None


class PoolSelector(StatelessSelector):
    """Base of selectors whose rule chooses inside a pool; subclasses write `pick`.

    Attributes:
        name: name in the registry; seeds random numbers.
        Options: dataclass of the options.
        outer_by_default: whether small sources are kept and pools are made by source unless `outer_rules` says so.
        also: scores that are needed beside `signal`, from the same pass.
        needs_target: whether signals of target examples are needed.
        needs_past: whether losses of earlier steps are needed.
        needs_reference: whether a table of reference losses is needed.
    """

    name = ""
    Options: type[Any] = NoOptions
    outer_by_default = True
    also: tuple[str, ...] = ()
    needs_target = False
    needs_past = False
    needs_reference = False

    def __init__(self, context: SelectorContext) -> None:
        super().__init__(context)
        self.options: Any = made_options(self.Options, context.options, self.name)
        self.outer = has_outer_rules(type(self), context.outer_rules)
        self.sees_sources = self.outer
        self.keeps_small = self.outer

    @classmethod
    def signal_with(cls, options: Any) -> str | None:
        """Return the signal that the selector needs with these options."""
        return cls.signal

    @classmethod
    def past_with(cls, options: Any) -> bool:
        """Return whether it needs losses of earlier steps with these options."""
        return cls.needs_past

    def prepare(self, batch: LargeBatch, usable: Tensor, target: Tensor | None) -> None:
        """Prepare for the pools of one step; does nothing by default."""

    def lacks(self, batch: LargeBatch) -> Tensor | None:
        """Return which examples cannot be chosen for lack of data, bool `[r]`; None: none."""
        return None

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """Choose at most `quota` of more examples than that.

        Args:
            pool: the examples.
            quota: 0 < quota < n.
            generator: private CPU generator of this step and pool.
        """
        raise NotImplementedError

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """Keep small sources, share out the places, and let the rule choose inside each pool.

        Raises:
            SelectionError: without the signals that are needed, or if a target example has a non-finite one.
        """
        scores, finite, target = self._on_cpu(batch, signals)
        lacking = self.lacks(batch)
        if lacking is not None:
            finite = finite & ~lacking
        usable = finite
        if signals is not None and signals.unprobed is not None:
            usable = finite & ~signals.unprobed.cpu()
        shares = self._shares(batch, usable)
        self.prepare(batch, usable, target)
        widths = {} if signals is None else dict(signals.widths)
        picks = [
            self._pick(
                PoolExamples(pool.source, pool.positions, batch, scores[pool.positions], widths, target), pool, place
            )
            for place, pool in enumerate(shares.pools)
        ]
        positions = [pool.positions[pick.rows] for pool, pick in zip(shares.pools, picks, strict=True)]
        weights = [torch.ones(len(p.rows)) if p.weights is None else mean_one(p.weights) for p in picks]
        return Coreset(
            positions=torch.cat([shares.kept, *positions]),
            weights=torch.cat([torch.ones(len(shares.kept)), *weights]),
            num_kept=len(shares.kept),
            num_dropped_small=shares.num_dropped_small,
            num_nonfinite=int((~finite).sum()),
            nonfinite=tuple((~finite).nonzero().flatten()[:NUM_NAMED].tolist()),
            carry=shares.carry if self.outer and self.context.settings.carries else None,
        )

    def _pick(self, pool: PoolExamples, share: Pool, place: int) -> Picks:
        """Apply the rule, unless everything fits. Random numbers are those of the step and the pool's place."""
        if share.quota >= len(pool.positions):
            return Picks(torch.arange(len(pool.positions)))
        generator = private_generator(self.context.settings.seed, self.name, pool.batch.step, place)
        return self.pick(pool, share.quota, generator)

    def _shares(self, batch: LargeBatch, usable: Tensor) -> Shares:
        context, settings = self.context, self.context.settings
        if not self.outer:
            places = usable.nonzero().flatten()
            quota = min(context.size, len(places))
            return Shares(places[:0], [Pool(JOINT_POOL, places, quota)] if quota else [], 0)
        return share_out(
            batch.sources,
            context.size,
            context.small,
            selectable=usable,
            per_source=settings.per_source,
            small_share=settings.small_share,
            carry=batch.carry if settings.carries else None,
            generator=private_generator(settings.seed, self.name, batch.step),
        )

    def _on_cpu(self, batch: LargeBatch, signals: Signals | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return signals float64 `[r, K]`, finite flags `[r]` and the target's `[m, K]`, waiting for a device once."""
        if self.signal is None:
            return torch.zeros(batch.size, 0, dtype=torch.float64), torch.ones(batch.size, dtype=torch.bool), None
        if signals is None or signals.vectors is None:
            raise SelectionError(f"selector {type(self).__name__} was given no signals. Run the probe first.")
        tensors = [signals.vectors.float(), signals.finite]
        if self.needs_target:
            if signals.target is None or not len(signals.target):
                raise SelectionError(f"selector {self.name!r} was given no target. Write colm.target.")
            tensors.append(signals.target.float())
        vectors, finite, *rest = to_cpu(tensors)
        scores = torch.zeros(batch.size, vectors.shape[1], dtype=torch.float64)
        scores[signals.positions] = vectors.double()
        if not rest:
            return scores, finite, None
        broken = (~torch.isfinite(rest[0]).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            named = ", ".join(str(signals.target_indices[place]) for place in broken[:NUM_NAMED])
            raise SelectionError(
                f"step {batch.step}: target examples {named} of colm.target.data have a signal that is not finite. "
                "Take them out of the target, or resume from an earlier checkpoint if the model has diverged."
            )
        return scores, finite, rest[0].double()


def has_outer_rules(kind: Any, outer_rules: str) -> bool:
    """Return whether CoLM's outer rules apply to a class of selectors.

    Args:
        kind: class from the registry.
        outer_rules: `auto`, `on` or `off`.
    """
    by_default = bool(getattr(kind, "outer_by_default", getattr(kind, "sees_sources", True)))
    return by_default if outer_rules == "auto" else outer_rules == "on"
