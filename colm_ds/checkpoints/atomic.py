"""Atomic checkpoints: written aside, read back, then renamed; loading takes the newest one that is whole.

A folder of checkpoints holds `step_12/` and `latest`. A checkpoint has DeepSpeed's files, `colm.pt` (what is the same
on every rank), `colm_rank_00000.pt` (a rank's own), and `manifest_00000.json` with size and CRC-32 of the files that
the rank checked. While it is written its name begins with a dot; so does the name of one that is being deleted.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colm_ds.checkpoints.manifest import name_of, read_manifest, write_manifest
from colm_ds.checkpoints.tensors_only import load_tensors, tensors_only, why_not_tensors
from colm_ds.distributed.agreement import first_failure
from colm_ds.errors import CheckpointError
from colm_ds.run_folder.files import sync_folder, write_whole

logger = logging.getLogger(__name__)

LATEST = "latest"
SHARED = "colm.pt"

_PARTIAL, _TRASH, _UNIVERSAL = ".partial_", ".trash_", ".universal_"
_LATEST_UNIVERSAL = "latest_universal"
_BLOCK = 1 << 22

_STEP_NAME = re.compile(r"(global_)?step_?\d+$")
_IS_OF_ONE = re.compile(r"colm.*\.pt$|manifest_\d+\.json$|.*_(model|optim)_states\.pt$")
"""Names of checkpoints, as we and DeepSpeed write them, and of files in them."""


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint to resume from.

    Attributes:
        path: its folder.
        step: optimizer steps that it holds.
        world_size: ranks that wrote it.
        facts: JSON values that `save` wrote into the manifest.
        passed_over: newer ones that cannot be used, each with its reason.
    """

    path: Path
    step: int
    world_size: int
    facts: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def save(
    engine: Any,
    folder: Path,
    tag: str,
    *,
    step: int,
    shared: dict[str, Any],
    own: dict[str, Any],
    facts: dict[str, Any],
    keep_last: int | None = None,
    resumed_in: Path | None = None,
    save_latest: bool = True,
    exclude_frozen: bool = False,
) -> Path:
    """Write one checkpoint; all ranks call it together. If it fails, earlier checkpoints are untouched.

    A run that was resumed from an older checkpoint leaves the course of the newer ones in the same folder. They are
    removed once the new one is written, or the next resume would take them.

    Args:
        engine: the DeepSpeed engine.
        folder: folder of the run's checkpoints, on a file system that all ranks see.
        tag: name of this one; one of that name is replaced.
        step: optimizer steps so far.
        shared: state that is the same on all ranks; rank 0's is written.
        own: this rank's state.
        facts: JSON values for the manifest.
        keep_last: delete all but this many of the newest, and checkpoints of later steps, whatever wrote them.
        resumed_in: folder of the checkpoint that the run was resumed from; if it is this one, those of later steps go.
        save_latest: name it in the file `latest`.
        exclude_frozen: leave out parameters that are not trained.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if any could not write or did not read back what it wrote.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    target, partial = folder / tag, folder / f"{_PARTIAL}{tag}"
    failures: list[str] = []
    if rank == 0:
        with _noting(failures):
            _clean(folder)
            partial.mkdir(parents=True)
    _agree(target, failures)
    with _writes_noted(engine, failures):
        engine.save_checkpoint(
            str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=exclude_frozen
        )
    with _noting(failures):
        torch.save(own, partial / _own_name(rank))
        if rank == 0:
            _write_shared(shared, partial / SHARED)
    _agree(target, failures, partial)
    with _noting(failures):
        checked = {str(path.relative_to(partial)): _read_back(path) for path in _written(partial)[rank::world_size]}
        own_facts = facts if rank == 0 else None
        write_manifest(partial, rank, step=step, world_size=world_size, files=checked, facts=own_facts)
    _agree(target, failures, partial)
    if rank == 0:
        with _noting(failures):
            _put_in_place(partial, target)
            if save_latest:
                write_whole(folder / LATEST, tag)
            if keep_last is not None or (resumed_in is not None and resumed_in.resolve() == folder.resolve()):
                _remove_later(target, step)
            if keep_last is not None:
                _prune(target, keep_last)
    _agree(target, failures)
    return target


def check_tag(tag: str) -> None:
    """Raise a `CheckpointError` for the name of a checkpoint that is not that of a folder, or has a meaning already."""
    if tag == LATEST or tag.startswith(".") or Path(tag).name != tag:
        raise CheckpointError(
            f"tag = {tag!r}: names no checkpoint. Give the name of a folder: without {os.sep!r}, no dot first, and not "
            f"{LATEST!r}."
        )


def find(folder: Path, tag: str | None = None, *, repair: bool = False) -> Checkpoint | None:
    """Return the newest whole checkpoint of a folder, with every file read and compared with its manifest.

    Args:
        folder: folder of the run's checkpoints.
        tag: take this one and no other.
        repair: restore what a killed replacement moved aside; only for the run that owns the folder.

    Returns:
        None if the folder holds no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints but none of them, or not the one asked for, is whole.
    """
    if repair and folder.is_dir():
        _rescue(folder)
    candidates = _by_age(folder) if tag is None else [folder / tag]
    passed_over: list[str] = []
    for path in candidates:
        reason = why_not_whole(path)
        if reason is None:
            return describe(path, passed_over)
        passed_over.append(f"{path.name}: {reason}")
    if not passed_over:
        return None
    raise CheckpointError(
        f"{folder}: none of its checkpoints can be loaded.\n  "
        + "\n  ".join(passed_over)
        + "\n  Start a new run with overwrite=true or in another folder, or restore a copy of one."
    )


def describe(path: Path, passed_over: Sequence[str] = ()) -> Checkpoint:
    """Read the facts of a whole checkpoint from its manifest.

    Raises:
        CheckpointError: if it is not one.
    """
    try:
        first = read_manifest(path, 0)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}. Take another checkpoint.") from None
    return Checkpoint(path, first.step, first.world_size, first.facts, tuple(passed_over))


def why_not_whole(path: Path) -> str | None:
    """Return how a checkpoint's files differ from what was written; None if they do not."""
    if not path.is_dir():
        return "no such checkpoint"
    if not (path / name_of(0)).exists():
        return (
            "holds no state of colm_ds: it is not complete, or a plain DeepSpeed engine saved it "
            "(engine.deepspeed_engine.load_checkpoint continues from such weights)"
        )
    try:
        first = read_manifest(path, 0)
        files = dict(first.files)
        for rank in range(1, first.world_size):
            other = read_manifest(path, rank)
            if (other.step, other.world_size) != (first.step, first.world_size):
                return f"{name_of(rank)} is of step {other.step} and {other.world_size} ranks"
            files |= other.files
        for name, (size, checksum) in files.items():
            num_bytes = (path / name).stat().st_size
            if num_bytes != size:
                return f"{name} has {num_bytes} bytes, not {size}"
            if _checksum(path / name) != checksum:
                return f"{name} is not what was written (CRC-32)"
        names = {SHARED, *(_own_name(rank) for rank in range(first.world_size))}
        if missing := sorted(names - files.keys()):
            return f"{missing[0]} is not in its manifest"
        if not any(name.endswith("model_states.pt") for name in files):
            return "no weights are in its manifest"
        held = {str(file.relative_to(path)) for file in _written(path) if file.suffix == ".pt"}  # DeepSpeed looks for
        if extra := sorted(held - files.keys()):
            return f"{extra[0]} is not in its manifest"
        for name in files:
            if name.endswith(".pt") and (reason := why_not_tensors(path / name)) is not None:
                return reason
    except (OSError, ValueError) as error:
        return f"not readable: {error}"
    return None


