"""The manifest of a checkpoint, one file per rank: what was written, bounds on every number, a checksum of itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from colm_ds.run_folder.files import write_whole
from colm_ds.untrusted.json_text import read_json

_KEYS = {"step", "world_size", "files", "facts", "checksum"}
_MOST_RANKS, _MOST_STEPS, _MOST_BYTES = 1 << 20, 1 << 50, 1 << 60


@dataclass(frozen=True)
class Manifest:
    """The manifest that one rank wrote.

    Attributes:
        step: optimizer steps in the checkpoint, 0 or more.
        world_size: ranks that wrote it, 1 or more.
        files: size in bytes and CRC-32 of files, by path relative to the checkpoint.
        facts: further JSON values; rank 0's only.
    """

    step: int
    world_size: int
    files: dict[str, tuple[int, int]]
    facts: dict[str, Any]


def name_of(rank: int) -> str:
    """Return the file name of a rank's manifest."""
    return f"manifest_{rank:05d}.json"


def write_manifest(
    folder: Path, rank: int, *, step: int, world_size: int, files: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> None:
    """Write a rank's manifest whole, with a checksum of itself.

    Args:
        folder: the checkpoint.
        rank: whose.
        step: optimizer steps.
        world_size: ranks.
        files: size and CRC-32 by path relative to the folder.
        facts: JSON values; None for ranks other than 0.
    """
    content = {"step": step, "world_size": world_size, "files": files, **({} if facts is None else {"facts": facts})}
    write_whole(folder / name_of(rank), json.dumps(content | {"checksum": _checksum(json.loads(json.dumps(content)))}))


def read_manifest(folder: Path, rank: int) -> Manifest:
    """Read a rank's manifest; those of earlier versions have no checksum.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what was written, or not a manifest.
    """
    name, content = name_of(rank), read_json(folder / name_of(rank))
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not an object")
    if unknown := sorted(content.keys() - _KEYS):
        raise ValueError(f"{name} has the unknown key {unknown[0]!r}")
    if "checksum" in content and content.pop("checksum") != _checksum(content):
        raise ValueError(f"{name} is not what was written (CRC-32)")
    files = content.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{name}: files is {files!r}")
    for path, facts in files.items():
        _check_path(name, path)
        if not isinstance(facts, list) or len(facts) != 2:
            raise ValueError(f"{name}: {path} is {facts!r}, not [size, CRC-32]")
        _whole(name, f"size of {path}", facts[0], 0, _MOST_BYTES)
        _whole(name, f"CRC-32 of {path}", facts[1], 0, (1 << 32) - 1)
    own = content.get("facts", {})
    if not isinstance(own, dict) or (rank == 0 and "facts" not in content):
        raise ValueError(f"{name}: facts are missing")
    return Manifest(
        _whole(name, "step", content.get("step"), 0, _MOST_STEPS),
        _whole(name, "world_size", content.get("world_size"), 1, _MOST_RANKS),
        {path: (size, checksum) for path, (size, checksum) in files.items()},
        own,
    )


def _whole(name: str, key: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {key} is {value!r}, not a whole number of at least {least}")
    return value


def _check_path(name: str, path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise ValueError(f"{name}: {path!r} is not the path of a file in the checkpoint")


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())
