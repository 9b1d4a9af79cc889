"""Divide a peak into its parts: the tensors held, by purpose, and those that a phase adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "communication",
    "activations",
    "replay",
    "probe",
    "selection",
    "rest",
)
"""Parts of a peak, in the order in which they are shown; communication: DeepSpeed's buckets of gradients."""

_DEPTH = 4  # maximum depth to which an optimizer's containers are searched


def storage_bytes(tensors: Any, device: torch.device | None = None, known: set[int] | None = None) -> int:
    """Sum the bytes of the storages behind some tensors, each once.

    Args:
        tensors: iterable of tensors.
        device: count only this type of device.
        known: storages counted elsewhere; those of the tensors are added to it.
    """
    known = set() if known is None else known
    total = 0
    for tensor in tensors:
        if device is not None and tensor.device.type != device.type:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() in known or storage.nbytes() == 0:
            continue
        known.add(storage.data_ptr())
        total += storage.nbytes()
    return total


def held_bytes(model: nn.Module, optimizer: Any, device: torch.device) -> dict[str, int]:
    """Return the bytes kept on a device: weights, gradients, optimizer (states, float32 copies), communication.

    Args:
        model: its parameters and buffers, under ZeRO-3 this rank's share.
        optimizer: a torch optimizer, or DeepSpeed's around one: its tensors are distinguished by name.
        device: tensors elsewhere (offload) are not counted.
    """
    known: set[int] = set()
    parameters = list(model.parameters())
    shares = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    held = {
        "weights": storage_bytes([*parameters, *model.buffers(), *shares], device, known),
        "gradients": storage_bytes([p.grad for p in parameters if p.grad is not None], device, known),
    }
    named = list(tensors_of(optimizer))
    for part, words in (
        ("communication", ("ipg", "bucket")),
        ("gradients", ("grad",)),
        ("optimizer", ("fp32", "state", "hp_", "master")),
    ):
        tensors = [tensor for name, tensor in named if any(word in name.lower() for word in words)]
        held[part] = held.get(part, 0) + storage_bytes(tensors, device, known)
    held["rest"] = storage_bytes([tensor for _, tensor in named], device, known)
    return held


def peak_parts(
    peak_phase: str, peak: int, phase_held: int, held: Mapping[str, int], *, replay: int, selection: int
) -> dict[str, int]:
    """Divide a peak into `PARTS`; they add up to it.

    Bytes that a phase adds count as the probe's in the phases of the choice, and as activations in training; `rest` is
    everything else: the batch, the optimizer's temporaries, and on a CPU the process itself.

    Args:
        peak_phase: phase of the peak.
        peak: its bytes.
        phase_held: bytes that were held when the phase began.
        held: from `held_bytes`.
        replay: hidden states kept in that phase.
        selection: history and directions.
    """
    is_choice = peak_phase in ("probe", "exchange", "select")
    kind = "probe" if is_choice else "activations" if peak_phase in ("train", "forward", "backward") else "rest"
    added = max(0, peak - phase_held) - (replay if is_choice else 0)  # the store fills while the probe runs
    parts = dict.fromkeys(PARTS, 0)
    parts |= {name: held.get(name, 0) for name in ("weights", "gradients", "optimizer", "communication")}
    parts |= {"replay": replay, "selection": selection}
    parts[kind] = max(0, added)
    parts["rest"] += peak - sum(parts.values())
    return parts


def tensors_of(holder: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in attributes and containers of an optimizer or an object of ours, with their dotted names."""
    if isinstance(holder, Tensor):
        yield name, holder
        if holder.grad is not None:
            yield f"{name}.grad", holder.grad
    elif depth > 0:
        if isinstance(holder, Mapping):
            items = list(holder.items())
        elif isinstance(holder, (list, tuple)):
            items = list(enumerate(holder))
        elif isinstance(holder, torch.optim.Optimizer):
            items = [("state", dict(holder.state)), ("param_groups", holder.param_groups)]
        elif type(holder).__module__.startswith(("deepspeed.", "colm_ds.")):
            items = [item for item in vars(holder).items() if not isinstance(item[1], nn.Module)]
        else:
            return
        for key, value in items:
            inner = name if isinstance(key, (Tensor, int)) else f"{name}.{key}"
            yield from tensors_of(value, inner, depth - 1)
