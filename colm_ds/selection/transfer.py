"""Copy tensors between CPU and device with few synchronisations: none to the device, one for everything back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device without synchronising; the tensor itself if it is there already."""
    return tensor.to(device, non_blocking=True)


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU, those of a GPU by one copy and synchronisation. CPU tensors are returned as they are.

    Args:
        tensors: of any shapes and types; the same object twice is copied once.
    """
    away = list({id(tensor): tensor for tensor in tensors if tensor.device.type != "cpu"}.values())
    if not away:
        return list(tensors)
    arrived = dict(zip(map(id, away), unpack(pack(away).cpu(), away), strict=True))
    return [arrived.get(id(tensor), tensor) for tensor in tensors]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return the concatenated bytes of tensors of one device, uint8 `[n]`."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in _widest_first(tensors)])


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that `pack` concatenated.

    Args:
        packed: uint8 `[n]`.
        like: tensors of the shapes and types that were packed, in their order.
    """
    tensors, start = {}, 0
    for tensor in _widest_first(like):
        size = tensor.numel() * tensor.element_size()
        tensors[id(tensor)] = packed[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += size
    return [tensors[id(tensor)] for tensor in like]


def _widest_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sort by size of the dtype, so that every part is aligned."""
    return sorted(tensors, key=lambda tensor: -tensor.element_size())
