"""Attention that takes documents apart as flash attention does in transformers, computed plainly on a CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "attention_by_documents"


def attention_by_documents() -> str:
    """Register it in this process, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """One document after the other where transformers would tell flash attention of several, else whole rows."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    assert attention_mask is None
    position_ids, ends = kwargs.get("position_ids"), [0, query.shape[2]]
    if position_ids is not None and _is_packed_sequence(position_ids, query.shape[0]):
        (starts, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
        ends = starts.tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(states[:, :, start:stop] for states in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for start, stop in pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
