"""Sources that are clusters made while training: from the prompts' states, the same on all ranks, resumed bitwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colm_ds.batching.loader import RecordDataset
from colm_ds.data.clusters import Clusters, cluster_together, hidden_features, prompt_of
from colm_ds.distributed.exchange import make_exchange
from colm_ds.models.example_loss import find_loss_head
from colm_ds.recipes.choices import ClusterConfig
from tests.choices import random_choices
from tests.engine.training import NOTHING_PERSISTS, Case, parameters, records, start, step
from tests.ranks import Ranks
from tests.tiny_models import tiny_model

pytest.importorskip("sklearn")
pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
STEPS = 7
CLUSTERS = {"num": [2, 4], "warmup_steps": 2, "refresh_steps": [4, 6]}
CASE = Case(
    "clusters",
    colm={"probe": {"estimator": "spsa"}, "schedule": {"start_step": 2}, "mask": {"size": 16}},
    stage=2,
    steps=STEPS,
)


def data(kind: str) -> Any:
    """Questions, or records of one source."""
    return random_choices(80) if kind == "choices" else RecordDataset(records({"a": 60}))


def features(kind: str, family: str) -> tuple[Tensor, Clusters]:
    """In a rank: features and clusters of the data under a model."""
    model, dataset, exchange = tiny_model(family), data(kind), make_exchange(CPU)
    found = hidden_features(
        model,
        model,
        find_loss_head(model),
        dataset,
        device=CPU,
        exchange=exchange,
        rank=dist.get_rank(),
        max_tokens=90,
    )
    return found, cluster_together(found, len(dataset), (2, 4), 0, exchange)


@pytest.mark.parametrize(("kind", "family"), [("choices", "llama"), ("records", "phi")])
def test_features_are_those_of_the_prompts(kind: str, family: str, pools: dict[int, Ranks]) -> None:
    """And the same on 1 and 2 ranks bit by bit, as are the clusters."""
    model, dataset = tiny_model(family), data(kind)
    ((alone, clusters),) = pools[1].run(features, kind, family)
    with torch.no_grad():
        states = [
            model.model(input_ids=prompt_of(one)[None]).last_hidden_state[0, -1]
            for one in map(dataset.__getitem__, range(len(dataset)))
        ]
    assert torch.allclose(alone, torch.stack(states), atol=1e-5)
    (main, one), (rest, other) = pools[2].run(features, kind, family)
    assert torch.equal(main, alone)
    assert len(rest) == 0
    for made in (one, other):
        assert (made.labels == clusters.labels).all()
        assert made.silhouettes == clusters.silhouettes


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a run."""

    chosen: list[list[int]]
    facts: list[dict[str, Any]]
    per_source: list[dict[str, int]]
    history_kept: list[bool]
    parameters: dict[str, Tensor]


class PlainTask:
    """A task without anything to measure."""

    def __init__(self, train: Any) -> None:
        self.train = train

    def begin_step(self, run: Any, step: int) -> dict[str, Any]:
        return {}


def train(case: Case, kind: str, folder: str, resume_after: int | None) -> Outcome:
    """Run in a rank; from a checkpoint of the run before, or saving after every step."""
    from colm_ds.training.tasks.base import InTraining
    from colm_ds.training.tasks.clusters import ClusteredTask

    dataset = data(kind)
    engine = start(case, training_data=dataset)
    recipe: Any = SimpleNamespace(seed=0, steps=STEPS, model=SimpleNamespace(dtype="float32"))
    task = ClusteredTask(PlainTask(dataset), recipe, ClusterConfig.model_validate(CLUSTERS), None)  # type: ignore[arg-type]
    run = InTraining(engine, None, CPU, make_exchange(CPU), dist.get_rank())
    first = 1
    try:
        if resume_after is not None:
            engine.load_checkpoint(folder, f"step_{resume_after}")
            first = resume_after + 1
        chosen, facts, per_source, kept = [], [], [], []
        for number in range(first, STEPS + 1):
            before = str(engine.coreset_selector.selector.state_dict())
            facts.append({key: {**value, "time_s": 0} for key, value in task.begin_step(run, number).items()})
            kept.append(str(engine.coreset_selector.selector.state_dict()) == before)
            seen = step(engine)
            chosen.append(sorted(seen.chosen))
            per_source.append(seen.stats["coreset"]["per_source"])
            if resume_after is None:
                engine.save_checkpoint(folder)
        return Outcome(chosen, facts, per_source, kept, parameters(engine))
    finally:
        engine.destroy()


@pytest.mark.parametrize("kind", ["choices", pytest.param("records", marks=pytest.mark.slow)])
def test_training_with_clusters_and_resuming(kind: str, pools: dict[int, Ranks], tmp_path: Path) -> None:
    whole = pools[2].run(train, CASE, kind, str(tmp_path), None)
    first = whole[0]
    made = [number for number, facts in enumerate(first.facts, start=1) if facts]
    assert made == [3, 5, 7]
    for number in made:
        clusters = first.facts[number - 1]["clusters"]
        counts = clusters["counts"]
        assert sum(counts.values()) == len(data(kind))
        assert clusters["small"] == [name for name, n in counts.items() if n < len(data(kind)) / len(counts)]
        assert list(first.per_source[number - 1]) == list(counts)
        assert sorted(clusters["silhouettes"]) == ["2", "3", "4"]
    assert list(first.per_source[0]) in (["all"], ["a"])
    assert all(first.history_kept)
    for other in whole[1:]:
        assert (other.chosen, other.facts, other.per_source) == (first.chosen, first.facts, first.per_source)
    for after in (3,) if kind == "records" else (2, 3, 4):  # before the first clusters, within them, before a refresh
        resumed = pools[2].run(train, CASE, kind, str(tmp_path), after)
        for seen, before in zip(resumed, whole, strict=True):
            assert seen.chosen == before.chosen[after:]
            assert seen.facts == before.facts[after:]
            assert seen.per_source == before.per_source[after:]
        for name, value in resumed[0].parameters.items():
            assert torch.equal(value, first.parameters[name]), name


def test_one_rank_chooses_alike(pools: dict[int, Ranks], tmp_path: Path) -> None:
    """And two with the weights cut up between them."""
    (alone,) = pools[1].run(train, CASE, "choices", str(tmp_path / "one"), None)
    cut_up = replace(CASE, stage=3, zero=NOTHING_PERSISTS)
    together = pools[2].run(train, cut_up, "choices", str(tmp_path / "two"), None)[0]
    assert [facts.get("clusters", {}).get("counts") for facts in alone.facts] == [
        facts.get("clusters", {}).get("counts") for facts in together.facts
    ]
    assert alone.chosen == together.chosen
