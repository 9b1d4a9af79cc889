"""Parse JSON that others wrote; whatever is wrong with it is a `ValueError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
"""Levels of arrays and objects; far more than anything of ours has, and few enough for whoever walks through them."""

MAX_FILE_BYTES = 1 << 26


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is not JSON, nested more than `MAX_DEPTH` levels deep, or has a number too long.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:  # or it cannot be that deep
        check_depth(value)
    return value


def read_json(path: Path, errors: str = "strict") -> Any:
    """Return the value in a JSON file.

    Args:
        path: the file, in UTF-8.
        errors: for `bytes.decode`.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `parse_json`, or if the file has more than `MAX_FILE_BYTES`.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES >> 20} MiB")
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
