"""Losses under a reference model by dataset index: a table that is written once and read by `rho_loss`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colm_ds.checkpoints.tensors_only import load_tensors
from colm_ds.errors import ConfigError
from colm_ds.run_folder.files import replacing

KEYS = ("losses", "digest", "made_by")


def write_reference_losses(path: Path, losses: Tensor, digest: str, made_by: dict[str, Any]) -> None:
    """Write a table.

    Args:
        path: the file.
        losses: mean token loss of every example in nats, float32 `[N]`; NaN where unknown.
        digest: digest of the dataset.
        made_by: model and recipe, for readers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        torch.save({"losses": losses.float(), "digest": digest, "made_by": json.dumps(made_by)}, file)


def read_table(path: str | Path) -> dict[str, Any]:
    """Return a table's `losses`, `digest` and `made_by`.

    Raises:
        ConfigError: if the file is missing or not such a table.
    """
    if not Path(path).is_file():
        raise ConfigError(f"colm.options.table = {path}: no such file. Write it with colm-ds score.")
    try:
        table = load_tensors(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"colm.options.table = {path}: not readable: {error}. Write it with colm-ds score.") from None
    losses = table.get("losses") if isinstance(table, dict) and set(KEYS) <= set(table) else None
    if not (isinstance(losses, Tensor) and losses.dim() == 1 and losses.dtype == torch.float32):
        raise ConfigError(f"colm.options.table = {path}: not a table of losses. Write it with colm-ds score.")
    return table


def read_reference_losses(path: str | Path, num_examples: int) -> Tensor:
    """Return the losses of a table, float32 `[N]`.

    Args:
        path: the file.
        num_examples: N of the training data.

    Raises:
        ConfigError: if the file is missing, not such a table, or of another number of examples.
    """
    losses: Tensor = read_table(path)["losses"]
    if len(losses) != num_examples:
        raise ConfigError(
            f"colm.options.table = {path}: losses of {len(losses)} examples, the training data has {num_examples}. "
            "Write another with colm-ds score and this recipe."
        )
    return losses
