"""The package as rooms on floors: what imports what, and whether an import climbs or runs in a circle.

`python -m tests.structure [ROOT]` prints rooms, floors, arrows, circles and lines by folder; `tests/test_layers.py`
asserts what must hold. A *room* is a folder of `colm_ds/` or a module on its root; an *arrow* is one room that imports
another, anywhere in a file: inside functions and under `TYPE_CHECKING` too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "colm_ds"
PLAN = Path("docs/ARCHITECTURE.md")
"""Holds the floors in a block that begins with ```floors: one floor a line, the lowest first."""

FACE = "__init__"
"""The room of the package's own `__init__`, above all floors."""

Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        importer: dotted name of the importing module, `colm_ds.probe.spsa`.
        line: where.
        target: dotted name of the imported module.
    """

    importer: str
    line: int
    target: str


class Structure:
    """The package below a root folder.

    Attributes:
        files: path of every module by dotted name; a folder's `__init__` has the folder's name.
    """

    def __init__(self, root: Path) -> None:
        """Read the files.

        Args:
            root: folder that holds `colm_ds/`.
        """
        self.root = root
        self.files = {
            module_name(path, root): path
            for path in sorted((root / PACKAGE).rglob("*.py"))
            if "__pycache__" not in path.parts
        }

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of one module of the package by another."""
        found = []
        for module, path in self.files.items():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for line, name in imported_names(tree, module, path.stem == "__init__"):
                target = self._module_of(name)
                if target is not None and target != module:
                    found.append(Import(module, line, target))
        return found

    def _module_of(self, name: str) -> str | None:
        """The module that a dotted name lies in; None outside the package."""
        while name.split(".")[0] == PACKAGE:
            if name in self.files:
                return name
            name = name.rpartition(".")[0]
        return None

    @cached_property
    def between_files(self) -> Graph:
        """Which files a file imports; a folder's `__init__` counts only where it is named itself."""
        return graph((one.importer, one.target) for one in self.imports)

    @cached_property
    def between_folders(self) -> Graph:
        """Which folders a folder imports, at any depth; a folder inside another one is a folder of its own."""
        return graph((folder_of(one.importer, self.files), folder_of(one.target, self.files)) for one in self.imports)

    @cached_property
    def between_rooms(self) -> Graph:
        """Which rooms a room imports."""
        return graph((room_of(one.importer), room_of(one.target)) for one in self.imports)

    @property
    def rooms(self) -> list[str]:
        """All rooms."""
        return sorted({room_of(module) for module in self.files})

    def lines_by_room(self) -> dict[str, int]:
        """Lines of Python in every room."""
        lines: dict[str, int] = defaultdict(int)
        for module, path in self.files.items():
            lines[room_of(module)] += path.read_text(encoding="utf-8").count("\n")
        return dict(lines)

    def climbing(self, floors: list[list[str]]) -> list[Import]:
        """Imports from a floor to a higher one."""
        level = {room: number for number, names in enumerate([*floors, [FACE]]) for room in names}
        return [one for one in self.imports if level[room_of(one.target)] > level[room_of(one.importer)]]


def graph(pairs: Iterable[tuple[str, str]]) -> Graph:
    """Targets by source, without loops of one node."""
    found: Graph = defaultdict(set)
    for source, target in pairs:
        if source != target:
            found[source].add(target)
    return dict(found)


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file: `colm_ds/probe/spsa.py` is `colm_ds.probe.spsa`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Room of a module: "probe" for `colm_ds.probe.spsa`, `FACE` for `colm_ds` itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else FACE


def folder_of(module: str, files: Mapping[str, Path]) -> str:
    """Dotted name of the folder that a module lies in; a module on the root stands for itself."""
    is_folder = files[module].stem == "__init__"
    return module if is_folder or module.count(".") == 1 else module.rpartition(".")[0]


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, inside functions too.

    `from a import b` gives `a.b`, since b may be a module of a.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ups = node.level - is_package  # `from . import x` in a package's __init__ starts at the package
                package = module.split(".")[: len(module.split(".")) - ups]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def circles(edges: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected, of more than one node), by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def longest_chain(edges: Graph) -> int:
    """Nodes on the longest way down, each circle counted once: the floors that the imports make by themselves."""
    member = {node: group[0] for group in circles(edges) for node in group}
    condensed = graph((member.get(a, a), member.get(b, b)) for a, targets in edges.items() for b in targets)
    depth: dict[str, int] = {}

    def down(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((down(target) for target in condensed.get(node, ())), default=0)
        return depth[node]

    return max(map(down, condensed), default=0)


def read_floors(text: str) -> list[list[str]]:
    """Floors from the plan's text, the lowest first; each is a list of rooms."""
    block = re.search(r"```floors\n(.*?)```", text, re.DOTALL)
    if block is None:
        raise ValueError(f"{PLAN}: no block ```floors")
    return [line.split() for line in block[1].splitlines() if line.strip()]


def describe(structure: Structure) -> str:
    """What `python -m tests.structure` prints."""
    lines_by_room = structure.lines_by_room()
    on_root = [path.name for path in structure.files.values() if path.parent == structure.root / PACKAGE]
    arrows = sum(map(len, structure.between_rooms.values()))
    of_files, of_folders = circles(structure.between_files), circles(structure.between_folders)
    lines = [
        f"files {len(structure.files)}, on the root {len(on_root)}; rooms {len(structure.rooms)}; arrows {arrows}",
        f"floors that the imports make: {longest_chain(structure.between_rooms)}",
        f"circles between files: {len(of_files)}, between folders: {len(of_folders)}",
        *(f"  {' <-> '.join(group)}" for group in of_files + of_folders),
    ]
    plan = structure.root / PLAN
    if plan.exists() and "```floors" in plan.read_text(encoding="utf-8"):
        floors = read_floors(plan.read_text(encoding="utf-8"))
        climbing = structure.climbing(floors)
        lines.append(f"floors planned: {len(floors)}; imports that climb: {len(climbing)}")
        lines += [f"  {one.importer}:{one.line} imports {one.target}" for one in climbing]
    lines.append(f"lines {sum(lines_by_room.values())}")
    lines += [f"  {count:6d} {room}" for room, count in sorted(lines_by_room.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(Structure(Path(sys.argv[1] if len(sys.argv) > 1 else "."))))
