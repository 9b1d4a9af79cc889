"""Report which requirements of colm_ds and of the packages that it imports are not met here.

python -m benchmarks.gpu.requirements            # of this environment
python -m benchmarks.gpu.requirements FOLDER     # of wheels, each by the others or by what a machine with PyTorch has
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

NEEDED = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "numpy",
    "pydantic",
    "pyyaml",
    "pytest",
    "pytest-timeout",
)
"""What the parts import themselves."""

WITH_TORCH = frozenset(
    (
        *("accelerate", "einops", "filelock", "fsspec", "huggingface-hub", "jinja2", "matplotlib", "msgpack", "ninja"),
        *("numpy", "packaging", "pandas", "peft", "psutil", "py-cpuinfo", "pyarrow", "pytest", "pytest-timeout"),
        *("pyyaml", "regex", "requests", "safetensors", "scipy", "tokenizers", "torch", "tqdm", "transformers"),
        "triton",
    )
)
"""What a machine with PyTorch and Hugging Face's libraries is taken to have, in a recent version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is missing; return 1 if anything is."""
    folders = sys.argv[1:] if arguments is None else list(arguments)
    missing = missing_of_wheels(folders[0]) if folders else missing_here(NEEDED)
    for line in missing:
        print(f"requirements: {line}")
    return 1 if missing else 0


def missing_here(names: Iterable[str]) -> list[str]:
    """Return what packages need that is not installed, or in another version, recursively."""
    missing: list[str] = []
    seen: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        try:
            distribution = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{wanted}: not installed")
            continue
        if not wanted.specifier.contains(distribution.version, prereleases=True):
            missing.append(f"{wanted}: {distribution.version} is installed")
        if wanted.name.lower() not in seen:
            seen.add(wanted.name.lower())
            waiting += [one for one in _active(distribution.requires or []) if wanted.name in ("deepspeed", "pydantic")]
    return sorted(set(missing))


def missing_of_wheels(folder: str | Path) -> list[str]:
    """Return what the wheels of a folder need that neither they nor a machine with PyTorch have."""
    packed: dict[str, tuple[Version, list[Requirement]]] = {}
    for wheel in sorted(Path(folder).glob("wheels*/*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
        packed[_plain(headers["Name"])] = Version(headers["Version"]), _active(headers.get_all("Requires-Dist") or [])
    missing = []
    for name, (_, needs) in packed.items():
        for wanted in needs:
            there = packed.get(_plain(wanted.name))
            if there is None and _plain(wanted.name) not in WITH_TORCH:
                missing.append(f"{name} needs {wanted}: neither packed nor expected")
            elif there is not None and not wanted.specifier.contains(there[0], prereleases=True):
                missing.append(f"{name} needs {wanted}: {there[0]} is packed")
    return missing


def _active(lines: Iterable[str]) -> list[Requirement]:
    """Return the requirements that hold on Linux without extras."""
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _plain(name: str) -> str:
    """Return a package's name as registries compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(main())
