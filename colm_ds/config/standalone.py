"""The `"colm"` section where there is no DeepSpeed configuration around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colm_ds.config.colm import ColmConfig, resolve_config
from colm_ds.errors import ConfigError


def selection_config(config: ColmConfig | Mapping[str, Any], num_processes: int = 1) -> ColmConfig:
    """Check the `"colm"` section outside a DeepSpeed configuration.

    Args:
        config: keys and values; a `ColmConfig` with `coreset_size` filled in passes through.
        num_processes: W.

    Raises:
        ConfigError: listing every problem.
    """
    if isinstance(config, ColmConfig) and config.coreset_size is not None:
        return config
    section = config.model_dump(exclude_unset=True) if isinstance(config, ColmConfig) else dict(config)
    if section.get("replay", "off") not in ("off", "auto", False):
        raise ConfigError(f"colm.replay = {section['replay']!r}: needs the step of colm_ds.initialize. Remove it.")
    if section.get("variance_every"):
        what = "is measured in the step of colm_ds.initialize"
        raise ConfigError(f"colm.variance_every = {section['variance_every']}: {what}. Call gradient_variance instead.")
    section["replay"] = "off"  # nobody would train from the states
    try:
        return resolve_config({"colm": section}, num_processes).colm
    except ConfigError as error:
        raise ConfigError(str(error).replace("the DeepSpeed configuration", "the colm configuration")) from None
