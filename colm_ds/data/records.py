"""Read records from a file, a folder or the Hugging Face hub, and their values; errors name the record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from colm_ds.data.jsonl import PathLike, find_files, read_records
from colm_ds.data.token_cache import describe_files
from colm_ds.errors import DataError

HUB = "hub:"

Records = Iterable[tuple[str, dict[str, Any]]]


def find_places(paths: PathLike | Sequence[PathLike]) -> list[Path | str]:
    """Resolve files, folders and hub names, one or a list of them, to files and hub names.

    Raises:
        DataError: as `find_files`.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    places: list[Path | str] = [str(path) for path in given if str(path).startswith(HUB)]
    files = [path for path in given if not str(path).startswith(HUB)]
    return [*(find_files(files) if files or not places else []), *places]


def read_place(place: PathLike, split: str = "validation") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of one place, each with its name for messages.

    Args:
        place: a file, a folder of files, or `hub:NAME[:CONFIG[:SPLIT]]`.
        split: default split of a hub name.

    Raises:
        DataError: for files that cannot be read, or a hub name that cannot be loaded.
    """
    if str(place).startswith(HUB):
        yield from _read_hub(str(place), split)
        return
    for file in find_files(place):
        yield from read_records(file)


def describe_places(places: Sequence[Path | str], split: str = "validation") -> list[list[Any]]:
    """Describe the content of places from `find_places` for the key of a cache; a hub's rows are read for it."""
    contents: list[list[Any]] = []
    for place in places:
        if isinstance(place, Path):
            contents += describe_files([place])
            continue
        digest = hashlib.sha256()
        for _, record in read_place(place, split):
            digest.update(json.dumps(record, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
        contents.append([place, digest.hexdigest()])
    return contents


def _read_hub(place: str, default_split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, rest = place.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or default_split)
    except Exception as error:  # the library raises whatever its loaders raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{place}: cannot be loaded: {reason} Write hub:NAME:CONFIG:SPLIT, or give a file of your own."
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{place}[item {number}]", dict(row)


def text_of(where: str, record: Mapping[str, Any], *keys: str) -> str:
    """Return the text under the first of some keys that a record has.

    Raises:
        DataError: if it has none of them, or the value is neither text nor a number.
    """
    for key in keys:
        if record.get(key) is not None:
            value = record[key]
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                return str(value)
            raise DataError(f"{where}: {key!r} is of type {type(value).__name__}, not text. Write a string.")
    wanted = " or ".join(map(repr, keys))
    raise DataError(f"{where}: no key {wanted}. Add it; the record has {', '.join(map(repr, record)) or 'no keys'}.")


def label_of(where: str, record: Mapping[str, Any], labels: Mapping[Any, int], key: str = "label") -> int:
    """Return the index of the gold candidate, from a label that may be a number, true or false, or a word.

    Raises:
        DataError: if it is missing or unknown.
    """
    value = record.get(key)
    if not isinstance(value, (str, int)) or value not in labels:
        known = ", ".join(sorted({repr(label) for label in labels}))
        raise DataError(f"{where}: {key!r} is {value!r}. Write one of {known}.")
    return labels[value]
