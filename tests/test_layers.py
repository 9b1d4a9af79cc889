"""The package keeps its shape: floors, circles, file names, and calls that are not allowed (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import colm_ds
from tests.structure import FACE, PLAN, Structure, circles, imported_names, read_floors, room_of

# No numpy, deepspeed or transformers: selection/ can be read, tested and reused with torch alone.
SELECTION_MAY_IMPORT = sys.stdlib_module_names | {
    "torch",
    *(f"colm_ds.{name}" for name in ("selection", "errors", "types", "randomness")),
}

VAGUE_NAMES = {"utils", "helpers", "misc", "common"}
ON_THE_ROOT = {"__init__.py", "errors.py", "types.py", "randomness.py", "cli.py", "py.typed"}
SKIPPED_FOLDERS = {"runs", "build", "dist", "__pycache__"}

GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "numpy.random.seed",
    "random.seed",
}
SEEDS_THE_RUN = "colm_ds.randomness"
OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}


def selection_may_import(name: str) -> bool:
    """Whether a prefix of the dotted name is in `SELECTION_MAY_IMPORT`."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in SELECTION_MAY_IMPORT for end in range(1, len(parts) + 1))


def forbidden_calls(source: str, module: str) -> list[str]:
    """Uses of the global random state's seeds and of pickling collectives, one message each."""
    tree = ast.parse(source)
    full_name: dict[str, str] = {}  # local name -> dotted name it was imported as
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                full_name[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full_name[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    messages = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
        elif isinstance(node, ast.Name):
            dotted = node.id
        else:
            continue
        first, _, rest = dotted.partition(".")
        resolved = full_name.get(first, first) + (f".{rest}" if rest else "")
        if resolved in GLOBAL_SEEDS:
            messages.append(f"{module}:{node.lineno}: {resolved} sets the global random state. Use torch.Generator.")
        elif resolved.rsplit(".", 1)[-1] in OBJECT_COLLECTIVES:
            messages.append(f"{module}:{node.lineno}: {dotted} pickles and hides shapes. Use a tensor collective.")
    return messages


def python_files(root: Path) -> list[Path]:
    """Every Python file below `root`, without hidden folders and build or run outputs."""

    def skipped(path: Path) -> bool:
        folders = path.relative_to(root).parts[:-1]
        return any(name.startswith(".") or name in SKIPPED_FOLDERS or name.endswith(".egg-info") for name in folders)

    return sorted(path for path in root.rglob("*.py") if not skipped(path))


def report(messages: list[str]) -> None:
    """Fail with all messages, if there are any."""
    if messages:
        pytest.fail("\n".join(messages), pytrace=False)


@pytest.fixture(scope="module")
def structure(repo_root: Path) -> Structure:
    return Structure(repo_root)


@pytest.fixture(scope="module")
def floors(repo_root: Path) -> list[list[str]]:
    return read_floors((repo_root / PLAN).read_text(encoding="utf-8"))


def test_every_room_has_one_floor(structure: Structure, floors: list[list[str]]) -> None:
    planned = [room for floor in floors for room in floor]
    assert sorted([*planned, FACE]) == structure.rooms, f"rooms of colm_ds/ and floors in {PLAN} differ"


def test_no_import_climbs(structure: Structure, floors: list[list[str]]) -> None:
    assert len(structure.imports) > 500
    report([f"{one.importer}:{one.line}: imports {one.target}, which is higher" for one in structure.climbing(floors)])


def test_no_circle_between_files(structure: Structure) -> None:
    report([" <-> ".join(group) for group in circles(structure.between_files)])


def test_no_circle_between_folders(structure: Structure) -> None:
    report([" <-> ".join(group) for group in circles(structure.between_folders)])


def test_only_these_lie_on_the_root(repo_root: Path) -> None:
    assert {path.name for path in (repo_root / "colm_ds").iterdir() if path.is_file()} == ON_THE_ROOT


def test_nothing_imports_the_public_face(structure: Structure) -> None:
    report([f"{one.importer}:{one.line}: imports colm_ds" for one in structure.imports if one.target == "colm_ds"])


def test_a_class_name_has_one_meaning(structure: Structure) -> None:
    places: dict[str, list[str]] = {}
    for module, path in structure.files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    report([f"{name}: {', '.join(modules)}" for name, modules in places.items() if len(modules) > 1])


@pytest.mark.parametrize("old", colm_ds._MOVED)
def test_moved_modules_are_found_by_their_old_names(old: str) -> None:
    with pytest.warns(DeprecationWarning, match="is now"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(colm_ds._MOVED[old])
    assert found.__spec__ is not None
    assert found.__spec__.name == colm_ds._MOVED[old]


def test_tests_mirror_the_rooms(structure: Structure, repo_root: Path) -> None:
    """Folders of tests are rooms, or what lies beside the package."""
    beside = {path.name for path in repo_root.iterdir() if path.is_dir()} | {"golden", "gpu"}
    folders = {path.name for path in (repo_root / "tests").iterdir() if any(path.glob("*.py"))}
    report([f"tests/{name}: no such room" for name in sorted(folders - beside - set(structure.rooms))])


def test_selection_needs_torch_only(structure: Structure) -> None:
    messages = []
    for module, path in structure.files.items():
        if room_of(module) == "selection":
            names = imported_names(ast.parse(path.read_text(encoding="utf-8")), module, path.stem == "__init__")
            messages += [f"{module}:{line}: imports {n}" for line, n in names if not selection_may_import(n)]
    report(messages)


def test_no_global_seeds_and_no_object_collectives(structure: Structure) -> None:
    found = [
        forbidden_calls(path.read_text(encoding="utf-8"), name)
        for name, path in structure.files.items()
        if name != SEEDS_THE_RUN
    ]
    report([message for messages in found for message in messages])


def test_file_names_say_what_is_inside(repo_root: Path) -> None:
    vague = [
        path.relative_to(repo_root)
        for path in python_files(repo_root)
        if VAGUE_NAMES & {part.removesuffix(".py") for part in path.relative_to(repo_root).parts}
    ]
    report([f"{path}: name it after what it holds" for path in vague])


CLIMBS = {
    "a lower floor imports a higher one": {"a/one.py": "", "b/two.py": "from colm_ds.a import one"},
    "inside a function": {"a/one.py": "", "b/two.py": "def f():\n    import colm_ds.a.one"},
    "under TYPE_CHECKING": {"a/one.py": "X = 1", "b/two.py": "if TYPE_CHECKING:\n    from colm_ds.a.one import X"},
    "relative": {"a/one.py": "", "b/two.py": "from ..a import one"},
    "relative, in an __init__": {"a/one.py": "", "b/__init__.py": "from ..a.one import X", "b/two.py": ""},
}


@pytest.mark.parametrize("name", CLIMBS)
def test_climbing_is_found(name: str, tmp_path: Path) -> None:
    assert written(tmp_path, CLIMBS[name]).climbing([["b"], ["a"]])
    assert not Structure(tmp_path).climbing([["a"], ["b"]])


CIRCLES = {
    "files": ({"a/one.py": "from colm_ds.a import two", "a/two.py": "import colm_ds.a.one"}, 1, 0),
    "folders without a circle of files": (
        {"a/one.py": "import colm_ds.b.two", "b/two.py": "", "b/three.py": "import colm_ds.a.four", "a/four.py": ""},
        0,
        1,
    ),
    "a folder and one inside it": (
        {"a/one.py": "import colm_ds.a.b.two", "a/b/two.py": "", "a/b/three.py": "import colm_ds.a.four"}
        | {"a/four.py": ""},
        0,
        1,
    ),
    "none": ({"a/one.py": "import colm_ds.b.two", "b/two.py": "import torch"}, 0, 0),
}


@pytest.mark.parametrize("name", CIRCLES)
def test_circles_are_found(name: str, tmp_path: Path) -> None:
    sources, of_files, of_folders = CIRCLES[name]
    made = written(tmp_path, sources)
    assert (len(circles(made.between_files)), len(circles(made.between_folders))) == (of_files, of_folders)


def written(folder: Path, sources: dict[str, str]) -> Structure:
    """A package of these files."""
    for name, source in {"__init__.py": "", "a/__init__.py": "", "b/__init__.py": "", **sources}.items():
        path = folder / "colm_ds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return Structure(folder)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("math", True),
        ("torch.nn.functional", True),
        ("colm_ds.types.Coreset", True),
        ("numpy", False),
        ("transformers.AutoModel", False),
        ("colm_ds.config.colm", False),
    ],
)
def test_imports_of_selection(name: str, allowed: bool) -> None:
    assert selection_may_import(name) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.manual_seed(0)",
        "from torch import manual_seed as seed\nseed(0)",
        "import numpy as np\nnp.random.seed(0)",
        "from numpy import random\nrandom.seed(0)",
        "import torch.distributed as dist\ndist.all_gather_object(out, x)",
        "from deepspeed.comm import broadcast_object_list\nbroadcast_object_list(x)",
        "group().gather_object(x)",
    ],
)
def test_call_check_finds(source: str) -> None:
    assert forbidden_calls(source, "colm_ds.engine")


def test_call_check_allows_private_generators() -> None:
    source = "import torch\ngenerator = torch.Generator()\ngenerator.manual_seed(0)\ntorch.Generator().manual_seed(1)"
    assert forbidden_calls(source, "colm_ds.engine") == []
