"""Parse JSON that others wrote; whatever is wrong with it is a `ValueError`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
"""Levels of arrays and objects; far more than anything of ours has, and few enough for whoever walks through them."""

MAX_FILE_BYTES = 1 << 26


class DoubledKeyError(ValueError):
    """An object of a JSON text that has a key twice.

    Attributes:
        key: the key.
    """

    def __init__(self, key: str, lines: tuple[int, int] | None = None) -> None:
        """Compose the message; with the lines of both places if the text has several."""
        self.key = key
        shown = repr(key if len(key) <= _MOST_SHOWN else f"{key[:_MOST_SHOWN]}...")
        where = "" if lines is None else f", in line {lines[0]} and in line {lines[1]}"
        super().__init__(f"the key {shown} is there twice{where}")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        DoubledKeyError: if an object in it has a key twice.
        ValueError: if it is not JSON, nested more than `MAX_DEPTH` levels deep, or has a number too long.
    """
    try:
        value = _DECODER.decode(text)
    except DoubledKeyError as error:
        raise DoubledKeyError(error.key, _lines_of(error.key, text) if "\n" in text.strip() else None) from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:  # or it cannot be that deep
        check_depth(value)
    return value


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DoubledKeyError(doubled_key(pairs))
    return made


def doubled_key(pairs: list[tuple[str, Any]]) -> str:
    """Return the first key of an object's pairs that was there before."""
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of)
_MOST_SHOWN = 100
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\n]')


def _lines_of(key: str, text: str) -> tuple[int, int] | None:
    """Return the lines of the first two places of a key in one object, counted from 1."""
    line, firsts = 1, []
    for token in _TOKEN.finditer(text):
        if token[0] == "\n":
            line += 1
        elif token[0] == "{":
            firsts.append(0)
        elif token[0] == "}":
            firsts.pop()
        elif json.loads(token[0]) == key and text[token.end() :].lstrip()[:1] == ":":
            if firsts[-1]:
                return firsts[-1], line
            firsts[-1] = line
    return None


def read_json(path: Path, errors: str = "strict", *, most_bytes: int | None = None) -> Any:
    """Return the value in a JSON file.

    Args:
        path: the file, in UTF-8.
        errors: for `bytes.decode`.
        most_bytes: a larger file is not read; default: `MAX_FILE_BYTES`.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `parse_json`, or if the file has more than `most_bytes`.
    """
    with path.open("rb") as file:
        most = MAX_FILE_BYTES if most_bytes is None else most_bytes
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most >> 20} MiB")
    return parse_json(content.decode("utf-8", errors))


def check_depth(value: Any) -> None:
    """Raise `ValueError` if lists and mappings are nested more than `MAX_DEPTH` levels deep; does not recurse."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
