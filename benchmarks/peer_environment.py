"""Environments of other tools, whose packages want versions of their own; this file is imported inside them too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

UNFIT = ("torchvision", "torchaudio")
"""Packages that LLaMA-Factory brings, whose builds fail beside torch's for the CPU; nothing here is seen or heard."""

VARIABLES = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", "DISABLE_VERSION_CHECK": "1"}
VARIABLES |= {"TOKENIZERS_PARALLELISM": "false"}
"""Variables that the tools are run with."""


def make_environment(folder: Path, *installs: Sequence[str], without: Sequence[str] = ()) -> Path:
    """Return the interpreter of an environment, made where it is missing, by the interpreter that PYTHON names.

    Args:
        folder: the environment's.
        installs: words after `pip install`, one call after the other.
        without: packages to remove again.

    Raises:
        subprocess.CalledProcessError: if it cannot be made; the folder is then removed.
    """
    python = folder.resolve() / "bin" / "python"
    if python.exists():
        return python
    try:
        subprocess.run([os.environ.get("PYTHON", sys.executable), "-m", "venv", str(folder)], check=True)
        for words in installs:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)
        if without:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return python


def versions_in(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages in an interpreter's environment."""
    script = f"import importlib.metadata as m; print(*map(m.version, {tuple(names)}))"
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def stand_in_for_torchaudio() -> None:
    """Let LLaMA-Factory, which imports torchaudio, find an empty module."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    audio = ModuleType("torchaudio")
    audio.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
