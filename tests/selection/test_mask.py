"""Masks: the largest scores, and every criterion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_ds.errors import SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection.mask import mask_coordinates, top_coordinates
from tests.selection.oracles import mask, property_test, randn


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
@property_test
def test_top_coordinates_is_a_stable_sort(values: list[int], count: int) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    stable = score.sort(descending=True, stable=True).indices[:count].sort().values
    assert top_coordinates(score, count).tolist() == stable.tolist()


def test_top_coordinates_of_many() -> None:
    score = randn(50_000, seed=1).round(decimals=2)  # many ties
    assert (
        top_coordinates(score, 2560).tolist()
        == score.sort(descending=True, stable=True).indices[:2560].sort().values.tolist()
    )


def test_all_equal_takes_the_lowest() -> None:
    assert top_coordinates(torch.zeros(9), 4).tolist() == [0, 1, 2, 3]
    assert top_coordinates(torch.zeros(3), 4).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 7, 30, 31])
def test_criteria(count: int) -> None:
    mean, parameters = randn(30, seed=2), randn(30, seed=3)
    grad = mask_coordinates("grad", count, mean=mean)
    assert grad.tolist() == mask(mean.numpy(), count).tolist()
    weight = mask_coordinates("weight", count, mean=torch.zeros(30), parameters=parameters)
    assert weight.tolist() == mask(parameters.numpy(), count).tolist()
    both = mask_coordinates("weight_grad", count, mean=mean, parameters=parameters)
    assert both.tolist() == mask((mean * parameters).numpy(), count).tolist()


def test_random_is_seeded_private_and_even() -> None:
    state = torch.random.get_rng_state()
    often = torch.zeros(20)
    for seed in range(300):
        chosen = mask_coordinates("random", 5, mean=torch.zeros(20), generator=private_generator(seed))
        again = mask_coordinates("random", 5, mean=torch.zeros(20), generator=private_generator(seed))
        assert chosen.tolist() == again.tolist() == sorted(set(chosen.tolist()))
        assert chosen.dtype == torch.int64
        assert len(chosen) == 5
        often[chosen] += 1
    assert float(often.min()) > 40  # 75 expected, standard deviation 7.5
    assert float(often.max()) < 110
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_of_more_than_there_are_takes_all() -> None:
    assert mask_coordinates("random", 9, mean=torch.zeros(4), generator=private_generator(0)).tolist() == [0, 1, 2, 3]


def test_mask_does_not_change_what_it_reads() -> None:
    mean, parameters = randn(30, seed=2), randn(30, seed=3)
    copies = mean.clone(), parameters.clone()
    mask_coordinates("grad", 3, mean=mean)
    mask_coordinates("weight", 3, mean=mean, parameters=parameters)
    mask_coordinates("weight_grad", 3, mean=mean, parameters=parameters)
    assert torch.equal(mean, copies[0])
    assert torch.equal(parameters, copies[1])


def test_mask_errors() -> None:
    with pytest.raises(SelectionError, match="unknown"):
        mask_coordinates("hessian", 2, mean=torch.zeros(4))
    for criterion in ("weight", "weight_grad"):
        with pytest.raises(SelectionError, match="needs the probed parameters"):
            mask_coordinates(criterion, 2, mean=torch.zeros(4))
