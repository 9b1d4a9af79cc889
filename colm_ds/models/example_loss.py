"""Compute losses of labelled tokens and of examples with a graph: logits at labelled positions only, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import CandidateGroups, MicroBatch
from colm_ds.models.architecture import find_head, unwrap
from colm_ds.models.families import FAMILIES
from colm_ds.models.patch import patched_forwards
from colm_ds.models.token_loss import sums_by_row, token_losses


def find_loss_head(model: nn.Module) -> nn.Module | None:
    """Return the head whose forward may be replaced by the loss, or None for models that process their logits further.

    Args:
        model: a Hugging Face causal LM, bare or in a `PeftModel`.
    """
    base: Any = unwrap(model)
    if getattr(getattr(base, "config", None), "model_type", None) in FAMILIES:
        head: nn.Module = base.get_output_embeddings()
        return head
    return find_head(base) if returns_head_output(base) else None


def returns_head_output(base: Any) -> bool:
    """Return whether the logits of a causal LM are its head's output as it is: not scaled, capped or masked.

    Its own forward is run around a decoder and a head that are replaced by given tensors, so no weight is used.

    Args:
        base: a Hugging Face model.
    """
    decoder, head = getattr(base, "base_model", None), find_head(base)
    if decoder is None or decoder is base or head is None or not hasattr(base, "config"):
        return False
    hidden, logits = torch.ones(1, 1, 8), torch.tensor([0.5, -1.25, 96.0])
    replaced: dict[nn.Module, Callable[..., Any]] = {
        decoder: lambda *args, **kwargs: _DecoderOutput([hidden]),
        head: lambda states: logits,
    }
    try:
        with torch.no_grad(), patched_forwards(replaced):
            output = base.forward(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    except Exception:  # the code around them expects something else, so nothing can be said
        return False
    return isinstance(output, Tensor) and output.shape == logits.shape and bool((output == logits).all())


class _DecoderOutput(tuple[Tensor, ...]):
    """Stands for the output of any decoder: hidden states, and None for whatever else there may be."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> Tensor:
        """The hidden states."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        """Return None for an output that is not there."""
        if name.startswith("__"):
            raise AttributeError(name)


def example_loss_sums(
    forward: Callable[..., Any], head: nn.Module | None, batch: MicroBatch, smoothing: float = 0.0
) -> Tensor:
    """Sum every example's token losses in nats, float32 `[batch]`, with a graph; see `label_losses` and `loss_sums`."""
    return loss_sums(label_losses(forward, head, batch, smoothing), batch)


def label_losses(
    forward: Callable[..., Any], head: nn.Module | None, batch: MicroBatch, smoothing: float = 0.0
) -> Tensor:
    """Compute the loss of every label in nats, float32 `[num_labels]`, with a graph for the backward pass.

    Args:
        forward: the engine or model to call.
        head: from `find_loss_head`: computes the loss in place of the logits, inside the module's own call, so that
            ZeRO-3 has gathered its weight. None takes the model's logits.
        batch: the micro-batch, on the device.
        smoothing: of the labels, see `token_losses`.
    """
    inputs = {"input_ids": batch.input_ids}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if head is None:
        logits = forward(**inputs, use_cache=False).logits
        return token_losses(_same, logits[batch.rows, batch.positions], batch.targets, logits.shape[-1], smoothing)
    plain_head: Callable[[Tensor], Tensor] = head.forward
    vocabulary_size = int(head.out_features)  # type: ignore[arg-type]
    frozen = not any(parameter.requires_grad for parameter in head.parameters())

    def loss_head(hidden: Tensor) -> Tensor:
        states = hidden[batch.rows, batch.positions]
        return token_losses(plain_head, states, batch.targets, vocabulary_size, smoothing, frozen=frozen)

    with patched_forwards({head: loss_head}):
        losses: Tensor = forward(**inputs, use_cache=False).logits
    return losses


def _same(logits: Tensor) -> Tensor:
    return logits


def loss_sums(losses: Tensor, batch: MicroBatch) -> Tensor:
    """Sum losses so that, divided by `batch.counts`, they are the loss of every example, `[batch]`.

    An ordinary example's is the sum over its labelled tokens; a classification example's the cross-entropy over its
    candidates of the mean log-probability of each one's tokens (TASKS.md), whose count is 1.

    Args:
        losses: losses of every label in nats, `[num_labels]`.
        batch: the micro-batch.
    """
    if batch.groups is None:
        return sums_by_row(losses, batch.owners, len(batch.counts))
    return F.cross_entropy(candidate_scores(losses, batch.groups), batch.groups.golds, reduction="none")


def candidate_scores(losses: Tensor, groups: CandidateGroups) -> Tensor:
    """Return the mean log-probability of every candidate's tokens, `[batch, c]`; -inf for missing candidates."""
    means = -sums_by_row(losses, groups.candidate_of, len(groups.sizes)) / groups.sizes
    scores = torch.full((len(groups.golds), groups.most), -torch.inf, dtype=losses.dtype, device=losses.device)
    return scores.index_put((groups.example_of, groups.place_of), means)
