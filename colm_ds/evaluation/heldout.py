"""Held-out loss per source, and accuracy of classification: the same at any batch size and number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.assign import by_rank, home_ranks, micro_batches
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.models.example_loss import candidate_scores, label_losses, loss_sums
from colm_ds.models.patch import eval_mode
from colm_ds.selection import Exchange
from colm_ds.types import CandidateTable, SourcedDataset


def heldout_loss(
    forward: Any,
    model: nn.Module,
    head: nn.Module | None,
    dataset: SourcedDataset,
    *,
    device: torch.device,
    exchange: Exchange,
    rank: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Compute the loss of every source on held-out examples, in nats per labelled token; all ranks call it together.

    Args:
        forward: engine or model to call.
        model: the module to put into eval mode meanwhile.
        head: from `find_loss_head`.
        dataset: the held-out examples.
        device: where the model runs.
        exchange: the ranks.
        rank: this rank.
        max_tokens: maximum padded tokens of a batch.

    Returns:
        `overall` (over all labelled tokens), `macro` (mean over sources), `per_source` by name; sources without a
        held-out example are left out. For classification examples, whose loss counts as one token's, also `accuracy`:
        the share whose gold candidate has the highest mean log-probability; ties go to the first one.
    """
    candidates: CandidateTable | None = getattr(dataset, "candidates", None)
    lengths = torch.as_tensor(dataset.lengths, dtype=torch.int64) if candidates is None else candidates.padded_lengths
    home = home_ranks(lengths, exchange.num_processes)
    held = by_rank(range(len(home)), home.tolist(), exchange.num_processes)
    plan = micro_batches(held, lengths, max_tokens=max_tokens)[rank]
    sums = torch.zeros(3, len(dataset.source_names), dtype=torch.float64, device=device)
    with eval_mode(model), torch.no_grad():
        for indices in plan:
            batch = make_micro_batch([dataset[index] for index in indices]).to(device)
            by_label = label_losses(forward, head, batch)
            losses = loss_sums(by_label, batch).double()[: len(indices)]
            sources = torch.as_tensor(dataset.source_ids[indices], dtype=torch.int64).to(device)
            sums[0].index_add_(0, sources, losses)
            sums[1].index_add_(0, sources, batch.counts[: len(indices)].double())
            if batch.groups is not None:
                right = first_largest(candidate_scores(by_label, batch.groups)) == batch.groups.golds
                sums[2].index_add_(0, sources, right.double())
    totals, counts, num_right = exchange.sum(sums).cpu()
    per_source = {
        name: float(totals[source] / counts[source])
        for source, name in enumerate(dataset.source_names)
        if counts[source] > 0
    }
    accuracy = {} if candidates is None else {"accuracy": float(num_right.sum() / counts.sum())}
    return {
        "overall": float(totals.sum() / counts.sum()),
        "macro": sum(per_source.values()) / len(per_source),
        "per_source": per_source,
        **accuracy,
    }


def first_largest(scores: Tensor) -> Tensor:
    """Return the index of the largest value in each row of `[n, c]`, the first one on ties, int64 `[n]`."""
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    largest = scores == scores.amax(dim=1, keepdim=True)
    return torch.where(largest, places, scores.shape[1]).amin(dim=1)
