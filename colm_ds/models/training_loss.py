"""Per-example training losses through an engine: logits at labelled positions only, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.models.example_loss import loss_sums
from colm_ds.models.families import FAMILIES
from colm_ds.models.patch import patched_forwards
from colm_ds.models.token_loss import token_losses


def find_loss_head(model: nn.Module) -> nn.Module | None:
    """The head whose forward may be replaced by the loss, or None for models that do more with their logits.

    Args:
        model: a Hugging Face causal LM, bare or in a `PeftModel`.
    """
    get_base_model = getattr(model, "get_base_model", None)
    base: Any = get_base_model() if callable(get_base_model) else model
    known = getattr(getattr(base, "config", None), "model_type", None) in FAMILIES
    return base.get_output_embeddings() if known else None


def example_loss_sums(forward: Callable[..., Any], head: nn.Module | None, batch: MicroBatch) -> Tensor:
    """Sum of every example's token losses in nats, float32 `[batch]`, with a graph; see `loss_sums`."""
    return loss_sums(label_losses(forward, head, batch), batch)


def label_losses(forward: Callable[..., Any], head: nn.Module | None, batch: MicroBatch) -> Tensor:
    """Loss of every label in nats, float32 `[num_labels]`, with a graph for the backward pass.

    Args:
        forward: the engine or model to call.
        head: from `find_loss_head`: computes the loss in place of the logits, inside the module's own call, so that
            ZeRO-3 has its weight at hand. None takes the model's logits.
        batch: the micro-batch, on the device.
    """
    if head is None:
        logits = forward(input_ids=batch.input_ids, use_cache=False).logits
        return token_losses(_same, logits[batch.rows, batch.positions], batch.targets, logits.shape[-1])
    plain_head: Callable[[Tensor], Tensor] = head.forward
    vocabulary_size = int(head.out_features)  # type: ignore[arg-type]

    def loss_head(hidden: Tensor) -> Tensor:
        states = hidden[batch.rows, batch.positions]
        return token_losses(plain_head, states, batch.targets, vocabulary_size)

    with patched_forwards({head: loss_head}):
        losses: Tensor = forward(input_ids=batch.input_ids, use_cache=False).logits
    return losses


def _same(logits: Tensor) -> Tensor:
    return logits
