"""A step that an error ends: what was read is read again, and a part of a gradient is never added to another."""

from __future__ import annotations

from typing import Any

import pytest

from colm_ds.errors import LoopError
from tests.engine.oracle import largest_difference
from tests.engine.test_loop import make
from tests.engine.training import Case, parameters
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed


class Unsteady(list[Any]):
    """Records of which one cannot be read at times."""

    broken = False

    def __getitem__(self, index: Any) -> Any:
        if self.broken:
            raise OSError("the disk is away")
        return super().__getitem__(index)


def read_again(case: Case) -> list[Any]:
    """In a rank: three steps of which the second is read three times, beside three undisturbed ones."""
    records = Unsteady(case.records())
    engine, _ = make(case, training_data=records)
    steps, said = [engine.train_batch().step], []
    for _ in range(2):
        records.broken = True
        try:
            for _ in range(9):  # a choice that is made ahead may have read some
                steps.append(engine.train_batch().step)
        except OSError as error:
            said.append(str(error))
        records.broken = False
    while len(steps) < 12:
        steps.append(engine.train_batch().step)
    disturbed = parameters(engine)
    engine.destroy()
    engine, _ = make(case)
    for _ in range(12):
        engine.train_batch()
    plain = parameters(engine)
    engine.destroy()
    return [steps, said, largest_difference(plain, disturbed)]


@pytest.mark.parametrize("selector", ["random", "keep_random"])
def test_what_could_not_be_read_is_read_again(selector: str, pools: dict[int, Ranks]) -> None:
    steps, said, difference = pools[1].run(read_again, Case("again", colm={"selector": selector}))[0]
    assert steps == list(range(1, 13))
    assert said == ["the disk is away"] * 2
    assert difference == 0.0


def broken_off(case: Case, by_loop: bool) -> list[str]:
    """In a rank: what is said after an error in the second backward pass of a step, and before that."""
    engine, loader = make(case)
    engine.train_batch()
    calls, backward, said = [], engine.deepspeed_engine.backward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return backward(*args, **kwargs)

    engine.deepspeed_engine.backward = failing
    try:
        if by_loop:
            for batch in loader:
                engine.backward(engine(**batch).loss)
                engine.step()
        engine.train_batch()
    except RuntimeError as error:
        said.append(str(error))
    del engine.deepspeed_engine.backward
    for do in (lambda: next(iter(loader)), engine.train_batch, lambda: engine.save_checkpoint("nowhere")):
        try:
            do()
        except LoopError as error:
            said.append(str(error))
    engine.destroy()
    return said


@pytest.mark.parametrize("by_loop", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_part_of_a_gradient_is_not_trained_on(stage: int, by_loop: bool, pools: dict[int, Ranks]) -> None:
    case = Case("part", stage=stage, colm={"selector": "random"})
    (said,) = pools[1].run(broken_off, case, by_loop)
    assert said[0] == "no memory"
    assert said[1].startswith("a loop over the loader: an error broke off step 2, and what was done of its choice")
    assert said[2].startswith("train_batch: an error broke off step 2")
    assert said[3].startswith(("engine.save_checkpoint: a loop", "save_checkpoint: an error broke off step 2"))
