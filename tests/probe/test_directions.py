"""Directions are standard normal, the same however they are read, and nobody else's random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_ds.probe import directions as directions_module
from colm_ds.probe.directions import Directions, sign_vectors

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Blocks of 16 coordinates, so that small directions have many."""
    monkeypatch.setattr(directions_module, "_BLOCK", 16)
    return monkeypatch


@pytest.mark.parametrize("num_coordinates", [1, 15, 16, 17, 31, 33, 101])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_cached_and_blockwise_agree(small_blocks: pytest.MonkeyPatch, num_coordinates: int, num_probes: int) -> None:
    cached = Directions(5, 2, num_probes, num_coordinates)
    whole = cached.chunk(0, num_coordinates)
    small_blocks.setattr(directions_module, "_CACHE_BYTES", 0)
    blockwise = Directions(5, 2, num_probes, num_coordinates)
    assert cached._cache is not None
    assert blockwise._cache is None
    assert whole.shape == (num_probes, num_coordinates)
    assert whole.dtype == torch.float32
    assert torch.equal(blockwise.chunk(0, num_coordinates), whole)
    for directions in (cached, blockwise):
        for probe in range(num_probes):
            assert torch.equal(directions.direction(probe), whole[probe])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_is_that_part_of_the_whole(data: st.DataObject) -> None:
    num_coordinates = data.draw(st.integers(1, 120))
    start = data.draw(st.integers(0, num_coordinates - 1))
    stop = data.draw(st.integers(start + 1, num_coordinates))
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, num_coordinates - 1), min_size=1))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directions_module, "_BLOCK", 16)
        cached = Directions(1, 1, 2, num_coordinates)
        patch.setattr(directions_module, "_CACHE_BYTES", 0)
        blockwise = Directions(1, 1, 2, num_coordinates)
        whole = cached.chunk(0, num_coordinates)
        for directions in (cached, blockwise):
            assert torch.equal(directions.chunk(start, stop), whole[:, start:stop])
            assert torch.equal(directions.columns(index), whole[:, index])


def test_large_sets_are_not_kept() -> None:
    limit = directions_module._CACHE_BYTES // 4
    assert Directions(0, 0, 2, limit // 2)._cache is not None
    assert Directions(0, 0, 2, limit // 2 + 1)._cache is None


def test_seed_step_and_probe_make_them_different() -> None:
    base = Directions(0, 1, 2, 50)
    others = [Directions(1, 1, 2, 50), Directions(0, 2, 2, 50), Directions(1, 0, 2, 50)]
    seen = {tuple(directions.direction(probe).tolist()) for directions in [base, *others] for probe in range(2)}
    assert len(seen) == 8
    assert torch.equal(Directions(0, 1, 2, 50).chunk(0, 50), base.chunk(0, 50))
    assert torch.equal(Directions(0, 1, 5, 50).chunk(0, 50)[:2], base.chunk(0, 50))  # whatever K is


def test_standard_normal_and_uncorrelated() -> None:
    num_coordinates, num_probes = 200_000, 3
    values = Directions(0, 1, num_probes, num_coordinates).chunk(0, num_coordinates).double()
    error = num_coordinates**-0.5  # five standard errors below
    assert values.mean(dim=1).abs().max() < 5 * error
    assert (values.square().mean(dim=1) - 1).abs().max() < 5 * error * 2**0.5
    assert values.pow(3).mean(dim=1).abs().max() < 5 * error * 15**0.5
    assert (values.pow(4).mean(dim=1) - 3).abs().max() < 5 * error * 96**0.5
    between = values @ values.T / num_coordinates
    assert (between - torch.eye(num_probes)).abs().max() < 5 * error * 2**0.5
    block = directions_module._BLOCK
    neighbours = (values[0, :block] * values[0, block : 2 * block]).mean()
    assert abs(float(neighbours)) < 5 * block**-0.5


def test_sign_vectors() -> None:
    signs = sign_vectors(0, "rows", 1, 64, 33, CPU)
    assert signs.shape == (64, 33)
    assert signs.dtype == torch.float32
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 * (64 * 33) ** -0.5
    assert torch.equal(signs, sign_vectors(0, "rows", 1, 64, 33, CPU))
    for other in ((1, "rows", 1), (0, "columns", 1), (0, "rows", 2)):
        assert not torch.equal(signs, sign_vectors(*other, 64, 33, CPU))


def test_global_rng_is_left_alone() -> None:
    before = torch.get_rng_state()
    Directions(0, 1, 2, 50).chunk(0, 50)
    sign_vectors(0, "rows", 1, 4, 5, CPU)
    assert torch.equal(torch.get_rng_state(), before)
