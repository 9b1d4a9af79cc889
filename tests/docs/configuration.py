"""Every key that users write: `python -m tests.docs.configuration` writes docs/CONFIGURATION.md from the code."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from colm_ds.config.colm import FITS_GRADIENTS, FITS_TOKENS, CoLMSection
from colm_ds.config.section import Section
from colm_ds.recipes.recipe import RECIPES
from colm_ds.sweep.grid import Grid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "CONFIGURATION.md"

HEAD = """# Configuration

Written from the code by `python -m tests.docs.configuration`. A misspelled or unknown key is an error that names the
nearest known one; all problems of a file come in one message, before training.

- The `"colm"` section stands in DeepSpeed's JSON (`colm_ds.initialize`), in a recipe (`colm:`), in the Trainer's
  `CoLMConfig`, which has those keys that a Trainer does not set itself.
- A recipe is a YAML file ([a whole one](FINETUNING.md#a-recipe-of-your-own)). `extends: OTHER.yaml` inherits the keys
  and sections that are not written; one that is written replaces the other's whole section. On the command line
  `key=value` changes a recipe, with dots for one key of a section (`colm.coreset_size=8`), or a whole section at once:
  `colm={large_batch_size: 64, coreset_size: 32}`.
- A grid is a YAML file of `colm-ds sweep`.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD, "## The `colm` section", table(CoLMSection, "")]
    (task, first), *others = RECIPES.items()
    shared = dict(rows(first, "", without=("colm",)))
    parts += [f"## Recipes (`task: {task}`, the default)", "`colm`: the section above.", format_rows(shared)]
    for task, kind in others:
        own = {key: row for key, row in rows(kind, "", without=("colm",)) if shared.get(key) != row}
        parts += [
            f"## Recipes with `task: {task}`",
            "Keys that are not among those above, or differ.",
            format_rows(own),
        ]
    return "\n\n".join([*parts, "## Grids", table(Grid, "")]) + "\n"


def table(section: type[Section], prefix: str) -> str:
    """Return the table of a section's keys."""
    return format_rows(dict(rows(section, prefix)))


def format_rows(keys: dict[str, tuple[str, str, str]]) -> str:
    """Return a Markdown table."""
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    lines += [
        f"| `{key}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for key, row in keys.items()
    ]
    return "\n".join(lines)


def rows(
    section: type[Section], prefix: str, without: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yield each key with its values, default and description."""
    for name, field in section.model_fields.items():
        if name in without:
            continue
        inner = next((kind for kind in _members(field.annotation) if _is_section(kind)), None)
        if inner is not None and not _listed(field.annotation):
            if type(None) in _members(field.annotation):
                yield f"{prefix}{name}", ("a section", "none", field.description or "")
            yield from rows(inner, f"{prefix}{name}.")
            continue
        values, default = _values(field.annotation), _default(field)
        if section is CoLMSection and name in FITS_TOKENS:
            values = values if "`auto`" in values else f"`auto`, {values}"
            default, with_tokens = _shown(FITS_GRADIENTS[name]), _shown(FITS_TOKENS[name])
            default += f"; with `probe.estimator: tokens` {with_tokens}" if with_tokens != default else ""
        yield f"{prefix}{name}", (values, default, field.description or "")


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in _members(part)]
    return [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _listed(annotation: Any) -> bool:
    return any(get_origin(kind) in (list, dict) for kind in _members(annotation))


def _values(annotation: Any) -> str:
    named = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): ""}
    found: list[str] = []
    for kind in _members(annotation):
        if get_origin(kind) is Literal:
            found += [f"`{value}`" for value in get_args(kind)]
        elif get_origin(kind) in (list, dict, tuple):
            found.append("list" if get_origin(kind) in (list, tuple) else "mapping")
        elif kind in named:
            found.append(named[kind])
        elif _is_section(kind):
            found.append("a section")
        else:
            found.append("any")
    return ", ".join(dict.fromkeys(word for word in found if word))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _shown(field.get_default(call_default_factory=True))


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
