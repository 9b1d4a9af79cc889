"""Read a JSON object that may be missing or broken, and put a file in place whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from colm_ds.errors import ConfigError
from colm_ds.untrusted.json_text import read_json
from colm_ds.untrusted.printable import escaped


def read_object(path: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing or broken.

    Args:
        path: the file.
        problems: gets a sentence if the file exists and does not hold one JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = read_json(path, errors="replace")
    except (ValueError, OSError):
        problem = f"{path.name} cannot be read as JSON."
    else:
        if isinstance(content, dict):
            return content
        problem = f"{path.name} is not one JSON object."
    if problems is not None:
        problems.append(problem)
    return {}


def check_can_write(path: Path, option: str = "--out") -> None:
    """Make the folder of a file that is to be written after hours of work.

    Raises:
        ConfigError: if it cannot be made or written to, or the file is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}. Name another file.") from None


@contextmanager
def replacing(path: Path, mode: str = "w", *, sync: bool = True, **options: Any) -> Iterator[IO[Any]]:
    """Open a file beside `path` that takes its place when the block ends without an error.

    Whatever ends the process, `path` holds either all of the new content or what it held before.

    Args:
        path: the file.
        mode: "w" for UTF-8 text with line ends as they are given, "wb" for bytes.
        sync: let the content and the folder's entry reach the disk, so that they survive a crash of the machine.
        options: for `open`.

    Raises:
        OSError: if the file cannot be written; nothing of it is left.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    if "b" not in mode:
        options = {"encoding": "utf-8", "newline": "", **options}
    try:
        with aside.open(mode, **options) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    if sync:
        sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a file in one go, see `replacing`."""
    with replacing(path, "wb", sync=sync) as file:
        file.write(content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content)


def write_object(path: Path, content: Any, *, sync: bool = False) -> None:
    """Write an object as indented JSON in one go; what JSON does not know is written as text."""
    write_whole(path, escaped(json.dumps(content, indent=2, ensure_ascii=False, default=str)) + "\n", sync=sync)


def sync_folder(folder: Path) -> None:
    """Let a folder's entries reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
