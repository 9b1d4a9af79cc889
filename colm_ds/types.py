"""Data that flows through one step: examples, the large batch, its coreset, the step's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Division of the tokens of a classification example: a prompt with each candidate, one after the other.

    Its loss is the cross-entropy over the candidates of the mean log-probability of each one's labelled tokens.

    Attributes:
        lengths: tokens of every prompt with candidate, `[c]`.
        gold: place of the right candidate.
    """

    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Example:
    """One training example, unpadded.

    Attributes:
        input_ids: token ids, int64 `[length]`.
        labels: token ids to predict, -100 where there is no loss, int64 `[length]`.
        source: source id.
        index: position in the dataset.
        candidates: for classification; None: the loss is the mean over the labelled tokens.
    """

    input_ids: Tensor
    labels: Tensor
    source: int
    index: int
    candidates: Candidates | None = None


@dataclass(frozen=True)
class CandidateTable:
    """Candidates of n classification examples, as far as they are known without their tokens.

    Attributes:
        lengths: tokens of every prompt with candidate, 0 where an example has fewer, int64 `[n, c]`.
        golds: place of the right candidate, int64 `[n]`.
        num_rows: sequences that are computed for an example, as candidates share them, int64 `[n]`.
        widths: tokens of the longest of these, int64 `[n]`.
    """

    lengths: Tensor
    golds: Tensor
    num_rows: Tensor
    widths: Tensor

    @property
    def padded_lengths(self) -> Tensor:
        """Tokens of every example padded alone, int64 `[n]`."""
        return self.num_rows * self.widths

    def take(self, indices: Tensor) -> CandidateTable:
        """The facts of some examples, in that order."""
        return CandidateTable(self.lengths[indices], self.golds[indices], self.num_rows[indices], self.widths[indices])

    def of(self, place: int) -> Candidates:
        """The division of one example."""
        lengths = self.lengths[place].tolist()
        return Candidates(tuple(length for length in lengths if length), int(self.golds[place]))


