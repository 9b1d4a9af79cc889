"""The same examples are chosen at any number of ranks and any stage of ZeRO, and they are the right ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from colm_ds.selection import AdamHistory, DenseGradients, SelectionSettings, Signals, select_coreset
from tests.engine.cases import matrix_case
from tests.engine.conftest import Runner
from tests.engine.oracle import plain_training, token_losses
from tests.engine.training import BETAS, CORESET, EPS, LARGE, NOTHING_PERSISTS, SMALL_SOURCES, SOURCES, Case, Record

EXACT = {"probe": {"estimator": "exact"}}

VARIANTS: dict[str, dict[str, Any]] = {
    "joint pool": {"per_source": False},
    "no small sources": {"small_sources": "none"},
    "one pool of all": {"per_source": False, "small_sources": "none"},
    "small sources by name": {"small_sources": ["code", "essays"]},
    "small sources by id": {"small_sources": [3]},
    "more small examples than b": {"small_sources": ["algebra", "biology"]},
    "a mask by weight": {"mask": {"criterion": "weight", "size": 40}},
    "a mask by weight and gradient": {"mask": {"criterion": "weight_grad", "size": 40}, "metric": "cosine"},
    "a random mask": {"mask": {"criterion": "random", "size": 40}, "metric": "euclidean"},
    "directions for the run": {"probe": {"estimator": "spsa", "refresh": "run", "num_probes": 3}},
    "probe micro-batches": {"probe": {"estimator": "exact", "max_tokens": 50}},
    "plain geometry": {"geometry": "plain"},
    "all of Q, K and V": {"probe": {"estimator": "exact", "layer": "qkv"}},
    "the MLP's output": {"probe": {"estimator": "exact", "layer": "fc"}},
    "random projections": {"probe": {"estimator": "projection", "num_probes": 8}},
    "low-rank steps": {"probe": {"estimator": "spsa", "direction_rank": 2, "num_probes": 3, "refresh": "run"}},
    "a sketch in plain geometry": {"probe": {"estimator": "sketch"}, "geometry": "plain"},
    "probe of a part": {"probe": {"estimator": "exact", "sample": 0.6}},
    "token embeddings": {"probe": {"estimator": "tokens"}},
    "medoids by token embeddings": {"selector": "colm", "probe": {"estimator": "tokens"}},
    "balanced draws": {"selector": "balanced"},
    "draws by importance": {"selector": "importance"},
    "some of the tokens": {"probe": {"estimator": "exact", "token_sample": 0.4}},
}

BY_DEFAULT = (
    *("more small examples than b", "a mask by weight and gradient", "the MLP's output", "random projections"),
    *("low-rank steps", "medoids by token embeddings", "draws by importance", "some of the tokens"),
)

MANY = {"algebra": 300, "biology": 40, "code": 10}


def source_of(data: list[Record], indices: list[int]) -> list[str]:
    """Source names of examples."""
    return [data[index]["source"] for index in indices]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "variant", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_variants_choose_the_same(variant: str, outcomes: Runner) -> None:
    case = Case(variant, colm=EXACT | VARIANTS[variant], steps=3)
    wanted = outcomes(case, 1)[0].chosen
    cut_up = dataclasses.replace(case, stage=3, zero=NOTHING_PERSISTS)
    for seen in outcomes(cut_up, 2):
        assert seen.chosen == wanted


@pytest.mark.distributed
def test_variants_differ(outcomes: Runner) -> None:
    """Each key does something: no two of the variants choose the same examples throughout."""
    cases = [Case(variant, colm=EXACT | VARIANTS[variant], steps=3) for variant in VARIANTS if variant[:5] != "probe"]
    runs = [tuple(map(tuple, outcomes(case, 1)[0].chosen)) for case in cases]
    assert len(set(runs)) == len(runs)


@pytest.mark.distributed
@pytest.mark.parametrize(("lora", "stage"), [(False, 0), (True, 2), (False, 3)], ids=["full", "lora", "full-stage3"])
def test_choice_is_the_one_of_plain_gradients(lora: bool, stage: int, outcomes: Runner, data: list[Record]) -> None:
    """Selecting in one process, from gradients by plain autograd on the parameters as they were, gives the same."""
    case = matrix_case("exact", lora, stage)
    seen = outcomes(case, 2)[0]
    names = list(SOURCES)
    settings = SelectionSettings(mask_size=32, seed=3, weights=case.colm["weights"], small_share=None, carries=True)
    history: list[AdamHistory] = []
    carry: dict[int, float] = {}
    by_token = case.colm["loss_normalization"] == "token"

    def choose(place: int, model: Any) -> None:
        step = seen.steps[place]
        attention = (model.get_base_model() if lora else model).model.layers[-1].self_attn
        weight = attention.v_proj.lora_B["default"].weight if lora else attention.v_proj.weight
        losses = [token_losses(model, data[index]) for index in step.large]
        added_up = [loss.sum() if by_token else loss.mean() for loss in losses]
        rows = [torch.autograd.grad(loss, weight)[0].flatten() for loss in added_up]
        parts = torch.tensor([float(len(loss)) for loss in losses]) if by_token else None
        history.extend([] if history else [AdamHistory(weight.numel(), BETAS, EPS)])
        coreset = select_coreset(
            torch.tensor([names.index(source) for source in source_of(data, step.large)]),
            Signals(
                torch.arange(LARGE), torch.ones(LARGE, dtype=torch.bool), DenseGradients(torch.stack(rows)), parts=parts
            ),
            CORESET,
            small=[names.index(source) for source in SMALL_SOURCES],
            settings=settings,
            history=history[0],
            step=place + 1,
            carry=carry,
        )
        carry.update(coreset.carry or {})
        assert torch.tensor(step.large)[coreset.positions].tolist() == step.chosen
        assert coreset.weights.tolist() == pytest.approx(step.weights, abs=1e-5)

    plain_training(case, data, seen.steps, choose)
    assert history[0].count == case.steps


@pytest.mark.distributed
def test_too_many_small_examples(outcomes: Runner, data: list[Record]) -> None:
    """Only some of them fit; nothing is probed then."""
    case = Case("more small examples than b", colm=EXACT | VARIANTS["more small examples than b"], steps=3)
    dropped = 0
    for step in outcomes(case, 1)[0].steps:
        small = [index for index in step.large if data[index]["source"] in ("algebra", "biology")]
        assert step.stats["coreset"]["dropped_small"] == max(0, len(small) - CORESET)
        assert step.stats["coreset"]["kept_small"] == min(len(small), CORESET)
        assert len(step.chosen) == CORESET
        assert step.stats["examples_probed"] == (0 if len(small) >= CORESET else LARGE - len(small))
        dropped += step.stats["coreset"]["dropped_small"]
    assert dropped > 0


@pytest.mark.distributed
def test_probe_of_a_part(outcomes: Runner, data: list[Record]) -> None:
    """Medoids come from the probed share of the big sources."""
    case = Case("probe of a part", colm=EXACT | VARIANTS["probe of a part"], steps=3)
    for step in outcomes(case, 1)[0].steps:
        num_big = sum(data[index]["source"] not in SMALL_SOURCES for index in step.large)
        assert step.stats["examples_probed"] == math.ceil(0.6 * num_big)
        assert len(step.chosen) == CORESET


@pytest.mark.distributed
def test_one_large_source(outcomes: Runner) -> None:
    """Sources far apart in size, and a step whose large batch may lack one of them."""
    case = Case("one large source", sources=MANY, colm={"large_batch_size": 24, "coreset_size": 9, **EXACT})
    assert outcomes(case, 2)[1].chosen == outcomes(case, 1)[0].chosen
    assert all(sum(step.stats["coreset"]["per_source"].values()) == 9 for step in outcomes(case, 1)[0].steps)


@pytest.mark.distributed
def test_plain_steps_of_the_schedule(outcomes: Runner) -> None:
    """Before `start_step` and between every `every`-th step a random b of the same r is trained on, without a probe."""
    scheduled = Case("schedule", colm={"schedule": {"start_step": 2, "every": 2}, **EXACT}, steps=6)
    random = Case("random", colm={"selector": "random"}, steps=6)
    for world_size in (1, 2):
        seen, plain = outcomes(scheduled, world_size)[-1], outcomes(random, world_size)[-1]
        assert [step.stats["selected"] for step in seen.steps] == [False, False, True, False, True, False]
        for ours, theirs in zip(seen.steps, plain.steps, strict=True):
            assert ours.large == theirs.large
            assert (ours.chosen == theirs.chosen) == (not ours.stats["selected"])
            assert (ours.stats["examples_probed"] == 0) == (not ours.stats["selected"])
            assert ours.stats["coreset"]["coherence"].keys() == (
                {"algebra", "biology", "code"} if ours.stats["selected"] else set()
            )
            assert ours.weights == [1.0] * CORESET
    assert outcomes(scheduled, 1)[0].chosen == outcomes(scheduled, 2)[0].chosen


@pytest.mark.distributed
@pytest.mark.parametrize(
    "selector",
    [
        *("gradient_norm", "completion_length", "hidden_medoids"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("big_loss", "middle_perplexity", "least_confidence")),
    ],
)
def test_baselines_choose_alike_on_any_number_of_ranks(selector: str, outcomes: Runner, data: list[Record]) -> None:
    """Of all examples, also those of small sources; no history, no quotas."""
    case = Case(selector, colm={"selector": selector}, steps=3)
    cut_up = dataclasses.replace(case, stage=3, zero=NOTHING_PERSISTS)
    one = outcomes(case, 1)[0]
    assert [seen.chosen for seen in outcomes(cut_up, 2)] == [one.chosen] * 2
    for step in one.steps:
        assert len(set(step.chosen)) == CORESET
        assert step.stats["examples_probed"] == (0 if selector == "completion_length" else LARGE)
        assert step.stats["coreset"]["kept_small"] == 0


@pytest.mark.distributed
@pytest.mark.parametrize("selector", ["big_loss", "middle_perplexity", "completion_length"])
def test_baselines_choose_what_they_say(selector: str, outcomes: Runner, data: list[Record]) -> None:
    """From losses by a plain forward on the parameters as they were."""
    case = Case(selector, colm={"selector": selector}, steps=3)
    seen = outcomes(case, 1)[0]

    def check(place: int, model: Any) -> None:
        step = seen.steps[place]
        with torch.no_grad():
            scores = [float(token_losses(model, data[index]).mean()) for index in step.large]
        if selector == "completion_length":
            scores = [float(sum(label != -100 for label in data[index]["labels"][1:])) for index in step.large]
        order = sorted(range(LARGE), key=lambda position: -scores[position])
        first = (LARGE - CORESET) // 2
        wanted = order[LARGE - first - CORESET : LARGE - first] if selector == "middle_perplexity" else order[:CORESET]
        found = sorted(scores[step.large.index(index)] for index in step.chosen)
        assert found == pytest.approx(sorted(scores[position] for position in wanted), rel=1e-5)

    plain_training(case, data, seen.steps, check)


@pytest.mark.distributed
def test_selectors_without_a_probe(outcomes: Runner, data: list[Record]) -> None:
    for selector in ("random", "keep_random"):
        case = Case(selector, colm={"selector": selector})
        one, two = outcomes(case, 1)[0], outcomes(case, 2)[0]
        assert one.chosen == two.chosen
        for step in one.steps:
            assert set(step.chosen) <= set(step.large)
            assert len(set(step.chosen)) == CORESET
            assert step.stats["examples_probed"] == 0
            if selector == "keep_random":
                assert {i for i in step.large if data[i]["source"] in SMALL_SOURCES} <= set(step.chosen)
    full = outcomes(Case("full", colm={"selector": "full", "coreset_size": LARGE}, steps=2), 2)[0]
    assert full.chosen == [sorted(step.large) for step in full.steps]
