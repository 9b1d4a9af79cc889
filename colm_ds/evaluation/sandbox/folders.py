"""Remove a folder whatever a program left in it; the sandbox's server loads this file by its path, as `kernel.py`."""

from __future__ import annotations

import contextlib
import os
import stat

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_folder(path: str) -> bool:
    """Remove a folder with all that is in it; never raises, and follows no link.

    One open folder and one name per level are kept, so that neither the depth nor the length of a path matters; modes
    that would stop the owner are opened first.

    Args:
        path: the folder; nothing else may be writing to it.

    Returns:
        Whether nothing of it is left.
    """
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
    try:
        here = os.open(path, _OPEN)
    except OSError:
        return not os.path.lexists(path)
    names: list[str] = []  # from `path` down to `here`
    stuck: list[set[str]] = [set()]  # by level: what cannot be removed
    try:
        while True:
            inner = _empty(here, stuck[-1])
            if inner is not None:
                below = _enter(here, inner)
                if below is None:
                    stuck[-1].add(inner)
                    continue
                os.close(here)
                here = below
                names.append(inner)
                stuck.append(set())
            elif names:
                above = os.open("..", _OPEN, dir_fd=here)
                os.close(here)
                here = above
                stuck.pop()
                with contextlib.suppress(OSError):
                    os.rmdir(names[-1], dir_fd=here)
                stuck[-1].add(names.pop())  # if it is still there
            else:
                break
    except OSError:
        pass  # the rest stays, and the answer says so
    finally:
        os.close(here)
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return not os.path.lexists(path)


def _empty(here: int, stuck: set[str]) -> str | None:
    """Remove the files and empty folders of an open folder; return the name of a folder that holds something."""
    full = None
    for name in os.listdir(here):
        if name in stuck:
            continue
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=here)
                continue
        except OSError:
            stuck.add(name)
            continue
        try:
            os.rmdir(name, dir_fd=here)
        except OSError:
            full = full or name
    return full


def _enter(here: int, name: str) -> int | None:
    """Open a folder in an open one, with a mode that lets its owner list and change it; None if that fails."""
    try:
        os.chmod(name, 0o700, dir_fd=here)
        return os.open(name, _OPEN, dir_fd=here)
    except OSError:
        return None
