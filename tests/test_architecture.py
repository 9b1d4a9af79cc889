"""docs/ARCHITECTURE.md names files and functions that exist, and a purpose for every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.structure import PLAN, Structure


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / PLAN).read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    """Functions and classes of a file, methods included, and names that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return defined | {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}


def test_stops_of_the_walks_exist(text: str, repo_root: Path) -> None:
    stops = re.findall(r"`([\w/]+\.py): (\w+)`", " ".join(text.split()))
    assert len(stops) > 30
    missing = []
    for file, name in stops:
        found = [path for path in (repo_root / "colm_ds" / file, repo_root / file) if path.exists()]
        if not found or name not in names_in(found[0]):
            missing.append(f"{file}: {name}")
    assert not missing


def test_files_and_folders_exist(text: str, repo_root: Path) -> None:
    for path in re.findall(r"`((?:[\w]+/)+(?:\w+\.\w+)?)`", text):
        assert (repo_root / path).exists() or (repo_root / "colm_ds" / path).exists(), path


def test_every_room_has_a_purpose(text: str, repo_root: Path) -> None:
    rows = "\n".join(line.partition("|")[2].partition("|")[0] for line in text.split("\n") if line.startswith("| `"))
    for room in Structure(repo_root).rooms:
        assert f"`{room}`" in rows or f"`{room}/`" in rows or room in ("__init__", "cli"), room
