"""Selectors by name; a new one needs a class and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from colm_ds.errors import SelectionError
from colm_ds.selection.alignment import GreatsSelector, OpusSelector
from colm_ds.selection.baselines import (
    BigLossSelector,
    CompletionLengthSelector,
    GradientNormSelector,
    HiddenMedoidsSelector,
    LeastConfidenceSelector,
    MiddlePerplexitySelector,
)
from colm_ds.selection.by_loss import (
    DeltaLossSelector,
    InfoBatchSelector,
    LossBandSelector,
    RhoLossSelector,
    SelectiveBackpropSelector,
)
from colm_ds.selection.ccs import CCSSelector
from colm_ds.selection.goracs import GoracsSelector
from colm_ds.selection.grab import GrabSelector
from colm_ds.selection.options import NoOptions, WrongOption, read_options
from colm_ds.selection.pools import PoolSelector, has_outer_rules
from colm_ds.selection.selectors import (
    BalancedSelector,
    CoLMSelector,
    FullSelector,
    ImportanceSelector,
    KeepRandomSelector,
    RandomSelector,
    Selector,
    SelectorContext,
)
from colm_ds.selection.simcore import SimCoreSelector
from colm_ds.selection.vector_sum import VectorSumSelector

SELECTORS: dict[str, Callable[[SelectorContext], Selector]] = {
    "colm": CoLMSelector,
    "random": RandomSelector,
    "keep_random": KeepRandomSelector,
    "full": FullSelector,
    "balanced": BalancedSelector,
    "importance": ImportanceSelector,
    "big_loss": BigLossSelector,
    "gradient_norm": GradientNormSelector,
    "middle_perplexity": MiddlePerplexitySelector,
    "completion_length": CompletionLengthSelector,
    "least_confidence": LeastConfidenceSelector,
    "hidden_medoids": HiddenMedoidsSelector,
    "ccs": CCSSelector,
    "simcore": SimCoreSelector,
    "goracs": GoracsSelector,
    "vector_sum": VectorSumSelector,
    "selective_backprop": SelectiveBackpropSelector,
    "greats": GreatsSelector,
    "opus": OpusSelector,
    "grab": GrabSelector,
    "rho_loss": RhoLossSelector,
    "infobatch": InfoBatchSelector,
    "loss_band": LossBandSelector,
    "delta_loss": DeltaLossSelector,
}


def make_selector(name: str, context: SelectorContext) -> Selector:
    """Make the selector of that name; `random` inside CoLM's outer rules is `keep_random`.

    Raises:
        SelectionError: if the name is unknown, or an option is.
    """
    if name not in SELECTORS:
        raise SelectionError(f"selector {name!r} is unknown. {which_selector(name)}")
    if name == "random" and context.outer_rules == "on":
        return KeepRandomSelector(context)
    return SELECTORS[name](context)


def which_selector(name: str) -> str:
    """Advise on a name that no selector has: the nearest one, and all."""
    nearest = difflib.get_close_matches(name, SELECTORS, n=1)
    choice = f"Choose one of {', '.join(SELECTORS)}."
    return f"Did you mean {nearest[0]!r}? {choice}" if nearest else choice


@dataclass(frozen=True)
class Needs:
    """Data that a selector needs with its options.

    Attributes:
        signal: result of the probe, see `Selector`; None: no pass of the model.
        also: further scores of the same pass.
        vectors: whether it compares gradients as vectors of few numbers, without a mask.
        target: whether it needs signals of target examples.
        past: whether it needs losses of earlier steps.
        reference: whether it needs a table of reference losses.
        sources: whether its choice depends on sources.
        average: share of earlier steps in the target's gradient, or 1 if sums carry over; 0: steps stand alone.
    """

    signal: str | None = None
    also: tuple[str, ...] = ()
    vectors: bool = False
    target: bool = False
    past: bool = False
    reference: bool = False
    sources: bool = True
    average: float = 0.0


def needs_of(name: str, options: Mapping[str, Any] | None = None, outer_rules: str = "auto") -> Needs:
    """Return what the selector of that name needs; nothing if it does not exist.

    Args:
        name: name in `SELECTORS`.
        options: its options; wrong ones count as their defaults.
        outer_rules: see `SelectorContext`.
    """
    kind: Any = SELECTORS.get(name)
    sources = sees_sources(name, outer_rules)
    if not (isinstance(kind, type) and issubclass(kind, PoolSelector)):
        return Needs(getattr(kind, "signal", None), sources=sources)
    read, _ = read_options(kind.Options, options or {}, name)
    signal = kind.signal_with(read)
    carries = getattr(read, "carry", False) and read.rule == "pair"
    return Needs(
        signal=signal,
        also=kind.also if signal is not None else (),
        vectors=signal == "gradient",
        target=kind.needs_target,
        past=kind.past_with(read),
        reference=kind.needs_reference,
        sources=sources,
        average=1.0 if carries else float(getattr(read, "average", 0.0)),
    )


def wrong_options(name: str, options: Mapping[str, Any]) -> list[WrongOption]:
    """Return what is wrong with the options of the selector of that name."""
    kind = getattr(SELECTORS.get(name), "Options", NoOptions)
    return read_options(kind, options, name)[1]


def takes_outer_rules(name: str) -> bool:
    """Return whether CoLM's outer rules can be switched on or off around the selector of that name."""
    kind: Any = SELECTORS.get(name)
    return name == "random" or (isinstance(kind, type) and issubclass(kind, PoolSelector))


def signal_of(name: str, options: Mapping[str, Any] | None = None) -> str | None:
    """Return the signal that the selector of that name needs; None if it needs none or does not exist."""
    return needs_of(name, options).signal


def sees_sources(name: str, outer_rules: str = "auto") -> bool:
    """Return whether the choice of the selector of that name depends on examples' sources."""
    kind: Any = SELECTORS.get(name)
    if takes_outer_rules(name):
        return has_outer_rules(kind, outer_rules)
    return bool(getattr(kind, "sees_sources", True))
