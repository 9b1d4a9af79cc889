"""Choosing ahead: the choice is that of the step, only chosen rows are read, what was chosen can be dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.training import CORESET, Case, start, step
from tests.ranks import Ranks

TOKENS = {"probe": {"estimator": "tokens"}}
STEPS = 5


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Any:
    with Ranks(request.param) as pool:
        yield pool


class Counted:
    """A sourced dataset that notes which rows are read."""

    def __init__(self, case: Case) -> None:
        from colm_ds.batching.loader import RecordDataset

        self.inner = RecordDataset(case.records())
        self.read: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.inner[index]


def observe(case: Case) -> dict[str, Any]:
    """In a rank: what is read, and whether the step itself would have chosen the same."""
    data = Counted(case)
    engine = start(case, training_data=data)
    first = engine.train_batch()  # makes the table
    data.read.clear()
    carry = dict(engine.coreset_selector.carry)
    steps, homes = [], []
    for _ in range(STEPS):
        seen = step(engine)
        steps.append((seen.chosen, seen.weights))
        homes.append(seen.stats["exchange_bytes"])
    read = list(data.read)
    in_step = []
    engine.coreset_selector.carry = carry
    for number in range(2, STEPS + 2):
        selection = engine.coreset_selector(engine.loader.batch(number))
        in_step.append((selection.batch.indices[selection.positions].tolist(), selection.weights.tolist()))
    engine.destroy()
    return {"first": first.examples_trained, "read": read, "steps": steps, "in step": in_step, "bytes": homes}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "colm",
    [
        TOKENS,
        {**TOKENS, "selector": "importance"},
        pytest.param({**TOKENS, "selector": "balanced"}, marks=pytest.mark.slow),
        {**TOKENS, "loss_normalization": "token", "small_sources": ["drama"], "per_source": True},
        pytest.param({**TOKENS, "schedule": {"start_step": 1, "every": 2}}, marks=pytest.mark.slow),
        {"selector": "keep_random", "num_workers": 2},
    ],
    ids=["tokens", "importance", "balanced", "by token", "schedule", "keep_random"],
)
def test_only_chosen_rows_are_read_and_the_choice_is_that_of_the_step(ranks: Ranks, colm: dict[str, Any]) -> None:
    seen = ranks.run(observe, Case("ahead", colm=colm, stage=2))
    for found in seen:
        assert found["first"] == CORESET
        assert found["steps"] == found["in step"]
        assert found["steps"] == seen[0]["steps"]
        assert all(each["tokens"] == 0 for each in found["bytes"])  # read where they are trained: nothing moves
    chosen = sorted(index for indices, _ in seen[0]["steps"] for index in indices)
    read = sorted(index for found in seen for index in found["read"])
    ahead = CORESET  # of the step after the last one
    assert len(read) <= len(chosen) + ahead
    assert not set(chosen[:-1]) - set(read) - set(seen[0]["steps"][0][0])


def regroup(case: Case) -> list[Any]:
    """In a rank: other sources in the middle of the run; the next choice is theirs."""
    engine = start(case)
    for _ in range(2):
        engine.train_batch()
    engine.set_sources(["even", "odd", "few"], np.array([n % 2 if n > 8 else 2 for n in range(123)]))
    found = [step(engine) for _ in range(2)]
    wanted = [engine.coreset_selector(engine.loader.batch(number)) for number in (3, 4)]
    engine.destroy()
    return [
        [seen.chosen for seen in found],
        [one.batch.indices[one.positions].tolist() for one in wanted],
        [seen.stats["coreset"]["per_source"] for seen in found],
    ]


@pytest.mark.distributed
def test_other_sources_drop_what_was_chosen_ahead(ranks: Ranks) -> None:
    case = Case("regroup", colm={**TOKENS, "small_sources": "none", "per_source": True})
    for found, wanted, counts in ranks.run(regroup, case):
        assert found == wanted
        assert all(each.keys() == {"even", "odd", "few"} for each in counts)


def fail(case: Case) -> str:
    """In a rank: choosing fails in the thread of rank 0."""
    engine = start(case)

    def broken(batch: Any) -> Any:
        raise RuntimeError("the choice is broken")

    engine.coreset_selector.chooser = lambda dataset: broken
    try:
        engine.train_batch()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
    return ""


@pytest.mark.distributed
def test_a_failure_of_rank_0_is_everybodys(ranks: Ranks) -> None:
    said = ranks.run(fail, Case("fails", colm=TOKENS))
    assert said[0] == "RuntimeError: the choice is broken"
    assert all("rank 0 could not choose" in each for each in said[1:])


def own_selector(case: Case) -> list[tuple[int, int]]:
    """In a rank: a selector that does not say it can choose ahead sees the examples, and no step before its time."""
    from colm_ds.selection import SELECTORS
    from colm_ds.selection.selectors import RandomSelector

    seen = []

    class Looking(RandomSelector):
        can_choose_ahead = False

        def select(self, batch: Any, signals: Any, exchange: Any) -> Any:
            seen.append((batch.step, len(batch.examples)))
            return super().select(batch, signals, exchange)

    SELECTORS["looking"] = Looking
    try:
        engine = start(case)
        for _ in range(2):
            engine.train_batch()
        engine.destroy()
    finally:
        del SELECTORS["looking"]
    return seen


@pytest.mark.distributed
def test_a_selector_that_looks_at_examples_is_asked_in_its_step(ranks: Ranks) -> None:
    for found in ranks.run(own_selector, Case("looking", colm={"selector": "looking"})):
        assert [step for step, _ in found] == [1, 2]
        assert all(number >= 14 for _, number in found)


def unknown_token(case: Case, where: int) -> str:
    """In a rank: one example holds a token id that the model does not know."""
    records = case.records()
    records[where] = {**records[where], "input_ids": [5, 6, 500], "labels": [-100, -100, 500]}
    try:
        start(case, training_data=records)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("where", [0, 11])
def test_an_unknown_token_is_said_before_training_on_every_rank(ranks: Ranks, where: int) -> None:
    for said in ranks.run(unknown_token, Case("unknown", colm=TOKENS), where):
        assert said.startswith("ConfigError: 1 problem in model")
        assert f"token id = 500: in example {where}, and the model has embeddings for 97 ids" in said


def tables(case: Case, folder: str) -> dict[str, Any]:
    """In a rank: the table from the dataset, again from the cache, and the rows looked up one by one."""
    from pathlib import Path

    from colm_ds.batching.loader import RecordDataset
    from colm_ds.distributed.exchange import make_exchange
    from colm_ds.engine.token_table import mean_table, occurring_ids
    from colm_ds.probe.tokens import mean_vectors, vectors_of_model

    rank = torch.distributed.get_rank()
    exchange = make_exchange(torch.device("cpu"))
    data = RecordDataset(case.records())
    model = case.build_model()
    occurs = occurring_ids(data, 97, exchange, rank)
    vectors = vectors_of_model(model, 3, exchange, occurs)
    plain = mean_table(data, vectors, exchange, rank)
    cache = Path(folder), "tokens"
    stored, again = (mean_table(data, vectors, exchange, rank, cache) for _ in range(2))
    rows = mean_vectors([data[index] for index in range(len(data))], vectors)
    alone = torch.cat([mean_vectors([data[index]], vectors) for index in range(len(data))])
    wanted = sorted({label for one in case.records() for label in one["labels"][1:] if label >= 0})
    same = None if plain is None else [torch.equal(plain, other) for other in (stored, again, rows, alone)]
    return {"same": same, "occurs": occurs.nonzero().flatten().tolist() == wanted, "rows": rows.double().sum().item()}


@pytest.mark.distributed
def test_table_from_cache_and_by_rows(ranks: Ranks, tmp_path: Any) -> None:
    seen = ranks.run(tables, Case("table"), str(tmp_path))
    assert seen[0]["same"] == [True] * 4
    assert all(found["same"] is None for found in seen[1:])
    assert all(found["occurs"] for found in seen)
    assert len({found["rows"] for found in seen}) == 1


def choices(case: Case) -> list[tuple[list[int], list[float]]]:
    """In a rank: what a few steps chose, with its weights."""
    engine = start(case)
    seen = [step(engine) for _ in range(STEPS)]
    engine.destroy()
    return [(each.chosen, each.weights) for each in seen]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("selector", ["colm", "balanced", "importance"])
def test_the_choice_is_bitwise_the_same_at_1_2_and_4_ranks_and_every_stage(selector: str) -> None:
    """Whatever the step did to the weights in the meantime: signals are those of the first ones."""
    made = []
    for world_size in (1, 2, 4):
        with Ranks(world_size) as pool:
            for stage in (0, 1, 2, 3):
                case = Case(f"everywhere {selector}", colm={**TOKENS, "selector": selector}, stage=stage)
                made += pool.run(choices, case)
    assert len(made) == 4 * (1 + 2 + 4)
    assert len(made[0]) == STEPS
    assert all(each == made[0] for each in made)
