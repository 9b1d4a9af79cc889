"""Sections of a configuration: strict keys, values that stay, and one message for everything that is wrong."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from colm_ds.errors import Problems


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, numbers are finite, values are not changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def validate_section(kind: type[Section], values: Any, prefix: str, problems: Problems) -> Section | None:
    """Build one section, recording unknown keys (with the nearest known one) and wrong values.

    Returns:
        The section, or None if there were problems.
    """
    if not _check_texts(values, prefix, problems):
        return None
    try:
        return kind.model_validate(values, strict=False)
    except ValidationError as error:
        wrong: dict[str, list[Any]] = {}  # key -> value, names and every alternative's message
        for item in error.errors():
            names = [str(part) for part in item["loc"] if not _is_union_branch(part, kind)]
            key = ".".join([prefix, *names] if prefix else names)
            if item["type"] == "extra_forbidden":
                problems.add_unknown(key, _known_keys(kind, names[:-1]))
            elif item["type"] == "missing":
                problems.messages.append(f"{key}: missing. {_describe(kind, names)}")
            else:
                message = must_be(item)
                if key in wrong:
                    message = message.removeprefix("must be ")
                wrong.setdefault(key, [item["input"], names]).append(message)
        for key, (value, names, *messages) in wrong.items():
            problems.add(key, value, " or ".join(messages), _describe(kind, names))
        return None


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text", "list": "a list"}
_KINDS |= dict.fromkeys(("dict", "model", "model_attributes"), "a section of keys and values")
_BOUNDS = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
_BOUNDS |= {"less_than": "less than"}


def must_be(item: ErrorDetails) -> str:
    """Return what a value must be, in this project's words, from an error of pydantic's."""
    kind, message = item["type"], item["msg"][0].lower() + item["msg"][1:]
    named = re.sub(r"_(type|parsing|from_float|parsing_size)$", "", kind)
    if named in _KINDS:
        return f"must be {_KINDS[named]}"
    if kind in _BOUNDS:
        (bound,) = item["ctx"].values()
        return f"must be {_BOUNDS[kind]} {bound:g}"
    if kind in ("too_long", "too_short"):
        at_most, bound = kind == "too_long", item["ctx"]["max_length" if kind == "too_long" else "min_length"]
        return f"must have at {'most' if at_most else 'least'} {bound} item{'s' * (bound != 1)}"
    return re.sub("^value error, ", "", re.sub("^input should be ", "must be ", message))


def _check_texts(values: Any, key: str, problems: Problems) -> bool:
    """Record texts that can be no path, key or name anywhere: with a NUL character, or half of a surrogate pair."""
    good = True
    if isinstance(values, dict):
        for name, value in values.items():
            good &= _check_texts(name, key, problems)
            good &= _check_texts(value, f"{key}.{name}" if key else str(name), problems)
    elif isinstance(values, list):
        for value in values:
            good &= _check_texts(value, key, problems)
    elif isinstance(values, str) and re.search("[\\0\\ud800-\\udfff]", values):
        problems.add(key, values, "holds a NUL character or half of a surrogate pair", "Write it without.")
        good = False
    return good


def _is_union_branch(part: Any, kind: type[Section]) -> bool:
    """Return whether a part of an error's location names an alternative of a union and not a key."""
    kinds = ("int", "float", "str", "bool")
    return isinstance(part, str) and ("[" in part or part.removeprefix("constrained-") in kinds)


def _section_at(kind: type[Section], names: list[str]) -> type[Section] | None:
    for name in names:
        if name.isdigit():  # an item of a list, whose section was found with the list
            continue
        field = kind.model_fields.get(name)
        section = _section_in(field.annotation) if field else None
        if section is None:
            return None
        kind = section
    return kind


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the first section that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section_in(part) for part in getattr(annotation, "__args__", ()))
    return next((section for section in inner if section is not None), None)


def _known_keys(kind: type[Section], names: list[str]) -> list[str]:
    section = _section_at(kind, names)
    return list(section.model_fields) if section else []


def _describe(kind: type[Section], names: list[str]) -> str:
    section = _section_at(kind, names[:-1]) if names else None
    field = section.model_fields.get(names[-1]) if section else None
    return f"It is: {field.description}." if field and field.description else ""
