"""Compute log-probabilities of candidate continuations; tokens that a question's candidates share pass once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from colm_ds.data.prompt import Continuation
from colm_ds.evaluation.generate import cache_argument, left_padded, select_rows
from colm_ds.models.token_loss import token_losses


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of a candidate after its prompt.

    Attributes:
        log_probability: sum over the candidate's tokens, in nats.
        num_tokens: number of the candidate's tokens.
    """

    log_probability: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Mean log-probability per token: the score of TASKS.md."""
        return self.log_probability / self.num_tokens


def shared_length(candidates: Sequence[Continuation]) -> int:
    """Return the number of leading tokens that all candidates share and whose predictions no score needs.

    The last token before a candidate is left to the candidates' own pass, which predicts their first token from it.
    """
    length = min(candidate.start for candidate in candidates) - 1
    first = candidates[0].ids
    for candidate in candidates[1:]:
        while first[:length] != candidate.ids[:length]:
            length -= 1
    return length


def score_candidates(
    model: Any, questions: Sequence[Sequence[Continuation]], *, device: torch.device, share_prompt: bool = True
) -> list[list[Likelihood]]:
    """Compute the log-probability of every candidate of every question of one batch.

    With `share_prompt` the tokens that a question's candidates share pass through the model once, and the key-value
    cache is repeated for the candidates; without it every candidate passes in full.

    Args:
        model: a Hugging Face causal LM in eval mode, bare or in a `PeftModel`.
        questions: candidates of each question, at least one.
        device: where the model runs.
        share_prompt: for models that keep a key-value cache.

    Returns:
        Likelihoods in the structure of `questions`.
    """
    shared = [shared_length(candidates) if share_prompt else 0 for candidates in questions]
    owner = [number for number, candidates in enumerate(questions) for _ in candidates]
    flat = [candidate for candidates in questions for candidate in candidates]
    with torch.inference_mode():
        cache, mask = None, torch.ones(len(flat), 0, dtype=torch.int64, device=device)
        if any(shared):
            cache, mask = _shared_cache(model, questions, shared, device)
            rows = torch.tensor(owner, device=device)
            select_rows(cache, rows)
            mask = mask[rows]
        sums = _tail_sums(model, flat, [shared[number] for number in owner], cache, mask)
    scores = [
        Likelihood(total, len(candidate.ids) - candidate.start)
        for total, candidate in zip(sums.tolist(), flat, strict=True)
    ]
    starts = torch.tensor([0, *map(len, questions)]).cumsum(0).tolist()
    return [scores[start:stop] for start, stop in pairwise(starts)]


def _shared_cache(
    model: Any, questions: Sequence[Sequence[Continuation]], shared: Sequence[int], device: torch.device
) -> tuple[Any, Tensor]:
    """Return key-value cache and mask of the shared tokens, one row for each question."""
    fronts = [candidates[0].ids[:length] for candidates, length in zip(questions, shared, strict=True)]
    ids, mask = left_padded(fronts, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return output.past_key_values, mask


def _tail_sums(model: Any, flat: Sequence[Continuation], shared: Sequence[int], cache: Any, mask: Tensor) -> Tensor:
    """Sum the log-probabilities of each candidate's tokens, float64 `[n]` on the CPU."""
    device = mask.device
    tails = [candidate.ids[length:] for candidate, length in zip(flat, shared, strict=True)]
    width = max(map(len, tails)) - 1  # nothing is predicted from the last token
    ids = torch.zeros(len(flat), width, dtype=torch.int64)
    seen = torch.zeros(len(flat), width, dtype=torch.int64)
    rows, places, targets = [], [], []
    for row, (candidate, tail, length) in enumerate(zip(flat, tails, shared, strict=True)):
        ids[row, : len(tail) - 1] = torch.tensor(tail[:-1])
        seen[row, : len(tail) - 1] = 1
        for place in range(candidate.start - length - 1, len(tail) - 1):
            rows.append(row)
            places.append(place)
            targets.append(tail[place + 1])
    positions = torch.arange(width) + torch.tensor(shared)[:, None]
    # Only positions that some candidate needs: the logits of a long prompt would not fit.
    keep = sorted(set(places))
    column = {place: number for number, place in enumerate(keep)}
    output = model(
        input_ids=ids.to(device),
        attention_mask=torch.cat([mask, seen.to(device)], dim=1),
        position_ids=positions.to(device),
        use_cache=cache is not None,
        logits_to_keep=torch.tensor(keep, device=device),
        **{cache_argument(model): cache},
    )
    logits = output.logits[torch.tensor(rows), torch.tensor([column[place] for place in places])]
    losses = token_losses(_same, logits, torch.tensor(targets, device=device), logits.shape[-1])
    return -torch.zeros(len(flat), dtype=torch.float64).index_add(0, torch.tensor(rows), losses.double().cpu())


def _same(logits: Tensor) -> Tensor:
    return logits
