"""The step written plainly: one unpadded example after the other, torch's own AdamW, no DeepSpeed, no code of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.engine.training import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, Case, Record, StepRecord


@dataclass(frozen=True)
class PlainRun:
    """What the plain loop arrives at.

    Attributes:
        parameters: trained parameters at the end, by name.
        losses: weighted mean loss of every step.
        grad_norms: norm of the whole gradient of every step, before clipping.
    """

    parameters: dict[str, Tensor]
    losses: list[float]
    grad_norms: list[float]


def token_losses(model: Any, record: Record) -> Tensor:
    """Loss of every labelled token of one example, `[n]`."""
    device = next(model.parameters()).device
    tokens, labels = torch.tensor(record["input_ids"], device=device), torch.tensor(record["labels"], device=device)
    logits = model(input_ids=tokens[None]).logits[0, :-1].float()
    wanted = labels[1:] != -100
    return F.cross_entropy(logits[wanted], labels[1:][wanted], reduction="none")


def plain_training(
    case: Case,
    data: Sequence[Record],
    steps: Sequence[StepRecord],
    before_step: Callable[[int, Any], None] | None = None,
    device: torch.device | str = "cpu",
) -> PlainRun:
    """Train on given coresets: gradient (1/b) sum w_i grad L_i, or by tokens, then AdamW.

    Args:
        case: names the model, the normalisation and the clipping.
        data: the dataset.
        steps: coreset of every step.
        before_step: called with the step's place, from 0, and the model as the step finds it.
        device: where to train.
    """
    model = case.build_model().to(device)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    by_token = case.colm.get("loss_normalization", "example") == "token"
    clipping = case.deepspeed.get("gradient_clipping", 0.0)
    run = PlainRun({}, [], [])
    for place, step in enumerate(steps):
        if before_step is not None:
            before_step(place, model)
        chosen = [data[index] for index in step.chosen]
        counts = [sum(label != -100 for label in record["labels"][1:]) for record in chosen]
        labelled = sum(weight * count for weight, count in zip(step.weights, counts, strict=True))
        total = 0.0
        optimizer.zero_grad()
        for record, weight in zip(chosen, step.weights, strict=True):
            losses = token_losses(model, record)
            loss = weight * (losses.sum() / labelled if by_token else losses.mean() / len(chosen))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), clipping or float("inf"))
        optimizer.step()
        run.losses.append(total)
        run.grad_norms.append(float(norm))
    run.parameters.update({name: parameter.detach() for name, parameter in trained.items()})
    return run


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference between two sets of parameters of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
