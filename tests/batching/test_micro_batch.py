"""A share of an example's labels: how many, which, and that each is as likely as any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_ds.batching.micro_batch import make_micro_batch, with_fewer_labels
from colm_ds.errors import DataError
from colm_ds.types import Candidates, Example


def example(length: int, prompt: int = 1) -> Example:
    ids = torch.arange(length)
    labels = ids.clone()
    labels[:prompt] = -100
    return Example(ids, labels, 0, 0)


@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=5),
    share=st.floats(1e-3, 1.0),
    offset=st.floats(0.0, 1.0, exclude_max=True, width=32),
)
def test_an_even_part_of_every_example(lengths: list[int], share: float, offset: float) -> None:
    whole = make_micro_batch([example(length) for length in lengths])
    part = with_fewer_labels(whole, share, torch.full((len(lengths),), offset))
    for row, length in enumerate(lengths):
        labels, kept = length - 1, part.positions[part.rows == row]
        assert len(kept) == part.counts[row] == min(labels, max(1, int(torch.tensor(labels * share).double().ceil())))
        gaps = kept.diff()
        assert bool((gaps > 0).all())
        assert set(kept.tolist()) <= set(range(labels))
        if len(gaps) > 1:
            assert int(gaps.max() - gaps.min()) <= 1  # spread evenly
    assert torch.equal(part.targets, part.positions + 1)  # the label of each position is still its own
    assert torch.equal(part.input_ids, whole.input_ids)


def test_every_label_is_as_likely() -> None:
    """Over all offsets of a fine grid each label is kept as often as every other."""
    whole = make_micro_batch([example(31, prompt=11)])
    kept = torch.zeros(31)
    for step in range(1000):
        part = with_fewer_labels(whole, 0.3, torch.tensor([(step + 0.5) / 1000]))
        kept[part.positions] += 1
    assert torch.equal(kept[:10], torch.zeros(10))
    assert kept[10:30].tolist() == pytest.approx([300] * 20, abs=2)


def test_all_of_them_and_none() -> None:
    silent = Example(torch.arange(5), torch.full((5,), -100), 0, 0)
    whole = make_micro_batch([example(9), silent])
    part = with_fewer_labels(whole, 1.0, torch.rand(2))
    assert torch.equal(part.positions, whole.positions)
    assert part.counts.tolist() == [8, 0]


def test_candidates_are_refused() -> None:
    ids = torch.arange(8)
    labels = torch.tensor([-100, -100, -100, 3, -100, -100, -100, 7])
    batch = make_micro_batch([Example(ids, labels, 0, 0, candidates=Candidates((4, 4), 0))])
    with pytest.raises(DataError, match=r"token_sample.*Remove it"):
        with_fewer_labels(batch, 0.5, torch.zeros(1))
