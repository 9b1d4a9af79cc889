"""Run forward and backward over a coreset's micro-batches, for the gradient of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.assign import by_rank, micro_batches, training_ranks
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.batching.move import move_examples, moves_of
from colm_ds.batching.packing import Packing, pack_micro_batch, pack_micro_batches
from colm_ds.engine.out_of_memory import of_micro_batch
from colm_ds.models.example_loss import example_loss_sums
from colm_ds.probe.replay import ReplayStore
from colm_ds.probe.training_sketch import TrainingSketch
from colm_ds.selection import Exchange
from colm_ds.selection.transfer import to_cpu, to_device
from colm_ds.types import Coreset, Example, LargeBatch


@dataclass(frozen=True)
class Placement:
    """Assignment of a coreset's examples to ranks and micro-batches.

    Attributes:
        examples: examples that this rank needs, by position in the large batch.
        plans: micro-batches of each rank, as lists of positions.
        padding_fraction: share of padding among the tokens computed, over all ranks.
        largest_tokens: padded tokens of the largest micro-batch.
        row_sizes: examples in each row of this rank's micro-batches, where examples are packed.
    """

    examples: dict[int, Example]
    plans: list[list[list[int]]]
    padding_fraction: float
    largest_tokens: int
    row_sizes: list[list[int]] | None = None


@dataclass(frozen=True)
class Accumulated:
    """Results of the passes over a coreset on this rank, still on the device and not synchronised.

    Attributes:
        totals: weighted sum of the finite losses, and the number of examples whose loss is not finite, float64 `[2]`.
        finite: whether each example's loss is finite, bool `[n]`.
        sums: each example's summed token losses, 0 where not finite, float32 `[n]`.
        positions: positions of those examples in the large batch.
        sketches: sketch of each one's gradient, float32 `[n, K]`; None: not wanted.
    """

    totals: Tensor
    finite: Tensor
    sums: Tensor
    positions: list[int]
    sketches: Tensor | None = None


def assign_and_move(
    batch: LargeBatch,
    positions: Sequence[int],
    replay: ReplayStore | None,
    exchange: Exchange,
    rank: int,
    *,
    max_examples: int,
    max_tokens: int | None,
    packing: Packing | None = None,
) -> Placement:
    """Spread chosen examples over the ranks and move their tokens; all ranks call it together.

    Args:
        batch: the large batch as this rank sees it.
        positions: chosen positions.
        replay: the probe's hidden states, if training starts from them; every example then stays on their rank.
        exchange: the ranks.
        rank: this rank.
        max_examples: maximum examples of a micro-batch; with packing maximum rows.
        max_tokens: maximum tokens of a micro-batch, padding included.
        packing: how to pack examples into rows, or None.
    """
    world_size = exchange.num_processes
    if replay is None:
        ranks = training_ranks(positions, batch.lengths, batch.home, world_size)
    else:
        ranks = dict(zip(positions, batch.home[list(positions)].tolist(), strict=True))
        replay.keep(positions)
    arrived = move_examples(batch, moves_of(ranks, batch.home), rank, exchange)
    held = by_rank(positions, [ranks[p] for p in positions], world_size)
    row_sizes = None
    if packing is None:
        plans = micro_batches(held, batch.padded_lengths, max_examples=max_examples, max_tokens=max_tokens)
        counts, widths = batch.row_counts.tolist(), batch.widths.tolist()
        sizes = [
            sum(counts[p] for p in micro) * max(widths[p] for p in micro) for plan in plans for micro in plan if micro
        ]
    else:
        packed = pack_micro_batches(
            held, batch.lengths, packing.row_tokens, max_rows=max_examples, max_tokens=max_tokens
        )
        if packing.one_row:
            packed = [[[list(chain(*micro))] if micro else [] for micro in plan] for plan in packed]
        row_sizes = [[len(row) for row in micro] for micro in packed[rank]]
        plans = [[list(chain(*micro)) for micro in plan] for plan in packed]
        sizes = [
            len(micro) * max(int(batch.lengths[row].sum()) for row in micro) for p in packed for micro in p if micro
        ]
    padding = 1.0 - int(batch.lengths[list(positions)].sum()) / sum(sizes) if sizes else 0.0
    return Placement({**batch.examples, **arrived}, plans, padding, max(sizes, default=0), row_sizes)


def accumulate(
    engine: Any,
    head: nn.Module | None,
    placement: Placement,
    scale: Tensor,
    replay: ReplayStore | None,
    *,
    rank: int,
    device: torch.device,
    part: Callable[[str], AbstractContextManager[None]] | None = None,
    sketch: TrainingSketch | None = None,
) -> Accumulated:
    """Run forward and backward of this rank's micro-batches, without synchronising the device in between.

    Args:
        engine: the DeepSpeed engine that accumulates the gradients.
        head: from `find_loss_head`.
        placement: from `assign_and_move`.
        scale: factor of each example's summed token losses, float32 `[r]`; the step's loss is the sum over ranks.
        replay: as for `assign_and_move`.
        rank: this rank.
        device: device of the model.
        part: makes the contexts of `forward` and `backward`, which do not synchronise the device.
        sketch: sketches every example's gradient on the way, if given.
    """
    world_size = len(placement.plans)
    if sketch is not None:
        sketch.begin()
    total = torch.zeros((), dtype=torch.float64, device=device)
    passed: list[Tensor] = []
    for number, mine in enumerate(placement.plans[rank]):
        micro = make_micro_batch([placement.examples[position] for position in mine])
        if placement.row_sizes is not None and mine:
            micro = pack_micro_batch(micro, placement.row_sizes[number])
        micro = micro.to(device)
        scales = torch.zeros(len(micro.counts))
        scales[: len(mine)] = scale[mine]
        scales = to_device(scales, device)
        # A placeholder is replayed too: under ZeRO-3 all ranks gather the same layers in the same order.
        replayed = replay is not None and (not mine or replay.has(mine))
        passed_by = sketch.of(micro, len(mine)) if sketch is not None else None
        with (
            replay.replaying(micro.by_row(mine)) if replay is not None and replayed else nullcontext(),
            passed_by.hooked() if passed_by is not None else nullcontext(),
        ):
            with of_micro_batch(micro), part("forward") if part else nullcontext():
                sums = example_loss_sums(engine, head, micro)
            if passed_by is not None:
                passed_by.watch_losses(sums)
            with of_micro_batch(micro), part("backward") if part else nullcontext():
                engine.backward((sums * scales).sum() * world_size, scale_wrt_gas=False)
        if passed_by is not None:
            passed_by.finish()
        sums = sums.detach()
        passed.append(sums[: len(mine)])
        total += torch.where(torch.isfinite(sums), sums * scales, 0.0).sum()
    losses = torch.cat(passed) if passed else torch.zeros(0, device=device)
    whole = torch.isfinite(losses)
    positions = [position for mine in placement.plans[rank] for position in mine]
    totals = torch.stack([total, (~whole).sum().double()])
    sketches = None if sketch is None else sketch.sketches()
    return Accumulated(totals, whole, torch.where(whole, losses, 0.0), positions, sketches)


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of a step over all ranks.

    Attributes:
        loss: weighted sum of the finite losses; None: no example has one.
        num_broken: examples whose loss is not finite.
        losses: mean token loss of every example by position, float64 `[r]`.
        grad_norm: the gradient's norm, if known.
        sketches: sketches of the trained examples in their order, float32 `[b, K]`, if they were made.
        sketch_bytes: payload of gathering them.
    """

    loss: float | None
    num_broken: int
    losses: Tensor
    grad_norm: float | None
    sketches: Tensor | None
    sketch_bytes: int


