"""Index files: a chosen part of a dataset, which a recipe trains on with `data.subset`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError
from colm_ds.run_folder.files import write_whole
from colm_ds.untrusted.json_text import read_json


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


def read_subset(path: str | Path, digest: str, num_examples: int) -> list[int]:
    """Return the places of an index file, ascending.

    Args:
        path: the file.
        digest: digest of the dataset that they are to be taken from.
        num_examples: its examples.

    Raises:
        ConfigError: if the file is no index file, or was made for other data.
    """
    try:
        content = read_json(Path(path))
        indices, made_for = content["indices"], content["digest"]
        if not isinstance(indices, list) or not indices:
            raise ValueError("indices is not a list of places")
        wrong = next((each for each in indices if type(each) is not int or not 0 <= each < num_examples), None)
        if wrong is not None and made_for == digest:
            raise ValueError(f"indices has {str(wrong)[:80]}, which is not a place of one of {num_examples} examples")
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
