"""Whether a run replays the probe's forward: where it is asked for or pays, and its conditions hold."""

from __future__ import annotations

import torch

from colm_ds.config.colm import ColmConfig
from colm_ds.errors import ConfigError
from colm_ds.memory.meter import GIB, free_bytes
from colm_ds.models.architecture import Architecture
from colm_ds.probe.replay import ReplayStore, why_not_replay


def choose_replay(
    config: ColmConfig, architecture: Architecture, num_tokens: float, device: torch.device
) -> tuple[ReplayStore | None, str | None]:
    """The store for forward replay, or none; then why `replay: auto` came to nothing, if it did.

    Args:
        config: the `"colm"` section.
        architecture: parts of the model.
        num_tokens: of a rank's share of a large batch, about.
        device: where the states would be kept.

    Raises:
        ConfigError: if replay is asked for and can not be.
    """
    if config.replay == "off":
        return None, None
    offload = config.replay == "offload"
    reason = why_not_replay(architecture)
    if config.probe.dtype != "auto":
        reason = "the probe computes in another type than training (colm.probe.dtype)"
    if reason is None and not offload:
        size = next(architecture.last_layer.parameters()).element_size()
        needed = (len(architecture.layers) - 1) * num_tokens * architecture.hidden_size * size
        free = free_bytes(device)
        if needed > free / 2 and config.replay == "auto":
            reason = f"it needs about {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB are free"
    if reason is None:
        return ReplayStore(architecture, offload=offload, seed=config.seed), None
    if config.replay != "auto":
        raise ConfigError(f'colm.replay = {config.replay!r}: {reason}. Change that, or write "auto" or "off".')
    return None, reason
