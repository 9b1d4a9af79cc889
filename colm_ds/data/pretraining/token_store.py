"""Store documents' tokens on disk by source, to be read as chunks: parts written atomically, and a manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colm_ds.errors import DataError
from colm_ds.run_folder.files import write_whole
from colm_ds.untrusted.json_text import read_json

MANIFEST = "manifest.json"
PARTS = "parts"
TOKENIZER = "tokenizer"
TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)

MOST_BYTES = 1 << 30
"""Of a manifest, which has about a thousand for each part: enough for some terabytes of text."""

Segments = Mapping[tuple[str, str], npt.ArrayLike]


def token_dtype(vocabulary_size: int) -> str:
    """Return the smallest type that holds every token id: uint16 up to 65,536 of them, else uint32; little-endian."""
    return "<u2" if vocabulary_size <= 1 << 16 else "<u4"


def write_part(folder: Path, name: str, segments: Segments, dtype: str, facts: Mapping[str, Any]) -> None:
    """Write the tokens of one part: `NAME.bin`, and, last, `NAME.json`, which makes it valid.

    Args:
        folder: folder of the parts.
        name: name of this part.
        segments: tokens by split and source, concatenated documents, each with its end-of-sequence token.
        dtype: from `token_dtype`.
        facts: further values of the JSON file.
    """
    keys = sorted(segments)
    arrays = {key: np.asarray(segments[key], dtype=dtype) for key in keys}
    data = b"".join(arrays[key].tobytes() for key in keys)
    described = [{"split": split, "source": source, "tokens": len(arrays[split, source])} for split, source in keys]
    write_whole(folder / f"{name}.bin", data)
    meta = {"segments": described, "bytes": len(data), "checksum": checksum(data), **facts}
    write_whole(folder / f"{name}.json", (json.dumps(meta, ensure_ascii=False) + "\n").encode())


def read_part(folder: Path, name: str, *, verify: bool = False) -> dict[str, Any] | None:
    """Read the JSON file of a part; None if the part is not complete.

    Args:
        folder: folder of the parts.
        name: name of the part.
        verify: also read the tokens and compare their checksum.
    """
    try:
        meta = read_json(folder / f"{name}.json")
        path = folder / f"{name}.bin"
        if path.stat().st_size != meta["bytes"]:
            return None
        if verify and checksum(path.read_bytes()) != meta["checksum"]:
            return None
        return dict(meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checksum(data: bytes) -> str:
    """Return a hash of a part's tokens."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _check_manifest(manifest: Any) -> None:
    """Raise `ValueError` unless a manifest has what a store reads of it, each of its kind."""
    kinds: dict[str, type] = {"sources": dict, "parts": list, "dtype": str, "tokenizer": str, "vocabulary_size": int}
    if not isinstance(manifest, dict):
        raise ValueError("not an object")
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}")
    if manifest["dtype"] not in (token_dtype(0), token_dtype(1 << 20)):
        raise ValueError(f"dtype {manifest['dtype']!r} is not one of tokens")
    for part in manifest["parts"]:
        name = part.get("name") if isinstance(part, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"the name of a part is {name!r}")
        if not isinstance(part.get("checksum"), str):
            raise ValueError(f"part {name} has no checksum")
        segments = part.get("segments")
        if not isinstance(segments, list) or not all(_is_segment(each, manifest["sources"]) for each in segments):
            raise ValueError(f"part {name} has segments of no split, source or number of tokens")
        if part.get("bytes") != sum(each["tokens"] for each in segments) * np.dtype(manifest["dtype"]).itemsize:
            raise ValueError(f"part {name} has other bytes than its tokens")


def _is_segment(value: Any, sources: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict) or value.get("split") not in SPLITS or not isinstance(value.get("source"), str):
        return False
    tokens = value.get("tokens")
    return value["source"] in sources and isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0


