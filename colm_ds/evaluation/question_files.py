"""Locate evaluation sets, and draw a fixed part of their questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from colm_ds.batching.mixture import seeded_permutation
from colm_ds.data.sets import DataPlaces
from colm_ds.errors import ConfigError, nearest_key


def parse_places(values: Sequence[str], known: Iterable[str]) -> DataPlaces:
    """Parse the values of `--data`: at most one folder, and `NAME=PLACE` for single sets.

    Args:
        values: the words after `--data`.
        known: names of the sets.

    Raises:
        ConfigError: for a second folder, a missing folder or an unknown set.
    """
    folder, named, names = None, {}, list(known)
    for value in values:
        name, equals, place = value.partition("=")
        if equals and not Path(value).exists():
            if name not in names:
                raise ConfigError(f"--data {value}: no evaluation set is called {name!r}. {nearest_key(name, names)}")
            named[name] = place
        elif folder is not None:
            raise ConfigError(f"--data {value}: a second folder. Give one folder, and NAME=PLACE for single sets.")
        elif not Path(value).is_dir():
            raise ConfigError(f"--data {value}: no such folder. Give a folder, or NAME=PLACE for single sets.")
        else:
            folder = value
    return DataPlaces(folder, named)


def subset(groups: Sequence[str], limit: int | None, seed: int) -> list[int]:
    """Return the indices of a fixed part of the questions, in order.

    Args:
        groups: group of every question, `[n]`.
        limit: maximum questions of each group; None: all.
        seed: seed of the draw; a larger limit adds questions to those of a smaller one.
    """
    by_group: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        by_group.setdefault(group, []).append(place)
    chosen: list[int] = []
    for group, places in by_group.items():
        order = seeded_permutation(len(places), seed, "evaluation subset", group)
        chosen += [places[number] for number in (order if limit is None else order[:limit])]
    return sorted(chosen)


def fingerprint(questions: Iterable[Any]) -> str:
    """Return a short hash of the questions' content."""
    digest = hashlib.blake2b(digest_size=8)
    for question in questions:
        digest.update(repr(question).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