class NumberedExamples(Protocol):
    """Examples by their position in a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class SourcedDataset(Protocol):
    """A map-style dataset that knows, without tokenising again, source and length of every example.

    Attributes:
        source_names: name of each source id.
        source_ids: source id of every example, `[num_examples]`.
        lengths: tokens of every example, `[num_examples]`.
        num_label_tokens: labelled tokens of every example, `[num_examples]`; 1 of every classification example, whose
            loss is of one decision.

    A dataset of classification examples has also `candidates`, a `CandidateTable`; lengths are then tokens computed.
    """

    source_names: Sequence[str]
    source_ids: np.ndarray
    lengths: np.ndarray
    num_label_tokens: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class PastLosses:
    """Losses that training itself found for the examples of a large batch in earlier steps.

    Attributes:
        last: mean token loss when each was last trained on, in nats, float32 `[r]`; NaN: never.
        first: the same when it was first trained on, float32 `[r]`.
        num_examples: N, examples of the dataset.
    """

    last: Tensor
    first: Tensor
    num_examples: int


@dataclass(frozen=True)
class LargeBatch:
    """The r examples of one step as one rank sees them: all of the facts, its own share of the tokens.

    `r` is the large batch size; a *position* is a place in the large batch, `0 <= position < r`.

    Attributes:
        step: 1-based optimizer step.
        indices: dataset index of every example, int64 `[r]`.
        sources: source id of every example, int64 `[r]`.
        lengths: tokens of every example, int64 `[r]`.
        num_label_tokens: labelled tokens of every example, int64 `[r]`.
        home: rank that holds every example, int64 `[r]`.
        examples: this rank's examples by position.
        candidates: of classification examples, by position.
        chosen: what to train on, where that was decided before the examples were read; `home` is then the rank that
            trains each chosen one, and only these are in `examples`, unless the step measures a variance.
        carry: by source id, what the quotas of earlier steps were short of; see `selection.sources.carried_quotas`.
        past: losses of these examples in earlier steps, for selectors that use them.
        reference: losses of these examples under a reference model in nats, float32 `[r]`, NaN where unknown; None:
            there is no table of them.
        lr: learning rate of the step, if known.
    """

    step: int
    indices: Tensor
    sources: Tensor
    lengths: Tensor
    num_label_tokens: Tensor
    home: Tensor
    examples: dict[int, Example]
    candidates: CandidateTable | None = None
    chosen: Chosen | None = None
    carry: dict[int, float] = field(default_factory=dict)
    past: PastLosses | None = None
    reference: Tensor | None = None
    lr: float | None = None

    @property
    def row_counts(self) -> Tensor:
        """Sequences that go through the model for every example, int64 `[r]`."""
        return torch.ones_like(self.lengths) if self.candidates is None else self.candidates.num_rows

    @property
    def widths(self) -> Tensor:
        """Tokens of the longest of these, int64 `[r]`."""
        return self.lengths if self.candidates is None else self.candidates.widths

    @property
    def padded_lengths(self) -> Tensor:
        """Tokens of every example padded alone, int64 `[r]`."""
        return self.lengths if self.candidates is None else self.candidates.padded_lengths

    @property
    def stored_lengths(self) -> Tensor:
        """Tokens that travel with every example, int64 `[r]`."""
        return self.lengths if self.candidates is None else self.candidates.lengths.sum(1)

    @property
    def size(self) -> int:
        """r, the number of examples in the large batch."""
        return len(self.indices)


NUM_NAMED = 8
"""Examples with a non-finite signal that are named one by one; beyond that they are only counted."""


@dataclass(frozen=True)
class Coreset:
    """The examples of a large batch to train on.

    Attributes:
        positions: chosen positions in the large batch, int64 `[b]`: kept small-source examples first, then the
            medoids of each pool in pick order, or its draws in the order of the batch.
        weights: loss weight of each, float32 `[b]`; mean 1 within each pool (of `importance`, over all pools), 1 for
            kept examples.
        num_kept: how many of the first positions are kept small-source examples.
        num_dropped_small: small-source examples that did not fit into b.
        num_nonfinite: examples left out because their signal was not finite.
        nonfinite: positions of the first `NUM_NAMED` of them.
        coherence: by source (or -1 for the joint pool), |mean g| / mean |g| of the signals; near 1 where a medoid
            can stand for the others, near 1/sqrt(n) where nothing can.
        carry: the large batch's for the next step; None: unchanged.
    """

    positions: Tensor
    weights: Tensor
    num_kept: int = 0
    num_dropped_small: int = 0
    num_nonfinite: int = 0
    coherence: dict[int, float] = field(default_factory=dict)
    nonfinite: tuple[int, ...] = ()
    carry: dict[int, float] | None = None

    @property
    def size(self) -> int:
        """b, the number of chosen examples."""
        return len(self.positions)


@dataclass(frozen=True)
class Chosen:
    """A coreset that was chosen before its examples were read.

    Attributes:
        coreset: the choice.
        num_bytes: payload of telling it to the other ranks.
    """

    coreset: Coreset
    num_bytes: int


@dataclass(frozen=True)
class StepStats:
    """Numbers of one optimizer step; an entry of metrics.jsonl, each declared in `run_folder.metrics`.

    Attributes:
        step: 1-based optimizer step.
        loss: weighted mean loss of the coreset (nats per token, by `loss_normalization`); None if none is finite.
        lr: learning rate of the first parameter group in this step.
        grad_norm: norm of the gradient before clipping; None where DeepSpeed does not give it.
        skipped: whether the gradient was not finite, so that the step changed nothing.
        tokens: non-padding tokens trained on, over all ranks.
        samples: examples trained on since the first step (b a step), over all ranks.
        data_use: passes over the dataset `seen` (examples of large batches) and `trained`, and `distinct`, the share of
            its examples that were trained on at least once.
        examples_probed: examples that the probe ran on, over all ranks.
        examples_trained: size of the coreset.
        padding_fraction: share of padding among the tokens computed in training, over all ranks.
        micro_batches: `count` of each rank, and `largest_tokens`, padded tokens of the largest: what the peak follows.
        exchange_bytes: payload of the collectives: signals (what the estimator sends, or sketches from training),
            selection (masked columns, sums and the choice itself), tokens (of examples trained on another rank than the
            one that holds them).
        selected: whether the selector ran (False for a plain step of the schedule).
        time_s: seconds of each phase on this rank: data (waiting for the large batch), probe, exchange, select, train
            (of it forward and backward), step, save (of a checkpoint since the last step; not in the total), total. 0
            for a phase that did not run.
        memory_gib: peak memory of the same phases on this rank (GiB = 2^30 bytes), and peak, the largest of all.
        memory_kind: what those peaks are: allocated (by PyTorch on a GPU) or resident (memory of the process).
        memory_parts_gib: what the largest peak within the step consists of: weights, gradients, optimizer (states and
            float32 copies), communication (buckets), activations (all that the phase added), replay, probe, selection,
            rest.
        counted_gib: in the steps of `memory.count_steps` on a CPU: peaks of counted tensor allocations by phase and as
            total, weights and states included; None in others.
        coreset: see `engine.step_stats.describe_coreset`.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    skipped: bool
    tokens: int
    samples: int
    data_use: dict[str, float]
    examples_probed: int
    examples_trained: int
    padding_fraction: float
    micro_batches: dict[str, int]
    exchange_bytes: dict[str, int]
    selected: bool
    time_s: dict[str, float]
    memory_gib: dict[str, float]
    memory_kind: str
    memory_parts_gib: dict[str, float]
    counted_gib: dict[str, float] | None
    coreset: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)
