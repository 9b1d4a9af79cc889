"""Read trained weights from an engine or a checkpoint of any ZeRO stage, and write them in Hugging Face format."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from colm_ds.checkpoints.atomic import Checkpoint
from colm_ds.checkpoints.tensors_only import load_tensors, tensors_only
from colm_ds.errors import CheckpointError
from colm_ds.run_folder.contents import ADAPTER, MODEL


def gathered_state(model: Any, is_main: bool, *, trained_only: bool) -> dict[str, Tensor]:
    """Return weights by name on the CPU of rank 0, gathered one parameter at a time under ZeRO-3.

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
        OSError, SafetensorError: if it cannot be written, as on a full disk; nothing of it is left.
    """
    model = engine.module
    is_adapter = hasattr(model, "peft_config")
    state = gathered_state(model, is_main, trained_only=is_adapter)
    target = folder / (ADAPTER if is_adapter else MODEL)
    if is_main:
        if not state or any(value.numel() == 0 for value in state.values()):
            raise CheckpointError(f"{target}: no weights to write. Were any parameters trained?")
        tied = getattr(model, "_tied_weights_keys", None)
        if tied and not is_adapter and getattr(model.config, "tie_word_embeddings", False):
            state = with_tied(model, state)
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if is_adapter:
                model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
            else:
                save_model(model, partial, state)
            tokenizer.save_pretrained(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # half of it would only fill the disk
            raise
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return target


def save_model(model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face model with its generation configuration as it is.

    `save_pretrained` alone refuses generation configurations that it finds inconsistent, which published models have,
    and models read from GGUF files, whose weights are plain by then.

    Args:
        model: a `PreTrainedModel`.
        folder: destination; created.
        state: weights by name, if the model itself does not hold them.
    """
    from transformers import GenerationConfig

    model.hf_quantizer = None
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")


def checkpoint_tensors(
    checkpoint: Checkpoint, buffers: Collection[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained weights of a checkpoint one at a time on the CPU; needs no process group and no GPU.

    At stages 0 to 2 they are the weights that the model ran with; at stage 3 the optimizer's, in float32.

    Args:
        checkpoint: a whole checkpoint.
        buffers: names of buffers to yield as well.
        dtype: of floating-point tensors.

    Yields:
        Name and tensor, which shares no storage with others.

    Raises:
        CheckpointError: if the files cannot be read, or one of the tensors is missing.
    """
    path, trained = checkpoint.path, checkpoint.facts["trained"]
    try:
        state = _partitioned_state(path) if checkpoint.facts["stage"] == 3 else _module_state(path)
    except Exception as error:  # whatever DeepSpeed makes of files that do not fit together
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: its weights cannot be read: {reason}. Take another checkpoint.") from None
    names = [*trained, *buffers]
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} trained tensors are not in it, the first is {missing[0]}. "
            "Take another checkpoint."
        )
    for name in names:
        value = state.pop(name).contiguous()
        yield name, value.to(dtype if value.is_floating_point() else value.dtype, copy=True)


def _module_state(folder: Path) -> dict[str, Any]:
    """Read stages 0 to 2, where rank 0 wrote the whole model."""
    return dict(load_tensors(folder / "mp_rank_00_model_states.pt", mmap=True)["module"])


def _partitioned_state(folder: Path) -> dict[str, Any]:
    """Read stage 3, where every rank wrote its part; `contiguous()` on a returned weight assembles it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    quiet = io.StringIO()  # its progress bars
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), tensors_only():
        return dict(
            get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), folder.name, exclude_frozen_parameters=True, lazy_mode=True
            )
        )


def with_tied(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the names of tied weights, which `named_parameters` yields only once, pointing to the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        known = next((state[name] for name in group if name in state), None)
        if known is not None:
            state |= dict.fromkeys(group, known)
    return state
