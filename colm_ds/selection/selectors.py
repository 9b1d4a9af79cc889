"""The interface of selectors, CoLM's selector, and those that need no signal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection.coreset import SelectionSettings, Signals, select_coreset
from colm_ds.selection.exchange import Exchange
from colm_ds.selection.history import AdamHistory
from colm_ds.selection.importance import ImportanceOptions, chances_by_labels
from colm_ds.selection.options import made_options
from colm_ds.selection.sources import share_out
from colm_ds.types import Coreset, LargeBatch


@dataclass(frozen=True)
class SelectorContext:
    """Arguments that every selector is made from.

    Attributes:
        size: b.
        small: ids of small sources.
        settings: settings of the selection; `seed` seeds every random choice.
        betas: beta1 and beta2 of the optimizer in use.
        eps: eps of the optimizer in use.
        options: options of the selector by name.
        outer_rules: whether small sources are kept and pools are made by source: `auto`, `on` or `off`.
    """

    size: int
    small: Collection[int] = ()
    settings: SelectionSettings = field(default_factory=SelectionSettings)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    options: Mapping[str, Any] = field(default_factory=dict)
    outer_rules: str = "auto"


class Selector(Protocol):
    """Choose a coreset of every large batch.

    Attributes:
        signal: result of the probe that `select` needs: "gradient", one of `probe.scores.SCORES`, or None.
        keeps_small: whether all examples of small sources are kept, so that they need no probe.

    A selector with a true `can_choose_ahead` depends only on the facts of a large batch and the signals, and has no
    state: if it needs no pass of the model, it chooses before the examples are read.
    """

    signal: str | None
    keeps_small: bool

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """Select the coreset of one large batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later choices depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        ...


class CoLMSelector:
    """All examples of small sources and the medoids of the others (CoLM, algorithm 1)."""

    signal: str | None = "gradient"
    keeps_small = True
    can_choose_ahead = True

    def __init__(self, context: SelectorContext) -> None:
        self._context = context
        self._history: AdamHistory | None = None
        self._saved: dict[str, Any] | None = None

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """See `select_coreset`."""
        if signals is None:
            raise SelectionError("selector 'colm' was given no signals. Run the probe first.")
        context = self._context
        return select_coreset(
            batch.sources,
            signals,
            context.size,
            small=context.small,
            settings=context.settings,
            history=self._history_for(signals),
            step=batch.step,
            carry=batch.carry,
            chances=self._chances(batch, signals),
            exchange=exchange,
        )

    def _chances(self, batch: LargeBatch, signals: Signals) -> Tensor | None:
        """Return what draws by importance go by, `[r]`; None: the signals."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the history, once there is one."""
        return self._history.state_dict() if self._history else dict(self._saved or {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history; it is placed on a device when the next signals arrive."""
        self._history, self._saved = None, state or None

    def _history_for(self, signals: Signals) -> AdamHistory | None:
        if signals.gradients is None or self._context.settings.geometry == "plain":
            return None
        if self._history is None:
            context = self._context
            device = signals.finite.device
            self._history = AdamHistory(signals.gradients.num_coordinates, context.betas, context.eps, device)
            if self._saved is not None:
                self._history.load_state_dict(self._saved)
                self._saved = None
        return self._history


class BalancedSelector(CoLMSelector):
    """All examples of small sources and a balanced draw of the others: unbiased, where medoids with weights are not."""

    def __init__(self, context: SelectorContext) -> None:
        super().__init__(replace(context, settings=replace(context.settings, picks="balanced", weights="uniform")))


class ImportanceSelector(CoLMSelector):
    """All examples of small sources, and a draw of the others in which longer gradients are likelier and count less."""

    Options = ImportanceOptions

    def __init__(self, context: SelectorContext) -> None:
        super().__init__(replace(context, settings=replace(context.settings, picks="importance", weights="uniform")))
        self._options: ImportanceOptions = made_options(ImportanceOptions, context.options, "importance")

    def _chances(self, batch: LargeBatch, signals: Signals) -> Tensor | None:
        return None if self._options.by == "signal" else chances_by_labels(batch.num_label_tokens, signals.parts)


class StatelessSelector:
    """Base of selectors without state; by default it uses no signal and keeps nothing by source.

    Attributes:
        context: arguments that it was made from.
    """

    signal: str | None = None
    keeps_small = False
    sees_sources = False
    can_choose_ahead = False

    def __init__(self, context: SelectorContext) -> None:
        self.context = context

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


class RandomSelector(StatelessSelector):
    """Plain training on b: a random b of the r examples."""

    can_choose_ahead = True

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """Draw b positions from (seed, step), ascending."""
        generator = private_generator(self.context.settings.seed, "random", batch.step)
        return _uniform(torch.randperm(batch.size, generator=generator)[: self.context.size].sort().values)


class KeepRandomSelector(StatelessSelector):
    """All examples of small sources, random ones of the others by CoLM's quotas: what CoLM is without medoids."""

    sees_sources = True
    can_choose_ahead = True

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """Select kept examples, then each pool's random picks, drawn from (seed, step)."""
        context = self.context
        generator = private_generator(context.settings.seed, "keep_random", batch.step)
        shares = share_out(
            batch.sources,
            context.size,
            context.small,
            per_source=context.settings.per_source,
            small_share=context.settings.small_share,
            carry=batch.carry if context.settings.carries else None,
            generator=generator,
        )
        picks = [
            pool.positions[torch.randperm(len(pool.positions), generator=generator)[: pool.quota]]
            for pool in shares.pools
        ]
        positions = torch.cat([shares.kept, *picks])
        return replace(_uniform(positions, len(shares.kept), shares.num_dropped_small), carry=shares.carry)


class FullSelector(StatelessSelector):
    """Plain training on r: every example of the large batch."""

    def select(self, batch: LargeBatch, signals: Signals | None, exchange: Exchange) -> Coreset:
        """Return all positions."""
        return _uniform(torch.arange(batch.size))


def _uniform(positions: Tensor, num_kept: int = 0, num_dropped_small: int = 0) -> Coreset:
    return Coreset(positions, torch.ones(len(positions)), num_kept, num_dropped_small)
