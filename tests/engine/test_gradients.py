"""The update is the one of a plain loop over the coresets, which are the same on any ranks and at any stage of ZeRO."""

from __future__ import annotations

import pytest

from colm_ds.batching.mixture import MixtureSampler
from tests.engine.cases import ESTIMATORS, MATRIX, matrix_case
from tests.engine.conftest import Oracle, Runner
from tests.engine.oracle import largest_difference
from tests.engine.training import CORESET, LARGE, NO_DROPOUT, NOTHING_PERSISTS, SMALL_SOURCES, Case, Record

TOLERANCE = 1e-6
"""Between parameters after 3 steps of learning rate 1e-3, float32."""

EXACT = {"probe": {"estimator": "exact"}}
SKETCH = {"probe": {"estimator": "sketch", "num_probes": 64}}

FURTHER = [
    (Case("clipped", deepspeed={"gradient_clipping": 0.5}), 2),
    (Case("clipped", lora=True, deepspeed={"gradient_clipping": 0.5}, colm=SKETCH, stage=1), 1),
    (Case("clipped", deepspeed={"gradient_clipping": 0.5}, colm={"weights": "cluster", **EXACT}, stage=2), 2),
    (Case("clipped", deepspeed={"gradient_clipping": 0.5}, stage=3, zero=NOTHING_PERSISTS), 2),
    (Case("random", colm={"selector": "random"}, stage=2), 2),
    (Case("keep_random", lora=True, colm={"selector": "keep_random", "loss_normalization": "token"}), 2),
    (Case("full", colm={"selector": "full", "coreset_size": LARGE}, stage=1), 2),
    (Case("full", colm={"selector": "full", "coreset_size": None, "loss_normalization": "token"}), 1),
    (Case("unknown family", family="gpt2", model=NO_DROPOUT, colm={"selector": "random"}, stage=3), 2),
    (Case("norms of queries and keys", family="qwen3", colm=EXACT, stage=3, zero=NOTHING_PERSISTS), 2),
    (Case("fused by head", family="gpt_neox", stage=2), 2),
    (Case("fused projection", family="phi3", colm=EXACT, stage=3, zero=NOTHING_PERSISTS), 2),
    (Case("biases", family="phi", lora=True, colm=EXACT, stage=2), 2),
    (Case("tied head", model={"tie_word_embeddings": True}, colm=SKETCH, stage=3, zero=NOTHING_PERSISTS), 2),
    (Case("overlapping communication", stage=2, zero={"overlap_comm": True, "reduce_bucket_size": 2000}), 2),
    (Case("alone", lora=True, colm={"weights": "matched", **EXACT}, stage=2), 1),
    (Case("tokens", colm={"probe": {"estimator": "tokens"}, "loss_normalization": "token"}, stage=2), 2),
    (Case("alone", colm={"weights": "matched", "loss_normalization": "token", **SKETCH}, stage=3), 1),
    (Case("one example a rank", colm={"large_batch_size": 3, "coreset_size": 2, **EXACT}, stage=3), 2),
    (Case("one of two examples", colm={"large_batch_size": 2, "coreset_size": 1, **SKETCH}), 1),
    (Case("tokens alone", colm={"micro_batch_tokens": 10, "weights": "matched", **SKETCH}, stage=2), 2),
    (Case("joint pool", colm={"per_source": False, "small_sources": "none", "weights": "matched", **EXACT}), 2),
    (Case("checkpointing", checkpointing=True, colm={"replay": "off", **EXACT}, stage=2), 2),
]

DEEP = {"num_hidden_layers": 3}
REPLAYS = [
    (Case("replay", checkpointing=True, model=DEEP, colm={"replay": "on", "weights": "cluster", **EXACT}), 2),
    (Case("replay", checkpointing=True, model=DEEP, lora=True, colm={"replay": "on", **SKETCH}, stage=2), 2),
    (
        Case("replay, four norms", "gemma3_text", checkpointing=True, model=DEEP, colm={"replay": "on", **EXACT}),
        2,
    ),
    (
        # Of micro-batches of one example some rank has fewer: it goes through the same layers with a place holder.
        Case(
            "replay of a place holder",
            checkpointing=True,
            model=DEEP,
            colm={"replay": "on", **EXACT},
            deepspeed={"train_micro_batch_size_per_gpu": 1},
            stage=3,
            zero=NOTHING_PERSISTS,
        ),
        2,
    ),
]


def name(run: tuple[Case, int]) -> str:
    """For the list of tests."""
    case, world_size = run
    return f"{case.name}-stage{case.stage}-{world_size}ranks".replace(" ", "_")


