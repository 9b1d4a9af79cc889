"""From the losses of labelled tokens to those of examples, ordinary ones and classification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_ds.batching.micro_batch import CandidateGroups, MicroBatch
from colm_ds.models.token_loss import sums_by_row


def loss_sums(losses: Tensor, batch: MicroBatch) -> Tensor:
    """What divided by `batch.counts` is the loss of every example, `[batch]`.

    An ordinary example's is the sum over its labelled tokens; a classification example's the cross-entropy over its
    candidates of the mean log-probability of each one's tokens (TASKS.md), whose count is 1.

    Args:
        losses: of every label in nats, `[num_labels]`.
        batch: the micro-batch.
    """
    if batch.groups is None:
        return sums_by_row(losses, batch.rows, len(batch.counts))
    return F.cross_entropy(candidate_scores(losses, batch.groups), batch.groups.golds, reduction="none")


def candidate_scores(losses: Tensor, groups: CandidateGroups) -> Tensor:
    """Mean log-probability of every candidate's tokens, `[batch, c]`; -inf where an example has fewer candidates."""
    means = -sums_by_row(losses, groups.candidate_of, len(groups.sizes)) / groups.sizes
    scores = torch.full((len(groups.golds), groups.most), -torch.inf, dtype=losses.dtype, device=losses.device)
    return scores.index_put((groups.example_of, groups.place_of), means)
