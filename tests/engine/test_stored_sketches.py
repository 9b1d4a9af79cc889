"""`probe.source: store`: choices by what training's own passes left, on any ranks and stage, and after a resume."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.config.colm import CoLMSection
from colm_ds.config.resolve import resolve_config
from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.engine.sketch_store import SketchStore
from colm_ds.errors import CheckpointError, ConfigError
from colm_ds.models.architecture import find_architecture
from colm_ds.probe.directions import sign_vectors
from colm_ds.randomness import private_generator
from colm_ds.selection import SelectionSettings, Signals, select_coreset
from tests.engine.training import NOTHING_PERSISTS, Case, start
from tests.probe.oracles import CPU, plain_gradients, relative_error
from tests.ranks import Ranks

R, B, K, STEPS = 14, 6, 12, 6
FEW = {"algebra": 11, "biology": 10, "code": 8, "drama": 2, "essays": 1}
STORE = {"estimator": "sketch", "source": "store", "num_probes": K}
ONE_POOL = {"per_source": False, "small_sources": "none", "weights": "matched"}
SECTION = {"large_batch_size": R, "coreset_size": B, "probe": STORE}


def case(name: str, micro: int = 3, colm: dict[str, Any] | None = None, **more: Any) -> Case:
    """A run by stored sketches."""
    deepspeed = {"train_micro_batch_size_per_gpu": micro}
    return Case(name, sources=FEW, colm={**SECTION, **(colm or {})}, deepspeed=deepspeed, **more)


def run(which: Case, by_loop: bool = False) -> dict[str, Any]:
    """In a rank: what is chosen in some steps, what the metrics say, and the store at the end."""
    from colm_ds.engine.micro_batch_loop import MicroBatchLoader

    engine = start(which)
    chosen, facts = [], []
    for step in range(1, STEPS + 1):
        if by_loop:
            batches = iter(MicroBatchLoader(engine, None, None, 0))
            while engine.step_count < step:
                engine.backward(engine(**next(batches)).loss)
                engine.step()
            stats = engine.last_stats
        else:
            stats = engine.train_batch()
        chosen.append(sorted(stats.coreset["per_source"].items()))
        facts.append(stats.coreset["stored_signal"])
    state = copy.deepcopy(engine.coreset_selector.state_dict()["sketches"])
    engine.destroy()
    return {"chosen": chosen, "facts": facts, "state": state, "bytes": stats.exchange_bytes["signals"]}


def values(state: dict[str, Any]) -> torch.Tensor:
    """The sketches that a state holds."""
    return state["values"].double() * state["scales"][:, None]


@pytest.mark.distributed
def test_the_same_store_on_any_ranks_and_stage(pools: dict[int, Ranks]) -> None:
    (wanted,) = pools[1].run(run, case("one"))
    trained = int((wanted["state"]["steps"] > 0).sum())
    assert B < trained < sum(FEW.values())
    assert wanted["facts"][0] == {"share": 0.0}
    assert wanted["facts"][-1]["share"] > 0.3
    assert 1.0 <= wanted["facts"][-1]["age"] < STEPS
    assert 0.0 < wanted["facts"][-1]["cosine"] < 1.0
    assert wanted["bytes"] == 0
    others = [
        (2, case("two", micro=1), False),
        (2, case("three", micro=4, stage=3, zero=NOTHING_PERSISTS), False),
        (1, case("loop"), True),
    ]
    for world_size, which, by_loop in others:
        found = pools[world_size].run(run, which, by_loop)
        for rank in found:
            assert torch.equal(rank["state"]["values"], found[0]["state"]["values"]), which.name  # the same on each
            assert torch.equal(rank["state"]["steps"], wanted["state"]["steps"]), which.name
            assert rank["chosen"] == wanted["chosen"]
            for one, other in zip(rank["facts"], wanted["facts"], strict=True):
                assert one == pytest.approx(other, rel=1e-3)
            assert rank["bytes"] == (B * K * 4 if world_size > 1 else 0)
            difference = values(rank["state"]) - values(wanted["state"])
            assert float(difference.abs().max()) < 2e-3 * float(values(wanted["state"]).abs().max())


def sketches_of(model: Any, examples: list[Any]) -> torch.Tensor:
    """Sketches of autograd's gradients in float64, by the signs of seed 3."""
    gradients, target = plain_gradients(model, examples), find_architecture(model).targets[0]
    rows = sign_vectors(3, "rows", 0, K, target.out_features, CPU).double()
    columns = sign_vectors(3, "columns", 0, K, target.in_features, CPU).double()
    return torch.einsum("ko,boi,ki->bk", rows, gradients, columns) / K**0.5