def read_state(checkpoint: Checkpoint, rank: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the state given to `save`: the shared one, and this rank's own (None for a rank that did not exist).

    Raises:
        OSError: if a file cannot be read.
        ValueError: if one holds something else than tensors and plain values.
    """
    shared = load_tensors(checkpoint.path / SHARED)
    return shared, load_tensors(checkpoint.path / _own_name(rank)) if rank < checkpoint.world_size else None


def load(engine: Any, checkpoint: Checkpoint, **options: Any) -> None:
    """Restore a DeepSpeed engine; all ranks call it together. Other numbers of ranks go through the universal format.

    Args:
        engine: the DeepSpeed engine.
        checkpoint: from `find`, the same on every rank.
        options: further arguments of DeepSpeed's `load_checkpoint`.
    """
    folder, tag = checkpoint.path.parent, checkpoint.path.name
    resharded = checkpoint.world_size != dist.get_world_size() and engine.zero_optimization_stage() > 0
    if resharded:
        failures: list[str] = []
        if dist.get_rank() == 0:
            with _noting(failures):
                _make_universal(checkpoint.path, folder / f"{_UNIVERSAL}{tag}")
        _agree(checkpoint.path, failures, what="converted for another number of ranks")
        tag = f"{_UNIVERSAL}{tag}"
    engine._config.load_universal_checkpoint = resharded
    try:
        with tensors_only():
            path, _ = engine.load_checkpoint(str(folder), tag, **options)
    finally:
        engine._config.load_universal_checkpoint = False
    if path is None:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed found nothing to load there.")
    if resharded:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)
            (folder / _LATEST_UNIVERSAL).unlink(missing_ok=True)


def _written(partial: Path) -> list[Path]:
    """List a checkpoint's files in an order that all ranks share, without manifests, which may still be written."""
    return sorted(path for path in partial.rglob("*") if path.is_file() and "manifest_" not in path.name)


def _own_name(rank: int) -> str:
    return f"colm_rank_{rank:05d}.pt"


def _write_shared(shared: dict[str, Any], path: Path) -> None:
    """Write the shared state, in which only the caller's `client_state` may hold what cannot be written."""
    try:
        torch.save(shared, path)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"client_state cannot be written: {reason}. Give tensors, numbers, texts, and lists and dictionaries of "
            "them"
        ) from error


