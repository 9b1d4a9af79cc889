"""The trained matrices with a row for each token: the input embeddings and the output head, often one weight.

An example's gradient of the embeddings is the sum over its tokens of e(x_t) delta_t^T, delta at their output; that of
the head the sum over its labels of s_t (softmax - e(y_t)) h_t^T, h the hidden state and s the slope of the loss there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.models.architecture import find_embeddings, find_head
from colm_ds.models.token_loss import chunk_size


@dataclass(frozen=True)
class TokenMatrix:
    """A trained weight `[tokens, hidden]`.

    Attributes:
        embedding: the input embeddings' module, if it is theirs.
        head: the head's linear module, if it is the head's: both, if they are tied.
        num_tokens: its rows.
        hidden: its columns.
        scale: number that the embeddings' module multiplies its rows with.
        padding: token id whose row of the embeddings gets no gradient; -1: none.
    """

    embedding: nn.Module | None
    head: nn.Module | None
    num_tokens: int
    hidden: int
    scale: float = 1.0
    padding: int = -1

    @property
    def modules(self) -> list[nn.Module]:
        """Return its one or two modules."""
        return [module for module in (self.embedding, self.head) if module is not None]

    @property
    def name(self) -> str:
        """Whose weight it is, in words."""
        if self.embedding is not None and self.head is not None:
            return "embeddings and head (tied)"
        return "head" if self.embedding is None else "input embeddings"

    def size(self, side: int) -> int:
        """Return the number of entries of a sketch of this side."""
        return min(self.num_tokens, side) * min(self.hidden, side)


def trained_token_matrices(model: nn.Module) -> list[TokenMatrix]:
    """Return the token matrices that are trained whole, embeddings first: none, one, or two if they are not tied.

    Adapters of one are left out, and modules of other kinds, such as embeddings that are more than scaled rows.

    Args:
        model: any model, also in a `PeftModel`.
    """
    embedding = _whole(find_embeddings(model), nn.Embedding)
    head = _whole(find_head(model), nn.Linear)
    scale = None if embedding is None else _scale(embedding)
    tied = embedding is not None and head is not None and embedding.weight is head.weight
    if tied and scale is None:  # what comes from the head alone is not its gradient
        return []
    found = []
    if embedding is not None and scale is not None:
        padding = -1 if embedding.padding_idx is None else int(embedding.padding_idx)  # type: ignore[arg-type]
        found.append(TokenMatrix(embedding, head if tied else None, *_shape(embedding), scale, padding))
    if head is not None and not tied:
        found.append(TokenMatrix(None, head, *_shape(head)))
    return found


def _scale(embedding: nn.Module) -> float | None:
    """Return what embeddings multiply their rows with: 1, or their `embed_scale`; None if they do something else."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).to(weight)
    ids = torch.arange(min(4, len(weight)), device=weight.device)
    with torch.no_grad():
        output = embedding(ids)
        is_scaled = scale.numel() == 1 and output.shape == weight[ids].shape
        return float(scale) if is_scaled and torch.allclose(output, weight[ids] * scale) else None


def _whole(module: Any, kind: type[nn.Module]) -> nn.Module | None:
    """Return the only trained module of a kind in a module, and nothing if more in it is trained."""
    if not isinstance(module, nn.Module):
        return None
    trained = [each for each in module.modules() if any(p.requires_grad for p in each.parameters(recurse=False))]
    if len(trained) != 1 or not isinstance(trained[0], kind) or not trained[0].weight.requires_grad:
        return None
    return trained[0]


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)


class HeadStates:
    """Keeps the hidden states that a loss head saw at the labels, without a graph, `[labels, hidden]`."""

    def __init__(self, micro: MicroBatch) -> None:
        """Prepare for the labels of a micro-batch."""
        self._micro = micro
        self.states: Tensor | None = None

    @contextmanager
    def kept(self, head: nn.Module) -> Iterator[None]:
        """Keep what the head sees in the block."""

        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.states = inputs[0].detach()[self._micro.rows, self._micro.positions]

        handle = head.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def add_head_gradients(
    part: Tensor,
    head: nn.Module,
    states: Tensor,
    targets: Tensor,
    slopes: Tensor,
    owners: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> None:
    """Add the sketches of the head's gradients, from the hidden states at the labels; logits are computed in chunks.

    Args:
        part: destination, `[examples, numbers]`.
        head: the head.
        states: from `HeadStates`, `[labels, hidden]`.
        targets: the labels, int64 `[labels]`.
        slopes: gradient of what is differentiated with respect to each label's loss, `[labels]`.
        owners: example of every label, int64 `[labels]`.
        left: P, `[tokens, side]`; None: the identity.
        right: Q, `[hidden, side]`; None: the identity.
    """
    dtype, size = part.dtype, chunk_size(int(head.weight.shape[0]))  # type: ignore[index]
    chunks = zip(*(each.split(size) for each in (states, targets, slopes, owners)), strict=True)
    weight: Tensor = head.weight  # type: ignore[assignment]
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        for hidden, target, slope, owner in chunks:
            chances = functional.linear(hidden.to(weight.dtype), weight, head.bias).to(dtype).softmax(dim=1)  # type: ignore[arg-type]
            chances[torch.arange(len(target), device=target.device), target] -= 1.0
            chances *= slope.to(dtype)[:, None]
            rows = chances if left is None else chances @ left
            columns = hidden.to(dtype) if right is None else hidden.to(dtype) @ right
            part.index_add_(0, owner, (rows[:, :, None] * columns[:, None, :]).flatten(1))