def first_sketches(which: Case) -> dict[str, Any]:
    """In a rank: what the store holds after a step, beside autograd on the weights before it."""
    engine = start(which)
    before = copy.deepcopy(engine.module)
    batch = engine.loader.batch(1)
    engine.train_batch(batch)
    state = engine.coreset_selector.state_dict()["sketches"]
    known = (state["steps"] > 0).nonzero().flatten()
    dataset = engine.loader.dataset
    error = relative_error(values(state)[known], sketches_of(before, [dataset[index] for index in known.tolist()]))
    same = []
    for _ in range(4):
        batch, selector = engine.loader.batch(engine.step_count + 1), engine.coreset_selector
        state, carry = copy.deepcopy(selector.state_dict()["sketches"]), dict(selector.carry)
        wanted, found = choice(batch, state, selector)(carry), selector(batch)
        selector.carry = carry
        engine.train_batch(batch)
        same += [torch.equal(wanted.positions, found.positions), torch.equal(wanted.weights, found.weights)]
    engine.destroy()
    return {"error": error, "known": len(known), "same": all(same)}


def choice(batch: Any, state: dict[str, Any], selector: Any) -> Any:
    """What the state says about a large batch, put together example by example."""
    by_token = selector._config.loss_normalization == "token"
    unseen = torch.ones(batch.size, dtype=torch.bool)
    rows = []
    for position, index in enumerate(batch.indices.tolist()):
        if int(state["steps"][index]) and int(batch.sources[position]) not in selector.small:
            unseen[position] = False
            row = state["values"][index].float() * state["scales"][index]
            rows.append(row * (int(batch.num_label_tokens[position]) if by_token else 1))
    signals = Signals(
        (~unseen).nonzero().flatten(),
        torch.ones(batch.size, dtype=torch.bool),
        vectors=torch.stack([torch.zeros(K), *rows])[1:],
        parts=batch.num_label_tokens.float() if by_token else None,
        unseen=unseen,
    )
    context = selector._context

    def choose(carry: dict[int, float]) -> Any:
        return select_coreset(
            *(batch.sources, signals, B),
            small=context.small,
            settings=context.settings,
            step=batch.step,
            carry=carry,
        )

    return choose


@pytest.mark.distributed
@pytest.mark.parametrize(
    "which",
    [
        case("by token", colm={"loss_normalization": "token", **ONE_POOL}, checkpointing=True),
        case("lora", lora=True, stage=2, micro=2),
    ],
    ids=lambda each: each.name,
)
def test_the_store_holds_the_sketches_of_autograd(which: Case, pools: dict[int, Ranks]) -> None:
    for found in pools[2].run(first_sketches, which):
        assert found["known"] == B
        assert found["same"]
        assert found["error"] < 1e-3  # 2^-11 of the largest entry


def broken_loss(which: Case) -> dict[str, Any]:
    """In a rank: a step in which one chosen example's loss is not finite, so that the others are passed again."""
    engine = start(which)
    batch = engine.loader.batch(1)
    broken = int(batch.indices[engine.coreset_selector(batch).positions[-1]])
    engine.destroy()
    data, model = which.records(), which.build_model()
    data[broken]["input_ids"][0] = 2  # in no other example
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = torch.inf
    before = copy.deepcopy(model)
    engine = start(which, model=model, training_data=data)
    stats = engine.train_batch()
    state = engine.coreset_selector.state_dict()["sketches"]
    known = (state["steps"] > 0).nonzero().flatten().tolist()
    examples = [engine.loader.dataset[index] for index in known]
    error = relative_error(values(state)[known], sketches_of(before, examples))
    engine.destroy()
    return {"broken": broken in known, "known": len(known), "error": error, "nonfinite": stats.coreset["nonfinite"]}