class TokenStore:
    """A finished store, of which nothing but the manifest is held: a file is open while tokens are read from it.

    Attributes:
        folder: its folder.
        manifest: content of `manifest.json`.
        source_names: names of the sources, sorted.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a store and compare the sizes of its files with the manifest.

        Raises:
            DataError: if it is missing, unfinished or damaged.
        """
        self.folder = Path(folder)
        try:
            manifest = read_json(self.folder / MANIFEST, most_bytes=MOST_BYTES)
            _check_manifest(manifest)
        except FileNotFoundError:
            unfinished = (self.folder / PARTS).is_dir()
            why = "is not finished: run pretrain/prepare.py again" if unfinished else "holds no prepared data"
            raise DataError(
                f"{folder}: {why}. A store has a {MANIFEST}, written last by pretrain/prepare.py."
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}/{MANIFEST}: not readable: {error}. Prepare the data again.") from None
        self.manifest: dict[str, Any] = manifest
        self.source_names: tuple[str, ...] = tuple(sorted(manifest["sources"]))
        for part in manifest["parts"]:
            path = self._path(part["name"])
            size = path.stat().st_size if path.exists() else -1
            if size != part["bytes"]:
                state = "is missing" if size < 0 else f"has {size} bytes, not {part['bytes']}"
                raise DataError(f"{path}: {state}. Prepare the data again.")

    @cached_property
    def _segments(self) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
        """Per split and source: rows (tokens before this segment, part, place in the part), and a last one."""
        rows: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        totals: dict[tuple[str, str], int] = {}
        for number, part in enumerate(self.manifest["parts"]):
            place = 0
            for segment in part["segments"]:
                key = segment["split"], segment["source"]
                rows.setdefault(key, []).append((totals.get(key, 0), number, place))
                totals[key] = totals.get(key, 0) + segment["tokens"]
                place += segment["tokens"]
        return {key: np.array([*segments, (totals[key], -1, -1)], dtype=np.int64) for key, segments in rows.items()}

    @cached_property
    def digest(self) -> str:
        """Return a hash of all that training reads: parts' sizes and checksums, their segments, dtype and tokenizer.

        Stores with the same content have the same hash, whatever their folders and files are called.
        """
        facts = {key: self.manifest[key] for key in ("dtype", "tokenizer", "parts")}
        return checksum(json.dumps(facts, sort_keys=True).encode())

    def num_tokens(self, split: str, source: str) -> int:
        """Return the tokens of a source, end-of-sequence tokens included."""
        segments = self._segments.get((split, source))
        return 0 if segments is None else int(segments[-1, 0])

    def read(self, split: str, source: str, start: int, num_tokens: int) -> npt.NDArray[np.int64]:
        """Read tokens of a source from `start` on, int64 `[num_tokens]`, across the ends of documents and parts.

        Raises:
            IndexError: if there are fewer.
            DataError: if a file has become shorter.
        """
        if not 0 <= start <= self.num_tokens(split, source) - num_tokens:
            raise IndexError(f"tokens {start} to {start + num_tokens} of {source}: {self.num_tokens(split, source)}")
        rows = self._segments[split, source]
        row = int(np.searchsorted(rows[:, 0], start, side="right")) - 1
        pieces, wanted = [], num_tokens
        while wanted:
            before, part, place = rows[row]
            inside = start - int(before)
            size = min(wanted, int(rows[row + 1, 0]) - start)
            pieces.append(self._piece(int(part), int(place) + inside, size))
            start, wanted, row = start + size, wanted - size, row + 1
        return np.concatenate(pieces).astype(np.int64)

    def why_not_whole(self) -> str | None:
        """Read everything and compare it with the manifest; return what is wrong, or None."""
        for part in self.manifest["parts"]:
            if checksum(self._path(part["name"]).read_bytes()) != part["checksum"]:
                return f"{self._path(part['name'])}: is not what was written (checksum)"
        return None

    def _path(self, name: str) -> Path:
        return self.folder / PARTS / f"{name}.bin"

    def _piece(self, part: int, place: int, size: int) -> npt.NDArray[Any]:
        path, dtype = self._path(self.manifest["parts"][part]["name"]), np.dtype(self.manifest["dtype"])
        piece = np.fromfile(path, dtype, count=size, offset=place * dtype.itemsize)
        if len(piece) < size:
            raise DataError(f"{path}: has become shorter. Prepare the data again.")
        return piece
