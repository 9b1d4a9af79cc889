"""Choose coresets before their examples are read, if the choice needs no pass of the model.

Rank 0 chooses in a thread, two steps ahead, and broadcasts positions and weights; every rank reads only what it
will train on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from colm_ds.batching.assign import home_ranks, training_ranks
from colm_ds.batching.loader import LargeBatchLoader
from colm_ds.errors import SelectionError
from colm_ds.selection import Exchange
from colm_ds.selection.exchange import broadcast_coreset
from colm_ds.types import Chosen, Coreset, Example, LargeBatch

Choose = Callable[[LargeBatch], Coreset]


@dataclass(frozen=True)
class _Plan:
    """A planned step, before it is broadcast.

    Attributes:
        facts: the large batch without its examples.
        coreset: rank 0's choice; None on the others.
    """

    facts: LargeBatch
    coreset: Coreset | None


class ChooseAhead:
    """Iterate over large batches with chosen coresets; all ranks take the next one together.

    When a batch is returned, all ranks know the next choice, and the one after that is being chosen. Threads read the
    examples of the next one meanwhile; without `num_workers` they are read when the batch is taken, by its thread. (A
    choice by token vectors whose table does not fit, of more than 2^31 labelled tokens, reads all examples of its
    batch in the thread that chooses.)
    """

    def __init__(
        self,
        loader: LargeBatchLoader,
        choose: Choose,
        exchange: Exchange,
        rank: int,
        *,
        size: int,
        carry: Mapping[int, float],
        reads_all: Callable[[int], bool],
    ) -> None:
        """Choose for the steps of a loader.

        Args:
            loader: provides facts and examples; its `next_step` is updated.
            choose: returns the coreset of a large batch without examples; called on rank 0, in a thread.
            exchange: the ranks.
            rank: this rank.
            size: b.
            carry: carry-over of the quotas so far, by source id.
            reads_all: whether all examples of a 1-based step are needed, as for measuring a gradient's variance.
        """
        self._loader = loader
        self._choose = choose
        self._exchange = exchange
        self._rank = rank
        self._size = size
        self._carry = dict(carry)
        self._reads_all = reads_all

    def __iter__(self) -> Iterator[LargeBatch]:
        """Yield the batches from `next_step` on.

        Raises:
            CoLMError: the error of choosing on rank 0; a SelectionError on the others.
        """
        step = self._loader.next_step
        with _Threads(1) as planner, _Threads(self._loader.num_workers or 1) as readers:
            reading = readers if self._loader.num_workers else None
            plan = planner.submit(self._plan, step)
            ahead = self._announce(plan, reading)
            plan = planner.submit(self._plan, step + 1)
            while True:
                current, ahead = ahead, self._announce(plan, reading)
                plan = planner.submit(self._plan, step + 2)
                batch = current()
                self._loader.next_step = step = step + 1
                yield batch

    def _plan(self, step: int) -> _Plan:
        facts = replace(self._loader.facts(step), carry=self._carry)
        coreset = self._choose(facts) if self._exchange.is_main else None
        if coreset is not None and coreset.carry is not None:
            self._carry = coreset.carry
        return _Plan(facts, coreset)

    def _announce(self, plan: Future[_Plan], reading: ThreadPoolExecutor | None) -> Callable[[], LargeBatch]:
        """Broadcast the choice and start reading; return a function that waits for the batch, or reads it."""
        made: _Plan | None = None
        failure: Exception | None = None
        try:
            made = plan.result()
        except Exception as error:
            failure = error
        if failure is not None and not (self._exchange.is_main and self._exchange.num_processes > 1):
            raise failure
        with self._exchange.counting("selection") as count:
            coreset = broadcast_coreset(
                None if made is None else made.coreset,
                self._size,
                len(self._loader.dataset.source_names),
                self._exchange,
                coherence=False,
            )
        if failure is not None:
            raise failure
        if coreset is None:
            raise SelectionError("rank 0 could not choose the next coreset; its message says why.")
        assert made is not None
        facts = replace(made.facts, home=self._homes(made.facts, coreset), chosen=Chosen(coreset, count.num_bytes))
        read = torch.arange(facts.size) if self._reads_all(facts.step) else coreset.positions
        wanted = read[facts.home[read] == self._rank].tolist()
        if reading is None:
            return lambda: replace(facts, examples={position: self._read(facts, position) for position in wanted})
        futures = {position: reading.submit(self._read, facts, position) for position in wanted}
        return lambda: replace(facts, examples={position: future.result() for position, future in futures.items()})

    def _read(self, facts: LargeBatch, position: int) -> Example:
        return self._loader.dataset[int(facts.indices[position])]

    def _homes(self, facts: LargeBatch, coreset: Coreset) -> Tensor:
        """Return the rank that reads and trains each chosen example, int64 `[r]`; the others keep the loader's.

        It is the same whether all examples are read or not, so that measuring a variance changes nothing in training.
        """
        world, positions = self._exchange.num_processes, coreset.positions
        home = facts.home.clone()
        home[positions] = home_ranks(facts.lengths[positions], world)
        for position, rank in training_ranks(positions.tolist(), facts.lengths, home, world).items():
            home[position] = rank
        return home


class _Threads(ThreadPoolExecutor):
    """A thread pool whose exit does not wait for unfinished work."""

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False, cancel_futures=True)
