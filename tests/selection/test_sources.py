"""Small and big sources, quotas, and the shares of the places in a coreset."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_ds.errors import SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection.sources import (
    JOINT_POOL,
    Shares,
    carried_quotas,
    coreset_quotas,
    most_kept,
    share_out,
    split_sources,
)
from tests.selection import oracles
from tests.selection.oracles import property_test

COUNTS = st.lists(st.integers(0, 200), min_size=1, max_size=8)


# split_sources


@given(COUNTS)
@property_test
def test_split_follows_the_rule_and_keeps_the_order(counts: list[int]) -> None:
    named = {f"s{i}": count for i, count in enumerate(counts)}
    small, big = split_sources(named)
    assert set(small) == oracles.small_sources(named)
    assert [name for name in named if name in small] == small
    assert [name for name in named if name in big] == big
    assert sorted(small + big) == sorted(named)
    assert big  # the largest source is never below the average


@pytest.mark.parametrize(
    ("counts", "small"),
    [
        ({"only": 5}, []),
        ({"a": 7, "b": 7, "c": 7}, []),
        ({"a": 0, "b": 0}, []),
        ({"a": 3, "b": 3, "c": 4}, ["a", "b"]),  # 10/3 is more than 3: no rounding
        ({"a": 1, "b": 3, "c": 2}, ["a"]),  # exactly the average is big
        ({"a": 10**18 - 1, "b": 10**18 + 1}, ["a"]),  # beyond the precision of floats
    ],
)
def test_split_at_the_edge(counts: dict[str, int], small: list[str]) -> None:
    assert split_sources(counts)[0] == small


def test_split_keeps_any_kind_of_id() -> None:
    assert split_sources({4: 1, 2: 9, 7: 5}) == ([4], [2, 7])


def test_split_errors() -> None:
    with pytest.raises(SelectionError, match="no sources"):
        split_sources({})
    with pytest.raises(SelectionError, match="negative counts"):
        split_sources({"a": 3, "b": -1})


# coreset_quotas


@given(COUNTS, st.data())
@property_test
def test_quotas_add_up_within_the_caps(counts: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(counts)))
    quotas = coreset_quotas(counts, total)
    assert sum(quotas) == total
    assert all(0 <= quota <= count for quota, count in zip(quotas, counts, strict=True))
    assert quotas == oracles.quotas(counts, total)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.data())
@property_test
def test_quotas_are_the_nearest_whole_shares(counts: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(counts)))
    assert coreset_quotas(counts, total) == oracles.nearest_whole_shares(counts, total)


@pytest.mark.parametrize(
    ("counts", "total", "quotas"),
    [
        ([5, 5, 5], 4, [2, 1, 1]),  # equal remainders: the lower id
        ([5, 5, 5], 5, [2, 2, 1]),
        ([1, 1, 1], 3, [1, 1, 1]),
        ([0, 4, 0], 3, [0, 3, 0]),
        ([3, 4], 0, [0, 0]),
        ([0, 0], 0, [0, 0]),
        ([], 0, []),
        ([98, 1, 1], 50, [49, 1, 0]),
        ([3, 1], 2, [2, 0]),  # shares 1.5 and 0.5: the lower id
    ],
)
def test_quotas_by_hand(counts: list[int], total: int, quotas: list[int]) -> None:
    assert coreset_quotas(counts, total) == quotas


@pytest.mark.parametrize(
    ("counts", "total", "message"),
    [([1, 2], 4, "4 picks of 3"), ([1, 2], -1, "-1 picks"), ([0], 1, "1 picks of 0"), ([2, -1], 1, "negative")],
)
def test_quotas_errors(counts: list[int], total: int, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        coreset_quotas(counts, total)


# share_out


def _positions(shares: Shares) -> list[int]:
    return shares.kept.tolist() + [i for pool in shares.pools for i in pool.positions.tolist()]


@given(
    sources=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    small=st.sets(st.integers(0, 4)),
    size=st.integers(1, 35),
    per_source=st.booleans(),
    data=st.data(),
)
@property_test
def test_shares_always_fill_the_coreset(
    sources: list[int], small: set[int], size: int, per_source: bool, data: st.DataObject
) -> None:
    present = data.draw(st.lists(st.booleans(), min_size=len(sources), max_size=len(sources)))
    shares = share_out(
        torch.tensor(sources),
        size,
        small,
        selectable=torch.tensor(present),
        per_source=per_source,
        generator=private_generator(0),
    )
    assert len(shares.kept) + sum(pool.quota for pool in shares.pools) == min(size, sum(present))
    positions = _positions(shares)
    assert len(set(positions)) == len(positions)
    assert all(present[i] for i in positions)
    assert all(sources[i] in small for i in shares.kept.tolist())
    assert shares.kept.tolist() == sorted(shares.kept.tolist())

    small_present = [i for i, source in enumerate(sources) if source in small and present[i]]
    assert shares.num_dropped_small == max(0, len(small_present) - size)
    if len(small_present) > size:
        assert not shares.pools
        return
    assert shares.kept.tolist() == small_present
    big_present = [i for i, source in enumerate(sources) if source not in small and present[i]]
    ids = sorted({sources[i] for i in big_present}) if per_source else [JOINT_POOL] * bool(big_present)
    members = [[i for i in big_present if source in (JOINT_POOL, sources[i])] for source in ids]
    quotas = oracles.quotas([len(m) for m in members], min(size - len(small_present), len(big_present)))
    expected = [(*pool,) for pool in zip(ids, members, quotas, strict=True) if pool[2] > 0]
    assert [(pool.source, pool.positions.tolist(), pool.quota) for pool in shares.pools] == expected


def test_too_many_small_examples_are_spread_in_proportion() -> None:
    sources = torch.tensor([0] * 6 + [1] * 3 + [2] * 3 + [9] * 20)
    shares = share_out(sources, 6, {0, 1, 2}, generator=private_generator(5))
    assert torch.bincount(sources[shares.kept], minlength=3).tolist() == [3, 2, 1]  # 3, 1.5, 1.5: the lower id
    assert shares.pools == []
    assert shares.num_dropped_small == 6


def test_the_order_within_a_small_source_is_random_and_seeded() -> None:
    sources = torch.tensor([0] * 20 + [1] * 20)

    def kept(seed: int) -> list[int]:
        return share_out(sources, 10, {0, 1}, generator=private_generator(seed)).kept.tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(20)}) > 15
    often = torch.zeros(40)
    for seed in range(400):
        often[kept(seed)] += 1
    assert float(often.min()) > 60  # 100 expected, standard deviation 9
    assert float(often.max()) < 140


def test_small_examples_that_just_fit_are_all_kept_without_randomness() -> None:
    shares = share_out(torch.tensor([1, 0, 1, 0]), 2, {0})
    assert shares.kept.tolist() == [1, 3]
    assert shares.pools == []
    assert shares.num_dropped_small == 0


def test_one_example_and_one_source() -> None:
    one = share_out(torch.tensor([3]), 5, ())
    assert [(pool.source, pool.positions.tolist(), pool.quota) for pool in one.pools] == [(3, [0], 1)]
    assert share_out(torch.tensor([3]), 5, {3}).kept.tolist() == [0]
    single = share_out(torch.tensor([7] * 6), 4, ())
    assert [(pool.source, len(pool.positions), pool.quota) for pool in single.pools] == [(7, 6, 4)]


def test_nothing_selectable_gives_nothing() -> None:
    shares = share_out(torch.tensor([0, 1]), 2, {0}, selectable=torch.zeros(2, dtype=torch.bool))
    assert len(shares.kept) == 0
    assert shares.pools == []


def test_a_source_without_id_is_no_joint_pool() -> None:
    shares = share_out(torch.tensor([-1, 0, -1, 0]), 2, ())
    assert [(pool.source, pool.positions.tolist(), pool.quota) for pool in shares.pools] == [
        (-1, [0, 2], 1),
        (0, [1, 3], 1),
    ]


@pytest.mark.parametrize("size", [0, -3])
def test_share_out_needs_a_size(size: int) -> None:
    with pytest.raises(SelectionError, match="coreset size"):
        share_out(torch.tensor([0]), size, ())


@pytest.mark.parametrize(
    ("num_small", "size", "batch_size", "share", "wanted"),
    [
        (7, 8, 16, None, 7),  # r = 2 b: all that are there
        (14, 8, 32, None, 7),  # r = 4 b: as many as 2 b examples would have
        (13, 8, 32, None, 7),  # half of one more counts as one
        (30, 8, 32, None, 8),  # never more than b
        (7, 8, 16, 1.0, 7),
        (7, 8, 16, 0.25, 2),
        (1, 8, 16, 0.25, 1),
        (7, 8, 16, 0.0, 0),
    ],
)
def test_how_many_small_ones_are_kept(
    num_small: int, size: int, batch_size: int, share: float | None, wanted: int
) -> None:
    assert most_kept(num_small, size, batch_size, share) == wanted


def test_a_share_of_small_sources_is_spread_over_them() -> None:
    sources = torch.tensor([0] * 8 + [1] * 4 + [2] * 20)
    shares = share_out(sources, 16, {0, 1}, small_share=0.375, generator=private_generator(5))
    assert torch.bincount(sources[shares.kept], minlength=3).tolist() == [4, 2, 0]
    assert shares.num_dropped_small == 6
    assert [(pool.source, len(pool.positions), pool.quota) for pool in shares.pools] == [(2, 20, 10)]


def test_small_ones_fill_up_what_others_can_not() -> None:
    sources = torch.tensor([0] * 12 + [1] * 4)
    shares = share_out(sources, 10, {0}, small_share=0.1, generator=private_generator(5))
    assert len(shares.kept) == 6
    assert shares.pools[0].quota == 4


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=8),
    st.integers(2, 24),
    st.integers(0, 10**6),
)
@property_test
def test_carried_quotas_keep_the_mixture(shares: list[int], size: int, seed: int) -> None:
    """Over 200 steps of random batches every source has its share to 2% or 1.5 picks."""
    generator = torch.Generator().manual_seed(seed)
    batch = 2 * size
    weights = torch.tensor(shares, dtype=torch.float64)
    carry: dict[int, float] = {}
    picked, exact = [0.0] * len(shares), [0.0] * len(shares)
    for _ in range(200):
        drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=len(shares)).tolist()
        quotas, carry = carried_quotas(dict(enumerate(counts)), size, carry)
        assert sum(quotas.values()) == size
        for source, count in enumerate(counts):
            assert 0 <= quotas.get(source, 0) <= count
            picked[source] += quotas.get(source, 0)
            exact[source] += size * count / batch
    for found, wanted in zip(picked, exact, strict=True):
        assert abs(found - wanted) <= max(0.02 * wanted, 1.5)
    assert abs(sum(carry.values())) < 1e-6


def test_a_small_big_source_gets_its_share() -> None:
    """At 8 of 16 one of 8% has 1.3 examples a step: by itself every step rounds its 0.64 picks up, or always down."""
    counts, carry, carried, alone = [15, 1], {}, 0, 0
    for _ in range(200):
        quotas, carry = carried_quotas(dict(enumerate(counts)), 8, carry)
        carried += quotas[1]
        alone += coreset_quotas(counts, 8)[1]
    assert carried == 100
    assert alone in (0, 200)


@pytest.mark.parametrize("total", [-1, 5])
def test_carried_quotas_refuse_what_can_not_be(total: int) -> None:
    with pytest.raises(SelectionError, match="Ask for 0 to 4"):
        carried_quotas({0: 4}, total, {})
