"""Loss of every example of a micro-batch, for plain PyTorch loops with `CoresetSelector`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from colm_ds.batching.gather import read_examples
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.example_loss import example_loss_sums, find_loss_head


def example_losses(model: Any, examples: Sequence[Any] | Mapping[str, Any]) -> Tensor:
    """Compute the mean token loss of every example in nats, float32 `[n]`, with a graph for the backward pass.

    Logits are computed at labelled positions only, one chunk at a time. Without examples the result is empty but still
    has a graph, so that a rank of DDP that trains none can take part in the backward pass.

    Args:
        model: a causal LM, bare or in DDP, DeepSpeed or a `PeftModel`.
        examples: as for `CoresetSelector`: a list of records or a padded batch; sources are ignored.
    """
    inner: nn.Module = getattr(model, "module", model)
    read = read_examples(examples, ["all"], None)
    batch = make_micro_batch(read).to(next(inner.parameters()).device)
    losses = example_loss_sums(model, find_loss_head(inner), batch) / batch.counts.clamp(min=1.0)
    return losses[: len(read)]
