"""Options of a selector: a dataclass of values with their ranges, read from `colm.options` with one message for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from colm_ds.errors import SelectionError, nearest_key


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
) -> Any:
    """Declare a field of a selector's options.

    Args:
        default: its value if it is not written.
        text: description.
        choices: words that it may be, beside numbers where `low` is given.
        low: smallest number.
        high: largest number.
        whole: whether it must be a whole number, also where the default is none.
    """
    whole = whole or (isinstance(default, int) and not isinstance(default, bool))
    about = {"text": text, "choices": tuple(choices), "low": low, "high": high, "whole": whole}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class NoOptions:
    """Options of a selector that has none."""


@dataclass(frozen=True)
class WrongOption:
    """One thing wrong with given options.

    Attributes:
        name: the option.
        value: as written.
        why: reason.
        fix: text that says what to write instead.
    """

    name: str
    value: Any
    why: str
    fix: str


def read_options(kind: type[Any], values: Mapping[str, Any], owner: str) -> tuple[Any, list[WrongOption]]:
    """Make options from written values.

    Args:
        kind: dataclass whose fields are made by `option`.
        values: written options by name.
        owner: name of the selector, for messages.

    Returns:
        The options, with the default of everything that is wrong, and what is wrong.
    """
    known = {one.name: one for one in fields(kind)}
    wrong: list[WrongOption] = []
    right: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            fix = nearest_key(name, known) if known else "Remove it."
            wrong.append(WrongOption(name, value, f"the selector {owner!r} has no such option", fix))
            continue
        about = known[name].metadata
        if _fits(value, known[name].default, about):
            right[name] = _as_kind(value, known[name].default, about)
        else:
            wrong.append(
                WrongOption(name, value, f"not {_allowed(known[name].default, about)}", f"It is: {about['text']}.")
            )
    return kind(**right), wrong


def made_options(kind: type[Any], values: Mapping[str, Any], owner: str) -> Any:
    """Make options from written values.

    Raises:
        SelectionError: listing everything that is wrong.
    """
    options, wrong = read_options(kind, values, owner)
    if wrong:
        lines = [f"options.{one.name} = {one.value!r}: {one.why}. {one.fix}" for one in wrong]
        raise SelectionError("\n  ".join([f"selector {owner!r}", *lines]))
    return options


def _as_kind(value: Any, default: Any, about: Mapping[str, Any]) -> Any:
    """Return a number as the kind that the option is, as JSON writes 4.0 for 4 and 1 for 1.0."""
    if not _is_number(value):
        return value
    return int(value) if about["whole"] else float(value) if isinstance(default, float) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fits(value: Any, default: Any, about: Mapping[str, Any]) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if about["choices"] and value in about["choices"]:
        return True
    if about["low"] is None:
        return not about["choices"] and isinstance(value, str)
    if not _is_number(value) or not math.isfinite(value) or (about["whole"] and value != int(value)):
        return False
    return bool(about["low"] <= value and (about["high"] is None or value <= about["high"]))


def _allowed(default: Any, about: Mapping[str, Any]) -> str:
    if isinstance(default, bool):
        return "true or false"
    parts = [", ".join(about["choices"])] if about["choices"] else []
    if about["low"] is not None:
        kind = "a whole number" if about["whole"] else "a number"
        upper = "" if about["high"] is None else f" and at most {about['high']:g}"
        parts.append(f"{kind} of at least {about['low']:g}{upper}")
    return " or ".join(parts) or "a text"
