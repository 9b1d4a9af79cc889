"""Find the file of a named set of records: in a folder that holds several, or where it is said to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from colm_ds.data.formats import SUFFIXES


@dataclass(frozen=True)
class DataPlaces:
    """Places of evaluation sets.

    Attributes:
        folder: folder with the sets, like shared/data; None if not given.
        named: places of single sets by name: a file, a folder or `hub:NAME[:CONFIG[:SPLIT]]`.
    """

    folder: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)


def find_set(name: str, subpaths: Sequence[str], places: DataPlaces) -> str | None:
    """Return the place of a set's records, or None.

    Args:
        name: name of the set.
        subpaths: possible paths in the folder, without suffix.
        places: places to search.
    """
    if name in places.named:
        return places.named[name]
    if places.folder is None:
        return None
    for subpath in subpaths:
        bare = Path(places.folder) / subpath
        if bare.is_dir():
            return str(bare)
        for suffix in SUFFIXES:
            if bare.with_name(bare.name + suffix).is_file():
                return str(bare.with_name(bare.name + suffix))
    return None
