"""Selectors by name; a new one needs a class and a line here."""

from __future__ import annotations

from collections.abc import Callable

from colm_ds.errors import SelectionError
from colm_ds.selection.baselines import (
    BigLossSelector,
    CompletionLengthSelector,
    GradientNormSelector,
    HiddenMedoidsSelector,
    LeastConfidenceSelector,
    MiddlePerplexitySelector,
)
from colm_ds.selection.selectors import (
    BalancedSelector,
    CoLMSelector,
    FullSelector,
    KeepRandomSelector,
    RandomSelector,
    Selector,
    SelectorContext,
)

SELECTORS: dict[str, Callable[[SelectorContext], Selector]] = {
    "colm": CoLMSelector,
    "random": RandomSelector,
    "keep_random": KeepRandomSelector,
    "full": FullSelector,
    "balanced": BalancedSelector,
    "big_loss": BigLossSelector,
    "gradient_norm": GradientNormSelector,
    "middle_perplexity": MiddlePerplexitySelector,
    "completion_length": CompletionLengthSelector,
    "least_confidence": LeastConfidenceSelector,
    "hidden_medoids": HiddenMedoidsSelector,
}


def make_selector(name: str, context: SelectorContext) -> Selector:
    """Make the selector of that name.

    Raises:
        SelectionError: if the name is unknown.
    """
    if name not in SELECTORS:
        raise SelectionError(f"selector {name!r} is unknown. Choose one of {', '.join(SELECTORS)}.")
    return SELECTORS[name](context)


def signal_of(name: str) -> str | None:
    """Return the signal that the selector of that name needs; None if it needs none or does not exist."""
    return getattr(SELECTORS.get(name), "signal", None)


def sees_sources(name: str) -> bool:
    """Return whether the choice of the selector of that name depends on examples' sources."""
    return bool(getattr(SELECTORS.get(name), "sees_sources", True))
