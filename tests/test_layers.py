"""The package keeps its shape: layers, file names, file lengths, and calls that are not allowed (DESIGN, section 5)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Modules and subpackages of colm_ds by layer; a layer imports itself and lower ones. "__init__" is the public face,
# which may import everything and which no module of ours imports.
LAYERS = (
    {"errors", "types", "seeds"},
    {"selection"},
    {"config", "deepspeed_config", "recipe", "recipe_choices", "families", "models", "probe", "distributed", "data"}
    | {"random_state", "known_models", "selection_config"},
    {"engine", "coreset_selector", "coreset_facts", "replay_choice", "training_loss", "accumulation"}
    | {"faults", "resume", "export", "checkpoint", "memory", "monitor", "evaluation"},
    {"tracking", "metrics_tail", "watch", "memory_arms", "report", "tasks", "run_start", "preview", "sweep", "training"}
    | {"coherence", "train_command", "pretraining_run", "cli", "export_run", "model_card", "integrations"},
    {"__init__", "__main__"},
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# No numpy, deepspeed or transformers: selection/ can be read, tested and reused with torch alone.
SELECTION_MAY_IMPORT = (
    sys.stdlib_module_names | {"torch", "colm_ds.selection"} | {f"colm_ds.{name}" for name in LAYERS[0]}
)

VAGUE_NAMES = {"utils", "helpers", "misc", "common"}
MAX_LINES = 400
SKIPPED_FOLDERS = {"runs", "build", "dist", "__pycache__"}

GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "numpy.random.seed",
    "random.seed",
}
OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}


def module_name(path: Path, package_parent: Path) -> str:
    """Dotted name of a file: `colm_ds/probe/spsa.py` is `colm_ds.probe.spsa`."""
    parts = path.relative_to(package_parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
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


def part_of_package(dotted: str) -> str:
    """Part of colm_ds behind a dotted name: "probe" for `colm_ds.probe.spsa`, "__init__" for `colm_ds.initialize`."""
    parts = dotted.split(".")
    if len(parts) == 1 or parts[1] not in LAYER_OF:
        return "__init__"
    return parts[1]


def layer_violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of one file of colm_ds that its layer does not allow, one message each."""
    top = module.split(".")[1] if "." in module else "__init__"
    if top not in LAYER_OF:
        return [f"{module}: {top!r} has no layer. Add it to LAYERS in tests/test_layers.py, in its layer."]
    messages = []
    for line, name in imported_modules(ast.parse(source), module, is_package):
        if name.split(".")[0] == "colm_ds" and LAYER_OF[part_of_package(name)] > LAYER_OF[top]:
            layers = f"layer {LAYER_OF[part_of_package(name)]} from layer {LAYER_OF[top]}"
            messages.append(f"{module}:{line}: imports {name} ({layers})")
        if top == "selection" and not selection_may_import(name):
            messages.append(f"{module}:{line}: imports {name}; allowed: the standard library, torch and layer 0")
    return messages


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


def package_sources(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Source text, module name and whether it is an `__init__`, for every file of colm_ds."""
    for path in python_files(root):
        if path.relative_to(root).parts[0] == "colm_ds":
            yield path.read_text(encoding="utf-8"), module_name(path, root), path.stem == "__init__"


def report(messages: list[str]) -> None:
    """Fail with all messages, if there are any."""
    if messages:
        pytest.fail("\n".join(messages), pytrace=False)


def test_lower_layers_never_import_higher_ones(repo_root: Path) -> None:
    sources = list(package_sources(repo_root))
    assert sources, "no files of colm_ds found"
    report([m for source, module, is_package in sources for m in layer_violations(source, module, is_package)])


def test_no_global_seeds_and_no_object_collectives(repo_root: Path) -> None:
    report([m for source, module, _ in package_sources(repo_root) for m in forbidden_calls(source, module)])


def test_file_names_say_what_is_inside(repo_root: Path) -> None:
    vague = [
        path.relative_to(repo_root)
        for path in python_files(repo_root)
        if VAGUE_NAMES & {part.removesuffix(".py") for part in path.relative_to(repo_root).parts}
    ]
    report([f"{path}: name it after what it holds" for path in vague])


def test_files_are_short(repo_root: Path) -> None:
    messages = []
    for path in python_files(repo_root):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_LINES:
            messages.append(f"{path.relative_to(repo_root)}: {num_lines} lines, more than {MAX_LINES}. Split it.")
    report(messages)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from colm_ds.engine import ColmEngine", "colm_ds.probe.spsa"),
        ("def f():\n    import colm_ds.report.html", "colm_ds.engine"),
        ("from colm_ds import initialize", "colm_ds.cli"),
        ("import colm_ds", "colm_ds.cli"),
        ("from colm_ds import engine", "colm_ds.config"),
        ("from ..config import Settings", "colm_ds.selection.sources"),
        ("from .. import config", "colm_ds.selection.sources"),
        ("import numpy as np", "colm_ds.selection.mask"),
        ("from transformers import AutoModel", "colm_ds.selection.mask"),
        ("import math", "colm_ds.surprise"),
    ],
)
def test_layer_check_finds(source: str, module: str) -> None:
    assert layer_violations(source, module)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from colm_ds.selection import coreset_quotas", "colm_ds.engine", False),
        ("from colm_ds import selection, types", "colm_ds.engine", False),
        ("from . import spsa\nfrom .exact import probe", "colm_ds.probe", True),
        ("from . import mask\nfrom ..types import Coreset", "colm_ds.selection.selectors", False),
        ("import torch.nn.functional as F\nfrom collections.abc import Sequence", "colm_ds.selection.mask", False),
        ("from colm_ds.cli import main", "colm_ds", True),
    ],
)
def test_layer_check_allows(source: str, module: str, is_package: bool) -> None:
    assert layer_violations(source, module, is_package) == []


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
