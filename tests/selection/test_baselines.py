"""Baselines: each picks what it says, of the examples with a finite number."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_ds.errors import SelectionError
from colm_ds.selection import SINGLE_PROCESS, Signals, make_selector, pairwise_similarity
from colm_ds.selection.baselines import largest, middle
from tests.selection.test_selectors import R, context, make_batch

SCORED = ("big_loss", "gradient_norm", "least_confidence", "middle_perplexity")

numbers = st.lists(st.floats(-100, 100, allow_nan=False, width=32), min_size=1, max_size=12)


def signals(vectors: torch.Tensor, broken: tuple[int, ...] = ()) -> Signals:
    finite = torch.ones(len(vectors), dtype=torch.bool)
    finite[list(broken)] = False
    return Signals(torch.arange(len(vectors)), finite, vectors=vectors)


@given(numbers, st.data())
def test_largest(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    places = largest(torch.tensor(values), count).tolist()
    assert places == sorted(places)
    assert len(set(places)) == count
    left_out = [values[place] for place in range(len(values)) if place not in places]
    assert min(values[place] for place in places) >= max(left_out, default=-1000)


@given(numbers, st.data())
def test_middle(values: list[float], data: st.DataObject) -> None:
    """As many left out below as above, but for one."""
    count = data.draw(st.integers(1, len(values)))
    chosen = [values[place] for place in middle(torch.tensor(values), count).tolist()]
    assert len(chosen) == count
    ordered = sorted(values)
    first = (len(values) - count) // 2
    assert sorted(chosen) == ordered[first : first + count]


def test_ties_to_the_lowest_place() -> None:
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]
    assert middle(torch.tensor([5.0, 5.0, 5.0, 5.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("name", SCORED)
def test_scored(name: str) -> None:
    scores = torch.randn(R, 1, generator=torch.Generator().manual_seed(3))
    selector = make_selector(name, context(size=6))
    coreset = selector.select(make_batch(2), signals(scores), SINGLE_PROCESS)
    order = scores[:, 0].argsort().tolist()
    first = (R - 6) // 2
    wanted = {"least_confidence": order[:6], "middle_perplexity": order[first : first + 6]}.get(name, order[-6:])
    assert coreset.positions.tolist() == sorted(wanted)
    assert coreset.weights.tolist() == [1.0] * 6
    assert coreset.num_kept == 0


@pytest.mark.parametrize("name", [*SCORED, "hidden_medoids"])
def test_examples_without_a_finite_number_are_left_out(name: str) -> None:
    vectors = torch.randn(R, 4 if name == "hidden_medoids" else 1, generator=torch.Generator().manual_seed(1))
    broken = (0, 3, 7)
    vectors[list(broken)] = float("nan")
    coreset = make_selector(name, context(size=R)).select(make_batch(1), signals(vectors, broken), SINGLE_PROCESS)
    assert coreset.positions.sort().values.tolist() == [place for place in range(R) if place not in broken]
    assert coreset.num_nonfinite == 3
    assert coreset.nonfinite == broken


def test_completion_length_reads_no_signals() -> None:
    batch = make_batch(1)
    counts = torch.randperm(R, generator=torch.Generator().manual_seed(2)) + 1
    batch = type(batch)(**{**vars(batch), "num_label_tokens": counts})
    coreset = make_selector("completion_length", context(size=4)).select(batch, None, SINGLE_PROCESS)
    assert sorted(counts[coreset.positions].tolist()) == [R - 3, R - 2, R - 1, R]


def test_hidden_medoids_are_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy picks reach at least 1 - 1/e of the best set's objective, by brute force."""
    vectors = torch.randn(R, 3, generator=torch.Generator().manual_seed(4))
    coreset = make_selector("hidden_medoids", context(size=3)).select(make_batch(1), signals(vectors), SINGLE_PROCESS)
    similarity = pairwise_similarity(vectors, "l1")

    def objective(places: tuple[int, ...]) -> float:
        return float(similarity[:, list(places)].max(dim=1).values.sum())

    best = max(objective(places) for places in itertools.combinations(range(R), 3))
    assert objective(tuple(coreset.positions.tolist())) >= (1 - 1 / 2.71828) * best
    assert coreset.size == 3


@pytest.mark.parametrize("name", [*SCORED, "hidden_medoids"])
def test_no_signals(name: str) -> None:
    with pytest.raises(SelectionError, match="was given no signals"):
        make_selector(name, context()).select(make_batch(1), None, SINGLE_PROCESS)