@pytest.mark.distributed
def test_a_broken_example_leaves_no_sketch_and_spoils_none(pools: dict[int, Ranks]) -> None:
    for found in pools[2].run(broken_loss, case("broken", micro=2)):
        assert found["nonfinite"] == 1
        assert (found["broken"], found["known"]) == (False, B - 1)
        assert found["error"] < 1e-3


def resumed(which: Case, folder: str) -> dict[str, Any]:
    """In a rank: go on after a checkpoint, and the same in a second engine that loads it."""
    first = start(which)
    for _ in range(3):
        first.train_batch()
    first.save_checkpoint(folder)
    ends = []
    for engine in (first, None):
        if engine is None:
            engine = start(which)
            engine.load_checkpoint(folder)
        stats = [engine.train_batch() for _ in range(2)]
        state = engine.coreset_selector.state_dict()["sketches"]
        ends.append(([(s.loss, s.coreset["stored_signal"], s.coreset["per_source"]) for s in stats], state))
        engine.destroy()
    (mine, state), (theirs, other) = ends
    return {
        "stats": mine == theirs,
        "store": all(torch.equal(state[key], other[key]) for key in ("values", "scales", "steps")),
    }


@pytest.mark.distributed
def test_resuming_in_the_middle_is_bitwise(pools: dict[int, Ranks], tmp_path: Path) -> None:
    for found in pools[2].run(resumed, case("resumed"), str(tmp_path / "checkpoints")):
        assert found == {"stats": True, "store": True}


def test_the_store_keeps_the_last_and_forgets_the_old() -> None:
    store = SketchStore(6, 3, max_age=4)
    rows = torch.tensor([[1e-9, -2e-9, 5e-10], [3.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, torch.nan, 0.0]])
    assert store.note(torch.tensor([4, 1, 2, 0]), rows, 2) is None
    cosine = store.note(torch.tensor([1, 3]), torch.tensor([[7.0, -1.0, 0.5], [1.0, 1.0, torch.inf]]), 3)
    assert cosine == pytest.approx(21.5 / (10 * 50.25) ** 0.5, rel=1e-3)
    found = store.of(torch.tensor([0, 1, 2, 3, 4]), 5)
    assert found.known.tolist() == [False, True, True, False, True]
    assert found.ages.tolist() == [2, 3, 3]
    assert torch.allclose(found.vectors, torch.stack([torch.tensor([7.0, -1.0, 0.5]), rows[2], rows[0]]), rtol=1e-3)
    assert store.of(torch.tensor([1, 4]), 7).known.tolist() == [True, False]
    other = SketchStore(6, 3, max_age=4)
    other.load_state_dict(store.state_dict())
    store.note(torch.tensor([1]), torch.zeros(1, 3), 4)
    assert torch.allclose(other.of(torch.tensor([1]), 5).vectors, torch.tensor([[7.0, -1.0, 0.5]]), rtol=1e-3)
    with pytest.raises(CheckpointError, match="sketches of 6 examples and 3 numbers, this run of 6 and 4"):
        SketchStore(6, 4, max_age=4).load_state_dict(store.state_dict())
    with pytest.raises(CheckpointError, match="sketches of seed 1, this run makes them of seed 2"):
        SketchStore(6, 3, 4, "seed 2").load_state_dict(SketchStore(6, 3, 4, "seed 1").state_dict())


def test_of_an_example_that_is_twice_in_a_batch_the_last_sketch_counts() -> None:
    store = SketchStore(4, 2, max_age=4)
    first, last, other = torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
    assert store.note(torch.tensor([3, 0, 3]), torch.stack([first, other, last]), 1) is None
    known = store.of(torch.tensor([0, 3]), 2)
    assert torch.equal(known.vectors, torch.stack([other, last]))
    assert store.note(torch.tensor([3, 3]), torch.stack([first, last]), 2) == pytest.approx(1.0)
    store.clear()
    assert not store.of(torch.arange(4), 3).known.any()


