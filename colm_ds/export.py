"""Writing what was trained in Hugging Face format, from any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from colm_ds.errors import CheckpointError


def gathered_state(model: Any, is_main: bool, *, trained_only: bool) -> dict[str, Tensor]:
    """Weights by name on the CPU, on rank 0; gathered one parameter at a time under ZeRO-3.

    Args:
        model: the module of a DeepSpeed engine; all ranks call this together.
        is_main: whether this rank keeps them; the others get an empty dictionary.
        trained_only: leave out parameters that were not trained.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    if is_main and not trained_only:
        persistent = model.state_dict().keys()
        state |= {name: value.detach().cpu() for name, value in model.named_buffers() if name in persistent}
    return state


def save_trained(engine: Any, tokenizer: Any, folder: Path, *, is_main: bool) -> Path:
    """Write `adapter/` for a LoRA run or `model/`, with the tokenizer; all ranks call it together.

    Args:
        engine: a `CoLMEngine` or DeepSpeed engine.
        tokenizer: saved beside the weights.
        folder: the run's folder.
        is_main: whether this rank writes.

    Returns:
        The folder that holds the weights.

    Raises:
        CheckpointError: if there is nothing to write.
    """
    model = engine.module
    is_adapter = hasattr(model, "peft_config")
    state = gathered_state(model, is_main, trained_only=is_adapter)
    target = folder / ("adapter" if is_adapter else "model")
    if is_main:
        if not state or any(value.numel() == 0 for value in state.values()):
            raise CheckpointError(f"{target}: no weights to write. Were any parameters trained?")
        tied = getattr(model, "_tied_weights_keys", None)
        if tied and not is_adapter and getattr(model.config, "tie_word_embeddings", False):
            state = _with_tied(model, state)
        model.save_pretrained(target, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(target)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return target


def _with_tied(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of tied weights that `named_parameters` gives once only, pointing to the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        known = next((state[name] for name in group if name in state), None)
        if known is not None:
            state |= dict.fromkeys(group, known)
    return state