def check(case: Case, world_size: int, outcomes: Runner, plain_runs: Oracle) -> None:
    """Compare parameters, losses and gradient norms with the plain loop's."""
    ranks, plain = outcomes(case, world_size), plain_runs(case, world_size)
    assert largest_difference(ranks[0].parameters, plain.parameters) <= TOLERANCE
    for seen in ranks:
        assert [step.chosen for step in seen.steps] == [step.chosen for step in ranks[0].steps]
        assert [step.weights for step in seen.steps] == [step.weights for step in ranks[0].steps]
        for step, loss, grad_norm in zip(seen.steps, plain.losses, plain.grad_norms, strict=True):
            assert step.stats["loss"] == pytest.approx(loss, rel=1e-6)
            if step.stats["grad_norm"] is not None:
                assert step.stats["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
            assert all(step.untouched.values()), step.untouched


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_update_is_the_plain_one(case: Case, world_size: int, outcomes: Runner, plain_runs: Oracle) -> None:
    check(case, world_size, outcomes, plain_runs)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_ranks_and_stages_choose_the_same(case: Case, world_size: int, outcomes: Runner) -> None:
    wanted = outcomes(matrix_case(case.colm["probe"]["estimator"], case.lora, 0), 1)[0].chosen
    assert len(wanted) == len({tuple(chosen) for chosen in wanted}) == 3
    assert [seen.chosen for seen in outcomes(case, world_size)] == [wanted] * world_size


@pytest.mark.distributed
def test_large_batches_follow_from_seed_and_step(outcomes: Runner, data: list[Record]) -> None:
    sampler = MixtureSampler(len(data), LARGE, seed=3)
    for estimator in ESTIMATORS:
        for step, seen in enumerate(outcomes(matrix_case(estimator, False, 0), 2)[1].steps, start=1):
            assert seen.large == sampler.indices(step).tolist()


@pytest.mark.distributed
def test_small_sources_are_kept_whole(outcomes: Runner, data: list[Record]) -> None:
    for estimator in ESTIMATORS:
        for step in outcomes(matrix_case(estimator, False, 0), 1)[0].steps:
            small = {index for index in step.large if data[index]["source"] in SMALL_SOURCES}
            assert small <= set(step.chosen)
            assert len(step.chosen) == len(set(step.chosen)) == CORESET
            assert set(step.chosen) <= set(step.large)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), FURTHER, ids=map(name, FURTHER))
def test_update_is_the_plain_one_also(case: Case, world_size: int, outcomes: Runner, plain_runs: Oracle) -> None:
    check(case, world_size, outcomes, plain_runs)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), REPLAYS, ids=map(name, REPLAYS))
def test_update_from_replayed_forwards(case: Case, world_size: int, outcomes: Runner, plain_runs: Oracle) -> None:
    check(case, world_size, outcomes, plain_runs)
    assert all(seen.replays for seen in outcomes(case, world_size))


@pytest.mark.distributed
def test_clipping_is_in_force(outcomes: Runner, plain_runs: Oracle) -> None:
    """The clipped runs above would mean little if gradients were shorter than the limit."""
    clipped = [(case, ranks) for case, ranks in FURTHER if case.name == "clipped"]
    assert len(clipped) == 4
    for case, world_size in clipped:
        assert min(plain_runs(case, world_size).grad_norms) > 2 * case.deepspeed["gradient_clipping"]


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX + [pytest.param(*run, id=name(run)) for run in FURTHER])
def test_micro_batches(case: Case, world_size: int, outcomes: Runner) -> None:
    """As many on every rank, within the limits, and no more than the largest share needs."""
    ranks, config = outcomes(case, world_size), case.config()
    size, tokens = config["train_micro_batch_size_per_gpu"], config["colm"].get("micro_batch_tokens")
    for steps in zip(*(seen.steps for seen in ranks), strict=True):
        assert len({len(step.shapes) for step in steps}) == 1
        for step in steps:
            assert all(rows <= size for rows, _ in step.shapes)
            assert tokens is None or all(rows == 1 or rows * columns <= tokens for rows, columns in step.shapes)
        rows = sum(rows for step in steps for rows, columns in step.shapes if (rows, columns) != (1, 2))
        assert rows == len(steps[0].chosen)  # a place holder has 1 row of 2 tokens; no example is as short


def test_no_example_looks_like_a_place_holder() -> None:
    assert min(len(record["input_ids"]) for record in Case("data").records()) > 2
    assert CORESET % 2 == LARGE % 2 == 1