def test_unseen_examples_are_as_likely_as_in_a_random_choice() -> None:
    """Two pools of 7 and 5; 3 and 4 of them without a signal; 5 picks go as 3 and 2."""
    sources = torch.tensor([0] * 7 + [1] * 5)
    unseen = torch.zeros(12, dtype=torch.bool)
    unseen[[1, 2, 6, 7, 8, 9, 10]] = True
    known = (~unseen).nonzero().flatten()
    vectors = torch.randn(len(known), 4, generator=private_generator(0, "vectors"))
    signals = Signals(known, torch.ones(12, dtype=torch.bool), vectors=vectors, unseen=unseen)
    settings, draws = SelectionSettings(geometry="plain", weights="cluster"), 1200
    counts = torch.zeros(12, dtype=torch.float64)
    for step in range(draws):
        coreset = select_coreset(sources, signals, 5, settings=settings, step=step)
        assert sorted(sources[coreset.positions].tolist()) == [0, 0, 0, 1, 1]
        assert len(set(coreset.positions.tolist())) == 5
        assert float(coreset.weights.sum()) == pytest.approx(5.0)
        counts[coreset.positions] += 1
    for source, share in ((0, 3 / 7), (1, 2 / 5)):
        new = counts[unseen & (sources == source)] / draws
        assert float((new - share).abs().max()) < 4 * (share * (1 - share) / draws) ** 0.5
    everything = Signals(known[:0], signals.finite, vectors=vectors[:0], unseen=torch.ones(12, dtype=torch.bool))
    assert len(select_coreset(sources, everything, 5, settings=settings).positions) == 5
    nothing = Signals(torch.arange(12), signals.finite, vectors=torch.randn(12, 4))
    told = replace(nothing, unseen=torch.zeros(12, dtype=torch.bool))
    one, other = (select_coreset(sources, each, 5, settings=settings) for each in (nothing, told))
    assert one.positions.tolist() == other.positions.tolist()


def test_keys_that_are_filled_in() -> None:
    sizes = {"large_batch_size": 8, "coreset_size": 4}
    for more in ({}, {"preset": "paper"}):
        section = CoLMSection.model_validate({**sizes, **more, "probe": {"source": "store"}})
        assert (section.probe.estimator, section.probe.refresh, section.geometry) == ("sketch", "run", "plain")
        assert section.probe.resolved_num_probes == 256
        assert not section.probes_model
        resolve_config({"colm": section}, 1)
    assert not CoLMSection.model_validate({**sizes, "selector": "random", "probe": STORE}).stores_sketches


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "estimator": ({"probe": {"source": "store", "estimator": "spsa"}}, r"probe\.estimator = 'spsa'.*Write sketch"),
    "refresh": ({"probe": {"source": "store", "refresh": "step"}}, r"probe\.refresh = 'step': .*same signs. Write run"),
    "geometry": ({"geometry": "adam"}, r"colm\.geometry = 'adam': Adam's scales change .* Write \"plain\""),
    "selector": ({"selector": "grab"}, r"'grab' takes no stored sketches, colm, balanced and importance do"),
    "score": ({"selector": "big_loss"}, r"'big_loss' takes no stored sketches"),
    "replay": ({"replay": "on"}, r"colm\.replay = 'on': with probe\.source = 'store' no large batch is passed"),
    "sample": ({"probe": {"source": "store", "sample": 0.5}}, r"colm\.probe\.sample = 0\.5: with probe\.source"),
    "age": ({"probe": {"max_age": 3.0}}, r"colm\.probe\.max_age = 3\.0: only stored sketches have an age"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together(name: str) -> None:
    section, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        resolve_config({"colm": {**SECTION, **section}}, 1)


def test_only_in_the_step_of_the_engine() -> None:
    with pytest.raises(ConfigError, match=r"training's own passes .* which the step of colm_ds\.initialize provides"):
        CoresetSelector(Case("").build_model(), SECTION, {"a": 64})
