"""Examples trained on another rank than the one that holds them arrive there whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from colm_ds.batching.move import move_examples
from colm_ds.distributed.exchange import ProcessGroupExchange
from colm_ds.randomness import private_generator
from colm_ds.types import Candidates, CandidateTable, Example, LargeBatch
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

LENGTHS = [5, 1, 8, 3, 2, 6, 4]
HOME = [0, 1, 2, 0, 1, 2, 0]
Move = tuple[int, int, int]


def example(position: int) -> Example:
    """The example at a position: large token ids, some places without a label."""
    generator = private_generator(0, "example", position)
    input_ids = torch.randint(0, 250_000, (LENGTHS[position],), generator=generator)
    labels = torch.where(torch.rand(LENGTHS[position], generator=generator) < 0.5, -100, input_ids)
    return Example(input_ids, labels, source=position % 3, index=1000 + position)


def arrive(moves: list[Move], table: CandidateTable | None = None) -> tuple[dict[int, Example], int]:
    """In a rank: what comes here, and the bytes that travelled."""
    rank, exchange = dist.get_rank(), ProcessGroupExchange()
    held = {position: example(position) for position, home in enumerate(HOME) if home == rank}
    before = dict(held)
    lengths = torch.tensor(LENGTHS)
    facts = {"indices": torch.tensor([1000 + p for p in range(7)]), "sources": torch.tensor([p % 3 for p in range(7)])}
    batch = LargeBatch(
        1, **facts, lengths=lengths, num_label_tokens=lengths, home=torch.tensor(HOME), examples=held, candidates=table
    )
    with exchange.counting("tokens") as count:
        arrived = move_examples(batch, moves, rank, exchange)
    assert held == before
    return arrived, count.num_bytes


@pytest.mark.parametrize(
    "moves",
    [
        [(0, 0, 2)],
        [(0, 0, 1), (2, 2, 1), (4, 1, 0), (5, 2, 0), (6, 0, 2)],
        [(1, 1, 0), (3, 0, 1)],
        [(position, home, (home + 1) % 3) for position, home in enumerate(HOME)],
    ],
)
def test_tokens_arrive(moves: list[Move], three_ranks: Ranks) -> None:
    for rank, (arrived, num_bytes) in enumerate(three_ranks.run(arrive, moves)):
        assert sorted(arrived) == [position for position, _, target in moves if target == rank]
        for position, found in arrived.items():
            wanted = example(position)
            assert torch.equal(found.input_ids, wanted.input_ids)
            assert torch.equal(found.labels, wanted.labels)
            assert found.input_ids.dtype == found.labels.dtype == torch.int64
            assert (found.source, found.index) == (wanted.source, wanted.index)
        assert num_bytes == 2 * 4 * sum(LENGTHS[position] for position, _, _ in moves)


def test_candidates_arrive(three_ranks: Ranks) -> None:
    """The tokens of all candidates travel, also those that are not computed, and how they are divided."""
    divided = [[length - length // 2, length // 2] for length in LENGTHS]
    table = CandidateTable(torch.tensor(divided), torch.tensor([0, 0, 1, 1, 0, 1, 0]), torch.ones(7), torch.ones(7))
    moves: list[Move] = [(0, 0, 1), (1, 1, 0), (5, 2, 0)]
    for rank, (arrived, _) in enumerate(three_ranks.run(arrive, moves, table)):
        assert sorted(arrived) == [position for position, _, target in moves if target == rank]
        for position, found in arrived.items():
            assert torch.equal(found.input_ids, example(position).input_ids)
            lengths = tuple(length for length in divided[position] if length)
            assert found.candidates == Candidates(lengths, int(table.golds[position]))


def test_nothing_moves(three_ranks: Ranks) -> None:
    """No collective then."""
    assert three_ranks.run(arrive, []) == [({}, 0)] * 3
