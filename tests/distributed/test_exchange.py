"""The exchange between ranks, over the process group and through a device, and the coreset that travels with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colm_ds.distributed.exchange import DeviceExchange, ProcessGroupExchange, make_exchange
from colm_ds.randomness import private_generator
from colm_ds.selection import SINGLE_PROCESS, Exchange
from colm_ds.selection.exchange import broadcast_coreset
from colm_ds.types import Coreset
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

NUM_ROWS, WIDTH = 7, 3
POSITIONS = [[5, 0], [], [6, 2, 3]]
"""Rows that each of three ranks contributes; rows 1 and 4 are nobody's."""


def values(*parts: int, size: tuple[int, ...] = (4,)) -> Tensor:
    """Random numbers of a rank."""
    return torch.randn(size, generator=private_generator(0, "exchange", *parts))


def exchange_of(kind: str) -> Any:
    """The exchange under test."""
    plain = ProcessGroupExchange()
    return plain if kind == "process group" else DeviceExchange(plain, torch.device("cpu"))


def collect(kind: str) -> dict[str, Any]:
    """In a rank: what every collective returns, and what it was given afterwards."""
    exchange, rank = exchange_of(kind), dist.get_rank()
    found: dict[str, Any] = {"is_main": exchange.is_main, "num_processes": exchange.num_processes}
    given = values(rank)
    with exchange.counting("sums") as count:
        found["sum"], found["in place"] = exchange.sum(given), given
        found["sum of doubles"] = exchange.sum(values(rank).double())
        with exchange.counting("inner") as inner:
            exchange.sum(values(rank))
        found["sum of a number"] = exchange.sum(torch.tensor(rank + 1))
    found["bytes of sums"], found["kind"], found["bytes inside"] = count.num_bytes, count.kind, inner.num_bytes
    exchange.sum(values(rank))  # counted nowhere
    rows = values(rank, size=(NUM_ROWS, WIDTH))[POSITIONS[rank]]
    before = rows.clone()
    with exchange.counting("rows") as count:
        found["rows"] = exchange.gather_rows(rows, torch.tensor(POSITIONS[rank], dtype=torch.int64), NUM_ROWS)
    found["rows kept"] = torch.equal(rows, before)
    found["bytes of rows"] = count.num_bytes
    integers = torch.arange(5) * (rank + 1)
    with exchange.counting("broadcast") as count:
        found["broadcast"], found["broadcast in place"] = exchange.broadcast(integers), integers
    found["bytes of broadcast"] = count.num_bytes
    return found


@pytest.mark.parametrize("kind", ["process group", "device"])
def test_collectives(kind: str, three_ranks: Ranks) -> None:
    total = values(0) + values(1) + values(2)
    rows = torch.zeros(NUM_ROWS, WIDTH)
    for rank, positions in enumerate(POSITIONS):
        rows[positions] = values(rank, size=(NUM_ROWS, WIDTH))[positions]
    for rank, found in enumerate(three_ranks.run(collect, kind)):
        assert (found["is_main"], found["num_processes"]) == (rank == 0, 3)
        torch.testing.assert_close(found["sum"], total)
        assert torch.equal(found["sum"], found["in place"])
        torch.testing.assert_close(found["sum of doubles"].float(), total)
        assert int(found["sum of a number"]) == 6
        assert (found["kind"], found["bytes of sums"]) == ("sums", 4 * 4 + 4 * 8 + 8)
        assert found["bytes inside"] == 4 * 4
        assert torch.equal(found["rows"], rows)  # one contributor each: exact
        assert found["rows kept"]
        assert found["bytes of rows"] == NUM_ROWS * WIDTH * 4
        assert found["broadcast"].tolist() == found["broadcast in place"].tolist() == [0, 1, 2, 3, 4]
        assert found["bytes of broadcast"] == 5 * 8


def test_through_a_device_is_the_same_bitwise(three_ranks: Ranks) -> None:
    for plain, through in zip(*(three_ranks.run(collect, kind) for kind in ("process group", "device")), strict=True):
        for name, value in plain.items():
            assert torch.equal(value, through[name]) if isinstance(value, Tensor) else value == through[name], name


def special_rows(dtype: torch.dtype) -> Tensor:
    """In a rank: rows of which some are not finite."""
    rank = dist.get_rank()
    rows = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [-3.0, 4.0]])[rank : rank + 1].to(dtype)
    return make_exchange(torch.device("cpu")).gather_rows(rows, torch.tensor([2 - rank]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_not_finite_stay_in_their_row(dtype: torch.dtype, three_ranks: Ranks) -> None:
    wanted = torch.tensor([[-3.0, 4.0], [float("inf"), 2.0], [1.0, float("nan")]], dtype=dtype)
    for found in three_ranks.run(special_rows, dtype):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def exchange_in_a_group() -> tuple[bool, int, list[int], list[int]] | None:
    """In a rank: an exchange between ranks 1 and 2 only."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    exchange = make_exchange(torch.device("cpu"), group)
    mine = torch.tensor([dist.get_rank()])
    sent, total = exchange.broadcast(mine.clone()).tolist(), exchange.sum(mine).tolist()
    return exchange.is_main, exchange.num_processes, sent, total


def test_a_group_of_some_ranks(three_ranks: Ranks) -> None:
    """Its main process is its own first, not rank 0."""
    assert three_ranks.run(exchange_in_a_group) == [None, (True, 2, [1], [3]), (False, 2, [1], [3])]


CORESETS = [
    Coreset(torch.tensor([4, 0, 9]), torch.tensor([1.0, 0.1, 1.9]), 1, 2, 3, {0: 0.25, 2: 1.0}),
    Coreset(torch.tensor([8]), torch.tensor([1.0]), coherence={-1: 0.5}),
    Coreset(torch.arange(6), torch.ones(6), num_kept=6),
    Coreset(torch.empty(0, dtype=torch.int64), torch.empty(0), num_nonfinite=12),
]


def broadcast(coresets: list[Coreset]) -> list[Coreset]:
    """In a rank: rank 0's coresets."""
    exchange = make_exchange(torch.device("cpu"))
    return [broadcast_coreset(one if exchange.is_main else None, 6, 3, exchange) for one in coresets]


def same_coreset(one: Coreset, other: Coreset) -> bool:
    """Equality in all parts and types."""
    tensors = zip((one.positions, one.weights), (other.positions, other.weights), strict=True)
    numbers = [(c.num_kept, c.num_dropped_small, c.num_nonfinite, c.coherence) for c in (one, other)]
    return numbers[0] == numbers[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


def test_coreset_of_the_main_process(three_ranks: Ranks) -> None:
    for found in three_ranks.run(broadcast, CORESETS):
        assert all(same_coreset(one, other) for one, other in zip(found, CORESETS, strict=True))


def test_alone() -> None:
    exchange: Exchange = make_exchange(torch.device("cpu"))
    assert exchange is SINGLE_PROCESS
    assert broadcast_coreset(CORESETS[0], 6, 3, exchange) is CORESETS[0]
