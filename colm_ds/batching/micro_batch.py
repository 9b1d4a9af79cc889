"""Micro-batches: token ids and labelled positions, computed on the CPU before the copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from colm_ds.batching.candidates import computed_rows
from colm_ds.batching.collate import IGNORE_INDEX, pad_batch
from colm_ds.errors import DataError
from colm_ds.selection.transfer import to_device
from colm_ds.types import Example

PLACE_HOLDER = Example(torch.zeros(2, dtype=torch.int64), torch.tensor([IGNORE_INDEX, 0]), 0, -1)
"""Placeholder that a rank computes with weight 0 while others have one more micro-batch."""


@dataclass(frozen=True)
class CandidateGroups:
    """Assignment of rows and labels to classification examples and their candidates in a micro-batch.

    Attributes:
        owners: example of every row.
        places: index of every row within its example.
        most_rows: maximum rows of one example.
        candidate_of: candidate of every labelled position, int64 `[num_labels]`.
        sizes: labelled tokens of every candidate, float32 `[num_candidates]`.
        example_of: example of every candidate, int64 `[num_candidates]`.
        place_of: its index within the example, int64 `[num_candidates]`.
        golds: index of the gold candidate, int64 `[batch]`.
        most: maximum candidates of one example.
        firsts: index among the labels of the first token of every example's first candidate, int64 `[batch]`.
        distinct: rows and positions with a label, each once, int64 `[2, num_places]`.
    """

    owners: tuple[int, ...]
    places: tuple[int, ...]
    most_rows: int
    candidate_of: Tensor
    sizes: Tensor
    example_of: Tensor
    place_of: Tensor
    golds: Tensor
    most: int
    firsts: Tensor
    distinct: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded examples. No mask is needed: causal attention never sees padding to the right.

    In a packed one (`batching.packing`) a row holds several examples, and each has positions from 0.

    Attributes:
        input_ids: int64 `[rows, length]`; a row for every example, or some for a classification example.
        rows: row of every labelled position, int64 `[num_labels]`.
        positions: where the hidden state predicts a label, int64 `[num_labels]`.
        targets: the labels, int64 `[num_labels]`; a position has several where candidates share it.
        counts: labelled tokens of every example, float32 `[batch]`; 1 for classification.
        lengths: tokens of every row.
        groups: for classification; None: a row is an example.
        position_ids: place of every token in its example, int64 `[rows, length]`, where rows are packed.
        packed: example of every labelled position, int64 `[num_labels]`, where rows are packed.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    counts: Tensor
    lengths: tuple[int, ...] = ()
    groups: CandidateGroups | None = None
    position_ids: Tensor | None = None
    packed: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on the device; for a GPU through pinned memory, without synchronising."""
        groups = None if self.groups is None else _move(self.groups, device)
        return replace(_move(self, device), groups=groups)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and positions with a label, each once: gradients pass there only once too."""
        if self.groups is None:
            return self.rows, self.positions
        return self.groups.distinct[0], self.groups.distinct[1]

    @property
    def owners(self) -> Tensor:
        """Example of every labelled position, int64 `[num_labels]`; not for classification."""
        return self.rows if self.packed is None else self.packed

    def by_row(self, values: Sequence[int]) -> list[int]:
        """Repeat values of examples for each of their rows; unchanged for a placeholder, which has none."""
        return list(values) if self.groups is None else [values[owner] for owner in self.groups.owners]

    @property
    def example_lengths(self) -> list[int]:
        """Return the length of every example in a tensor from `by_example`, or of every row."""
        if self.groups is None or self.groups.most_rows == 1:
            return list(self.lengths)
        return [self.groups.most_rows * self.input_ids.shape[1]] * len(self.counts)

    def by_example(self, values: Tensor) -> Tensor:
        """Concatenate the rows of each example: `[rows, length, ...]` to `[batch, tokens, ...]`."""
        groups = self.groups
        if groups is None or groups.most_rows == 1:
            return values
        laid = values.new_zeros(len(self.counts), groups.most_rows, *values.shape[1:])
        where = [to_device(torch.tensor(places), values.device) for places in (groups.owners, groups.places)]
        return laid.index_put(tuple(where), values).flatten(1, 2)

    def examples_of_tokens(self) -> Tensor:
        """Return which tokens are each example's where rows are packed, bool `[batch, rows, length]`; none of padding.

        Every document of a row begins at position 0, as does the padding at its end.
        """
        assert self.position_ids is not None
        device = self.input_ids.device
        fills = to_device(torch.tensor(self.lengths), device)
        real = torch.arange(self.input_ids.shape[1], device=device) < fills[:, None]
        document = ((self.position_ids == 0) & real).flatten().cumsum(0) - 1
        if self.groups is not None:
            document = to_device(torch.tensor(self.groups.owners), device)[document]
        owner = document.reshape(real.shape)
        examples = torch.arange(len(self.counts), device=device)
        return (owner == examples[:, None, None]) & real


def _move(batch: Any, device: torch.device) -> Any:
    """Return a copy of a dataclass with its tensors on the device."""
    tensors = {name.name: getattr(batch, name.name) for name in fields(batch)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if device.type == "cuda":
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    return replace(batch, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def make_micro_batch(examples: Sequence[Example]) -> MicroBatch:
    """Pad examples and find their labelled positions, on the CPU; a placeholder if there are no examples."""
    if examples and examples[0].candidates is not None:
        return _with_candidates(examples)
    padded = pad_batch(list(examples) or [PLACE_HOLDER], pad_token_id=0)
    targets = padded["labels"][:, 1:]
    rows, positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(targets)).float()
    lengths = tuple(padded["lengths"].tolist())
    return MicroBatch(padded["input_ids"], rows, positions, targets[rows, positions], counts, lengths)


def with_fewer_labels(batch: MicroBatch, share: float, offsets: Tensor) -> MicroBatch:
    """Keep a share of every example's labels, spread evenly over it: the mean of their losses stands for that of all.

    An example with n labels is cut into m = ceil(share n) parts of equal length and keeps one label of each, the first
    at the example's offset, so that all labels are equally likely.

    Args:
        batch: ordinary examples, on the CPU.
        share: in (0, 1].
        offsets: position within a part, for every example, float32 `[batch]` in [0, 1).

    Raises:
        DataError: for classification examples, whose candidates are compared as wholes.
    """
    if batch.groups is not None:
        raise DataError(f"colm.probe.token_sample = {share}: candidates are compared as wholes. Remove it.")
    counts = batch.counts.double()
    kept = (counts * share).ceil().minimum(counts)
    row = torch.repeat_interleave(torch.arange(len(kept)), kept.long())
    part = torch.arange(len(row)) - (kept.cumsum(0) - kept)[row]
    within = ((part + offsets.double()[row]) * counts[row] / kept[row]).floor().minimum(counts[row] - 1)
    chosen = ((counts.cumsum(0) - counts)[row] + within).long()
    targets = batch.targets[chosen]
    return replace(
        batch, rows=batch.rows[chosen], positions=batch.positions[chosen], targets=targets, counts=kept.float()
    )


def _with_candidates(examples: Sequence[Example]) -> MicroBatch:
    rows: list[Tensor] = []
    owners: list[int] = []
    places: list[int] = []
    labels: list[tuple[Tensor, Tensor, Tensor]] = []
    candidates: list[tuple[int, int]] = []
    golds, firsts = [], []
    num_labels = 0
    for number, example in enumerate(examples):
        assert example.candidates is not None
        sequences = example.input_ids.split(list(example.candidates.lengths))
        wanted = example.labels.split(list(example.candidates.lengths))
        kept, row_of = computed_rows([sequence.tolist() for sequence in sequences])
        firsts.append(num_labels)
        golds.append(example.candidates.gold)
        for place, targets in enumerate(wanted):
            where = (targets[1:] != IGNORE_INDEX).nonzero().flatten()
            labels.append((torch.full_like(where, len(rows) + row_of[place]), where, targets[1:][where]))
            candidates.append((number, place))
            num_labels += len(where)
        for place, each in enumerate(kept):
            rows.append(sequences[each][:-1])
            owners.append(number)
            places.append(place)
    lengths = tuple(map(len, rows))
    input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
    sizes = torch.tensor([len(where) for _, where, _ in labels])
    example_of, place_of = torch.tensor(candidates).unbind(1)
    at, position, target = (torch.cat(parts) for parts in zip(*labels, strict=True))
    groups = CandidateGroups(
        owners=tuple(owners),
        places=tuple(places),
        most_rows=1 + max(places),
        candidate_of=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        sizes=sizes.float(),
        example_of=example_of.contiguous(),
        place_of=place_of.contiguous(),
        golds=torch.tensor(golds),
        most=1 + int(place_of.max()),
        firsts=torch.tensor(firsts),
        distinct=torch.unique(torch.stack([at, position]), dim=1),
    )
    return MicroBatch(input_ids, at, position, target, torch.ones(len(examples)), lengths, groups)
