"""Set up the monitors that a recipe names, as sections of DeepSpeed and as W&B's environment."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colm_ds.recipes.recipe import BaseRecipe


def monitor_sections(recipe: BaseRecipe, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's sections of the monitors that a recipe names.

    Args:
        recipe: recipe of the run.
        config: its DeepSpeed JSON, whose own sections take precedence.
    """
    folder = str(_folder(recipe))
    ours = {
        "tensorboard": {"output_path": folder, "job_name": "tensorboard"},
        "csv": {"output_path": folder, "job_name": "csv"},
        "wandb": {"project": os.environ.get("WANDB_PROJECT", "colm_ds")},
    }
    sections = {name: "csv_monitor" if name == "csv" else name for name in recipe.monitor}
    return {key: {"enabled": True, **ours[name], **config.get(key, {})} for name, key in sections.items()}


def set_environment(recipe: BaseRecipe) -> None:
    """Tell W&B a run's name, and for a resumed run its id, which is stored in the run's folder (rank 0)."""
    if "wandb" not in recipe.monitor:
        return
    folder = _folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "wandb_run_id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    run_id = kept.read_text(encoding="utf-8").strip()
    for key, value in {"NAME": recipe.name, "DIR": str(folder), "RUN_ID": run_id, "RESUME": "allow"}.items():
        os.environ.setdefault(f"WANDB_{key}", value)


def _folder(recipe: BaseRecipe) -> Path:
    return Path(recipe.output_dir) / "monitor"