@contextmanager
def _noting(failures: list[str]) -> Iterator[None]:
    """Record errors of the block instead of leaving the other ranks waiting."""
    try:
        yield
    except (
        *(OSError, RuntimeError, ValueError, zipfile.BadZipFile, subprocess.SubprocessError),
        *(pickle.PicklingError, TypeError, AttributeError),  # of what cannot be pickled
    ) as error:
        failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")


@contextmanager
def _writes_noted(engine: Any, failures: list[str]) -> Iterator[None]:
    """Let DeepSpeed's writes fail without an exception: the other ranks wait in barriers behind them."""
    writer = engine.checkpoint_engine
    write: Callable[..., Any] = writer.save

    def noted(*args: Any, **kwargs: Any) -> None:
        with _noting(failures):
            write(*args, **kwargs)

    writer.save = noted
    engine._copy_recovery_script = lambda folder: None  # its copy of zero_to_fp32.py; `colm-ds export` does that here
    try:
        yield
    finally:
        del writer.save
        del engine._copy_recovery_script


def _agree(target: Path, failures: list[str], partial: Path | None = None, what: str = "saved") -> None:
    """Raise on every rank the error of any; remove what was written."""
    failure = first_failure(failures[0] if failures else None)
    if failure is None:
        return
    if partial is not None and dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    free = _free_mib(target.parent)
    raise CheckpointError(f"{target}: could not be {what}: {failure} ({free}). Earlier checkpoints are untouched.")


def _free_mib(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there"
    except OSError:
        return "the folder is gone"


def _read_back(path: Path) -> tuple[int, int]:
    """Return size and CRC-32 of a file as it is on disk; compare a torch file's parts with the checksums inside it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    if path.suffix == ".pt" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise OSError(f"{path.name}: {broken} did not read back as written")
    elif path.suffix == ".pt":
        raise OSError(f"{path.name} did not read back as a torch file")
    if path.suffix == ".pt" and (reason := why_not_tensors(path)) is not None:
        raise OSError(reason)  # it could never be loaded
    return path.stat().st_size, _checksum(path)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _put_in_place(partial: Path, target: Path) -> None:
    sync_folder(partial)
    old = target.with_name(f"{_TRASH}{target.name}")
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what a killed process left half-done."""
    if not folder.is_dir():
        return
    _rescue(folder)
    for prefix in (_PARTIAL, _TRASH, _UNIVERSAL):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def _rescue(folder: Path) -> None:
    """Restore what was moved aside for a replacement that was never finished."""
    for old in folder.glob(f"{_TRASH}*"):
        name = old.name.removeprefix(_TRASH)
        if not (folder / name).exists() and why_not_whole(old) is None:
            os.replace(old, folder / name)


def _by_age(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, the one with the most steps first; other folders are none."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    paths = [path for path in paths if _STEP_NAME.match(path.name) or _holds_files_of_one(path)]
    return sorted(paths, key=lambda path: (_steps(path), path.name), reverse=True)


def _holds_files_of_one(path: Path) -> bool:
    try:
        return any(map(_IS_OF_ONE.match, os.listdir(path)))
    except OSError:  # a folder of others, such as lost+found
        return False


def _steps(path: Path) -> int:
    """Return the steps that a checkpoint holds, by its name if the manifest cannot be read; -1 if neither says so."""
    try:
        return read_manifest(path, 0).step
    except (OSError, ValueError):
        number = re.search(r"(\d+)$", path.name)
        return int(number[1]) if number else -1


def _others(target: Path) -> list[Path]:
    """List what `save` wrote beside a checkpoint, damaged ones included, the one with the most steps first."""
    paths = [path for path in _by_age(target.parent) if path.name != target.name]
    return [path for path in paths if (path / SHARED).exists() or any(path.glob("manifest_*.json"))]


def _remove_later(target: Path, step: int) -> None:
    """Remove the checkpoints of later steps: the course that they are of was left before this one was written."""
    later = [path for path in _others(target) if _steps(path) > step]
    for path in later:
        _remove(path)
    if later:
        names = ", ".join(path.name for path in reversed(later))
        logger.warning("%s: removed %s: of later steps, which the run has left.", target, names)


def _prune(target: Path, keep_last: int) -> None:
    """Keep a checkpoint and the newest of the others, as many as are asked for."""
    for path in _others(target)[max(1, keep_last) - 1 :]:
        _remove(path)


def _remove(path: Path) -> None:
    trash = path.with_name(f"{_TRASH}{path.name}")
    (path / name_of(0)).unlink(missing_ok=True)  # from here on it is not a checkpoint any more
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _make_universal(source: Path, target: Path) -> None:
    """Convert to DeepSpeed's universal format, from which any number of ranks can load."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "colm_ds.checkpoints.to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise OSError(f"ds_to_universal ended with code {done.returncode}: {lines[-1]}")
