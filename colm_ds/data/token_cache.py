"""Cache arrays on disk under a key of what they were made from; half-written or damaged entries are never used."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from colm_ds.untrusted.json_text import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, np.ndarray]
Check = Callable[[Arrays, dict[str, Any]], bool]
_META = "meta.json"
_MOST_HEADER_BYTES = 1 << 12
_UNFINISHED = re.compile(r"\.[0-9a-f]+\.[0-9a-f]{32}")
_ABANDONED_S = 86400
_log = logging.getLogger(__name__)


def cache_key(facts: Mapping[str, Any]) -> str:
    """Return the name of the cache entry made from these facts: 24 hex digits of the hash of their JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def describe_files(files: Sequence[Path]) -> list[list[Any]]:
    """Return name, size in bytes and content hash of each file: what a key must depend on.

    Times and folders are left out: a copied or touched file with the same content is the same data.
    """
    return [[file.name, file.stat().st_size, _hash_file(file)] for file in files]


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in a tokenizer that affects ids, wherever it was loaded from."""
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "eos": tokenizer.eos_token_id,
        "probe": tokenizer("a b\n1", verbose=False)["input_ids"],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        serialised = json.loads(backend.to_str())
        # truncation and padding are left over from the last call, not part of the tokenizer
        facts["backend"] = {key: value for key, value in serialised.items() if key not in ("truncation", "padding")}
    else:
        facts["vocabulary"] = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def load_arrays(
    cache_dir: Path, key: str, dtypes: Mapping[str, str], is_valid: Check
) -> tuple[Arrays, dict[str, Any]] | None:
    """Open a cache entry.

    Args:
        cache_dir: folder of all entries.
        key: name of the entry.
        dtypes: the expected one-dimensional arrays and their dtypes.
        is_valid: whether readable arrays and facts are consistent.

    Returns:
        The arrays, memory-mapped read-only, and the facts stored with them; None if there is no such entry or it is
        damaged (which is logged).
    """
    folder = cache_dir / key
    if not folder.is_dir():
        return None
    try:
        meta = read_json(folder / _META)
        arrays: Arrays = {}
        for name, dtype in dtypes.items():
            size = int(meta["sizes"][name])
            file = folder / f"{name}.npy"
            if not size and file.stat().st_size > _MOST_HEADER_BYTES:
                raise ValueError(f"{name}.npy is not empty")
            array = np.load(file, mmap_mode="r" if size else None, allow_pickle=False)
            if array.dtype != np.dtype(dtype) or array.shape != (size,):
                raise ValueError(f"{name}.npy holds {array.dtype} {list(array.shape)}, not {dtype} [{size}]")
            arrays[name] = array
        facts = dict(meta["facts"])
        if not is_valid(arrays, facts):
            raise ValueError("its arrays contradict each other")
        return arrays, facts
    except Exception as error:  # numpy reads a header as Python, and fails on a damaged one in many ways
        _log.warning("cache entry %s is damaged (%s); building it again", folder, error)
        return None


def release_pages(array: np.ndarray) -> None:
    """Give back the memory that reading a memory-mapped array took; the file's pages are read again when needed.

    Args:
        array: a memory-mapped array or a view of one; others are left as they are.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class ArrayWriter:
    """Writes a cache entry piece by piece, so that its arrays need not fit into memory.

    Nobody sees the entry before `commit`, even if others write the same one meanwhile.

    Args:
        cache_dir: folder of all entries, made if missing.
        key: name of the entry.
        dtypes: of the one-dimensional arrays by name.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, cache_dir: Path, key: str, dtypes: Mapping[str, str]) -> None:
        self._cache_dir, self._key, self._dtypes = cache_dir, key, dict(dtypes)
        self._folder = cache_dir / f".{key}.{uuid.uuid4().hex}"
        self._folder.mkdir(parents=True)
        _remove_abandoned(cache_dir)
        self._sizes = dict.fromkeys(dtypes, 0)
        self._files: dict[str, BinaryIO] = {}

    def append(self, name: str, values: npt.ArrayLike) -> None:
        """Append values to an array.

        Raises:
            OSError: if the disk is full.
        """
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.npy").open("w+b")
            self._write_header(name)
        array = np.ascontiguousarray(values, dtype=self._dtypes[name])
        self._files[name].write(array.data)
        self._sizes[name] += array.size

    def commit(self, facts: Mapping[str, Any], is_valid: Check) -> None:
        """Give the entry its name.

        A valid entry of the same key is kept, because others may have it mapped; a damaged one is replaced.

        Args:
            facts: further JSON values to store.
            is_valid: as for `load_arrays`.

        Raises:
            OSError: if the disk is full or read-only.
        """
        for name in self._dtypes:
            self.append(name, [])
            self._files[name].seek(0)
            self._write_header(name)
            self._files[name].close()
        meta = {"sizes": self._sizes, "facts": dict(facts)}
        (self._folder / _META).write_text(json.dumps(meta), encoding="utf-8")
        while not _rename(self._folder, self._cache_dir / self._key):
            if load_arrays(self._cache_dir, self._key, self._dtypes, is_valid) is not None:
                return
            _remove(self._cache_dir / self._key)

    def close(self) -> None:
        """Remove what was not committed."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk, where what is left in a buffer cannot be written
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_header(self, name: str) -> None:
        """Write the header of an array of its present size; numpy leaves room for any."""
        header = {"descr": np.dtype(self._dtypes[name]).str, "fortran_order": False, "shape": (self._sizes[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what killed processes left half-written, a day ago or more."""
    for left in cache_dir.iterdir():
        if _UNFINISHED.fullmatch(left.name):
            with suppress(OSError):  # another process removes it too
                newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
                if time.time() - newest > _ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)


def store_arrays(
    cache_dir: Path, key: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], is_valid: Check
) -> None:
    """Write a cache entry in one go; see `ArrayWriter`.

    A full or read-only disk loses the cache entry (which is logged), not the run.

    Args:
        cache_dir: folder of all entries, made if missing.
        key: name of the entry.
        arrays: one-dimensional arrays by name.
        facts: further JSON values to store.
        is_valid: as for `load_arrays`.
    """
    writer = None
    try:
        writer = ArrayWriter(cache_dir, key, {name: str(array.dtype) for name, array in arrays.items()})
        for name, array in arrays.items():
            writer.append(name, array)
        writer.commit(facts, is_valid)
    except OSError as error:
        log_uncached(cache_dir, error)
    finally:
        if writer is not None:
            writer.close()


def log_uncached(cache_dir: Path, error: OSError) -> None:
    """Log that nothing could be written to the cache."""
    _log.warning("an entry could not be cached in %s (%s); continuing without a cache", cache_dir, error)


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder; return False if the target exists."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def _remove(folder: Path) -> None:
    """Rename a damaged entry in one step, then delete it."""
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        os.rename(folder, gone)
    except FileNotFoundError:  # another writer was faster
        return
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink()