def read_step(
    accumulated: Accumulated,
    batch: LargeBatch,
    trained: Sequence[int],
    grad_norm: Tensor | float | None,
    exchange: Exchange,
) -> StepNumbers:
    """Read the step's numbers from the device, its only synchronisation; all ranks call it together.

    Args:
        accumulated: results of the passes on this rank.
        batch: the large batch.
        trained: positions that any rank trained on.
        grad_norm: DeepSpeed's gradient norm, a number or a tensor on the device.
        exchange: the ranks.
    """
    device = accumulated.sums.device
    positions = torch.tensor(accumulated.positions, dtype=torch.int64)
    losses = torch.zeros(batch.size, dtype=torch.float64, device=device)
    counts = to_device(batch.num_label_tokens[positions], device)
    losses[to_device(positions, device)] = accumulated.sums.double() / counts
    read = [exchange.sum(torch.cat([accumulated.totals, losses]))]
    with exchange.counting("signals") as count:
        if accumulated.sketches is not None:
            row_of = {position: row for row, position in enumerate(trained)}
            rows = torch.tensor([row_of[position] for position in accumulated.positions], dtype=torch.int64)
            read.append(exchange.gather_rows(accumulated.sketches, to_device(rows, device), len(trained)))
    if isinstance(grad_norm, Tensor):
        read.append(grad_norm)
    sums, *others = to_cpu(read)
    if isinstance(grad_norm, Tensor):
        grad_norm = float(others.pop())
    return StepNumbers(
        loss=float(sums[0]),
        num_broken=int(sums[1]),
        losses=sums[2:],
        grad_norm=None if grad_norm is None else float(grad_norm),
        sketches=others[0] if others else None,
        sketch_bytes=count.num_bytes,
    )


def loss_scale(batch: LargeBatch, coreset: Coreset, normalization: str, without: Sequence[int] = ()) -> Tensor:
    """Return the factor of each example's summed token losses, float32 `[r]`; 0 for those not trained on.

    Args:
        batch: the large batch.
        coreset: the chosen examples.
        normalization: `example` (mean over examples of their mean token loss) or `token` (mean over tokens, each
            weighted as its example).
        without: positions to leave out as if they had not been chosen.
    """
    keep = ~torch.isin(coreset.positions, torch.tensor(list(without), dtype=torch.int64))
    positions, weights = coreset.positions[keep], coreset.weights[keep].double()
    labelled = batch.num_label_tokens[positions].double()
    if normalization == "token":
        factors = weights / (weights * labelled).sum().clamp_min(1e-12)
    else:
        factors = weights / (labelled * (len(positions) if bool(keep.all()) else weights.sum().clamp_min(1e-12)))
    scale = torch.zeros(batch.size)
    scale[positions] = factors.float()
    return scale


def broken_positions(accumulated: Accumulated, batch: LargeBatch, exchange: Exchange) -> list[int]:
    """Return the positions of examples whose loss is not finite on any rank; all ranks call it together."""
    broken = torch.zeros(batch.size, device=accumulated.finite.device)
    mine = to_device(torch.tensor(accumulated.positions, dtype=torch.int64), broken.device)
    broken[mine[~accumulated.finite]] = 1.0
    return exchange.sum(broken).nonzero().flatten().tolist()
