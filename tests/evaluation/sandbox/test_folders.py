"""A folder is removed whatever is in it, and nothing beside it is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from colm_ds.evaluation.sandbox.folders import remove_folder


def fill(folder: Path) -> None:
    """Put in what stops a plain removal: depth, long paths, modes, links, names that are no text."""
    folder.mkdir()
    (folder / "link").symlink_to(folder.parent / "kept")
    (folder / "dangling").symlink_to(folder.parent / "nothing")
    (folder / "in_a_circle").symlink_to(folder)
    for name in (b"\xff\xfe", b"new\nline", b"x" * 255):
        os.mkdir(os.path.join(os.fsencode(folder), name))
    os.mkfifo(folder / "pipe")
    for mode in (0o300, 0o500, 0o000):
        inner = folder / f"mode{mode}"
        inner.mkdir()
        (inner / "below").mkdir()
        (inner / "below" / "file").write_text("x")
        (inner / "below").chmod(mode)
        inner.chmod(mode)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("n" * 20, dir_fd=here)
        below = os.open("n" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    folder.chmod(0)


def test_everything_goes_and_links_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    kept.chmod(0o750)
    fill(tmp_path / "folder")
    assert remove_folder(str(tmp_path / "folder"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "mine"
    assert kept.stat().st_mode & 0o777 == 0o750


def test_a_link_in_its_place_is_left(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert not remove_folder(str(tmp_path / "link"))
    assert (tmp_path / "kept").is_dir()


def test_what_is_not_there_is_gone(tmp_path: Path) -> None:
    assert remove_folder(str(tmp_path / "nothing"))


def test_what_cannot_be_removed_is_said_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a file that another user made immutable."""
    folder = tmp_path / "folder"
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.txt").write_text("x")
    plain = os.unlink

    def unlink(name: str, *, dir_fd: int) -> None:
        if name == "b.txt":
            raise PermissionError(name)
        plain(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    assert not remove_folder(str(folder))
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["b"]
