"""Index files: a chosen part of a dataset, which a recipe trains on with `data.subset`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError
from colm_ds.run_folder.files import write_whole
from colm_ds.untrusted.json_text import parse_json


def write_subset(path: Path, indices: Sequence[int], digest: str, facts: Mapping[str, Any]) -> None:
    """Write an index file as JSON.

    Args:
        path: the file.
        indices: places in the dataset, in order of choice.
        digest: digest of the dataset that they were chosen from.
        facts: how they were chosen, for readers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**facts, "digest": digest, "indices": list(indices)}) + "\n")


def read_subset(path: str | Path, digest: str) -> list[int]:
    """Return the places of an index file, ascending.

    Args:
        path: the file.
        digest: digest of the dataset that they are to be taken from.

    Raises:
        ConfigError: if the file is no index file, or was made for other data.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
        indices, made_for = [int(index) for index in content["indices"]], content["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.subset = {path}: not an index file ({type(error).__name__}: {error}). Write it with colm-ds select."
        ) from None
    if made_for != digest:
        raise ConfigError(
            f"data.subset = {path}: was chosen from other data, or tokenised or held out otherwise. "
            "Choose again with colm-ds select and this recipe."
        )
    return sorted(indices)
