"""A micro-batch on its way to the device: token ids and the places with a loss, found before the copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.data.collate import IGNORE_INDEX, pad_batch
from colm_ds.types import Example

PLACE_HOLDER = Example(torch.zeros(2, dtype=torch.int64), torch.tensor([IGNORE_INDEX, 0]), 0, -1)
"""What a rank computes, with weight 0, while others have one more micro-batch."""


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded examples. No mask is needed: causal attention never looks at padding to the right.

    Attributes:
        input_ids: int64 `[batch, length]`.
        rows: row of every labelled position, int64 `[num_labels]`.
        positions: where the hidden state predicts a label, int64 `[num_labels]`.
        targets: the labels, int64 `[num_labels]`.
        counts: labelled tokens of every row, float32 `[batch]`.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on the device; pinned and without waiting where the device is a GPU."""
        tensors = (self.input_ids, self.rows, self.positions, self.targets, self.counts)
        if device.type != "cuda":
            return MicroBatch(*(tensor.to(device) for tensor in tensors))
        return MicroBatch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))


def make_micro_batch(examples: Sequence[Example]) -> MicroBatch:
    """Pad examples and find their labelled positions, on the CPU; a place holder where there are none."""
    padded = pad_batch(list(examples) or [PLACE_HOLDER], pad_token_id=0)
    targets = padded["labels"][:, 1:]
    rows, positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(targets)).float()
    return MicroBatch(padded["input_ids"], rows, positions, targets[rows, positions], counts)
