"""`StepStats`, recomputed from the dataset, the coreset and the micro-batches that ran."""

from __future__ import annotations

import pytest
import torch

from colm_ds.engine.data_use import DataUse
from colm_ds.memory.breakdown import PARTS
from colm_ds.memory.recorder import PEAKS, PHASES
from colm_ds.types import NUM_NAMED
from tests.engine.cases import MATRIX, matrix_case
from tests.engine.conftest import Runner
from tests.engine.training import CORESET, LARGE, LEARNING_RATE, SMALL_SOURCES, SOURCES, Case, Record

NUM_COORDINATES, MASK_SIZE = 16 * 32, 32
"""d of the tiny Llama's V projection (2 heads of 8, hidden size 32) and h."""


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_counts(case: Case, world_size: int, outcomes: Runner, data: list[Record]) -> None:
    ranks = outcomes(case, world_size)
    trained: list[int] = []
    for number, steps in enumerate(zip(*(seen.steps for seen in ranks), strict=True), start=1):
        step = steps[0]
        trained += step.chosen
        stats, chosen = step.stats, [data[index] for index in step.chosen]
        num_tokens = sum(len(record["input_ids"]) for record in chosen)
        assert stats["step"] == number
        assert stats["lr"] == LEARNING_RATE
        assert stats["tokens"] == num_tokens
        assert stats["examples_trained"] == CORESET
        assert stats["samples"] == number * CORESET
        rows = {"seen": number * LARGE, "trained": len(trained), "distinct": len(set(trained))}
        assert stats["data_use"] == {kind: count / len(data) for kind, count in rows.items()}
        assert stats["examples_probed"] == sum(data[index]["source"] not in SMALL_SOURCES for index in step.large)
        assert stats["selected"] is True
        computed = sum(rows * columns for seen in steps for rows, columns in seen.shapes if (rows, columns) != (1, 2))
        assert stats["padding_fraction"] == pytest.approx(1 - num_tokens / computed)
        shapes = [seen.shapes for seen in steps]
        assert stats["micro_batches"]["count"] == len(shapes[0]) == len(shapes[-1])
        assert stats["micro_batches"]["largest_tokens"] == max(
            rows * columns for rank in shapes for rows, columns in rank
        )
        for seen in steps:
            same = (
                "loss",
                "lr",
                "tokens",
                "padding_fraction",
                "data_use",
                "exchange_bytes",
                "coreset",
                "examples_probed",
            )
            assert [seen.stats[key] for key in same] == [stats[key] for key in same]


def test_rows_trained_again_count_once_as_distinct() -> None:
    use, trained = DataUse(11), [[3, 3, 10], [], [10, 0, 7]]
    for number, rows in enumerate(trained):
        if number == 2:  # a resume
            state, use = use.state_dict(), DataUse(11)
            use.load_state_dict(state)
        use.note(4, torch.tensor(rows, dtype=torch.int64))
    assert use.as_dict() == {"seen": 12 / 11, "trained": 6 / 11, "distinct": 4 / 11}


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_coreset(case: Case, world_size: int, outcomes: Runner, data: list[Record]) -> None:
    for step in outcomes(case, world_size)[-1].steps:
        described = step.stats["coreset"]
        sources = [data[index]["source"] for index in step.chosen]
        assert described["per_source"] == {source: sources.count(source) for source in SOURCES}
        assert sum(described["per_source"].values()) == CORESET
        assert described["kept_small"] == sum(data[index]["source"] in SMALL_SOURCES for index in step.large)
        assert (described["dropped_small"], described["nonfinite"]) == (0, 0)
        assert set(described["coherence"]) <= set(SOURCES) - set(SMALL_SOURCES)
        assert all(0 < value <= 1 + 1e-6 for value in described["coherence"].values())
        for source in set(sources) - set(SMALL_SOURCES):  # weights have mean 1 in each pool
            weights = [weight for weight, other in zip(step.weights, sources, strict=True) if other == source]
            assert sum(weights) == pytest.approx(len(weights), rel=1e-5)
        kept = [w for w, source in zip(step.weights, sources, strict=True) if source in SMALL_SOURCES]
        assert kept == [1.0] * len(kept)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_time_and_memory(case: Case, world_size: int, outcomes: Runner) -> None:
    for seen in outcomes(case, world_size):
        for step in seen.steps:
            time_s, memory_gib = step.stats["time_s"], step.stats["memory_gib"]
            assert set(time_s) == {*PHASES, "data", "total"}
            assert time_s.pop("save") == memory_gib.pop("save") == 0
            assert min(time_s.values()) > 0
            assert time_s["forward"] + time_s["backward"] <= time_s["train"]
            parts = ("data", "probe", "exchange", "select", "train", "step")
            assert sum(time_s[name] for name in parts) <= time_s["total"]
            assert set(memory_gib) == {*PEAKS} - {"save"}
            assert 0 < memory_gib["peak"] == max(memory_gib[name] for name in memory_gib if name != "peak")
            assert memory_gib["train"] >= max(memory_gib["forward"], memory_gib["backward"])
            held = step.stats["memory_parts_gib"]
            assert step.stats["memory_kind"] == "resident"
            assert set(held) == set(PARTS)
            assert sum(held.values()) <= memory_gib["peak"] * (1 + 1e-9)


@pytest.mark.distributed
def test_phases_that_do_not_run_take_no_time(outcomes: Runner) -> None:
    for step in outcomes(Case("random", colm={"selector": "random"}), 2)[0].steps:
        assert step.stats["time_s"]["probe"] == step.stats["time_s"]["exchange"] == 0
        assert step.stats["time_s"]["select"] > 0
        assert step.stats["memory_gib"]["probe"] == step.stats["memory_gib"]["exchange"] == 0


@pytest.mark.distributed
@pytest.mark.parametrize("estimator", ["spsa", "sketch"])
def test_signals_are_r_times_k_floats(estimator: str, outcomes: Runner) -> None:
    """512 bytes for r = 128 and one direction; the choice itself is one short broadcast."""
    num_probes = {"spsa": 1, "sketch": 16}[estimator]
    probe = {"estimator": estimator, "num_probes": num_probes}
    colm = {"large_batch_size": 128, "coreset_size": 64, "probe": probe}
    sources = {source: 2 * count for source, count in SOURCES.items()}
    case = Case("r = 128", colm=colm, deepspeed={"train_micro_batch_size_per_gpu": 16}, sources=sources, steps=2)
    for step in outcomes(case, 2)[0].steps:
        exchanged = step.stats["exchange_bytes"]
        assert exchanged["signals"] == 128 * num_probes * 4
        second_moments = (16 + 32) * 4 if estimator == "sketch" else 0
        assert exchanged["selection"] == second_moments + 4 * (5 + NUM_NAMED + 2 * 64) + 8 * (2 * len(SOURCES) + 1)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_bytes(case: Case, world_size: int, outcomes: Runner, data: list[Record]) -> None:
    estimator = case.colm["probe"]["estimator"]
    for step in outcomes(case, world_size)[0].steps:
        exchanged = step.stats["exchange_bytes"]
        assert set(exchanged) == {"signals", "selection", "tokens"}
        if world_size == 1:
            assert set(exchanged.values()) == {0}
            continue
        lengths = [len(data[index]["input_ids"]) for index in step.chosen]
        assert exchanged["tokens"] % 8 == 0  # ids and labels, int32
        assert exchanged["tokens"] < 8 * sum(lengths) / 2
        if estimator == "exact":
            check_exact_bytes(step.stats["coreset"]["per_source"], exchanged, case.lora)
        else:
            num_probes = case.colm["probe"].get("num_probes", 256)
            assert exchanged["signals"] == LARGE * num_probes * 4


def check_exact_bytes(per_source: dict[str, int], exchanged: dict[str, int], lora: bool) -> None:
    """Sums over coordinates for every pool's mask and for the history, masked columns, picks: no [r, d] matrix."""
    d = 16 * 4 if lora else NUM_COORDINATES
    num_pools = sum(per_source[source] > 0 for source in set(SOURCES) - set(SMALL_SOURCES))
    sums = d * (8 * num_pools + 2 * 4)  # means in float64, moments in float32
    columns = 4 * LARGE * MASK_SIZE
    choice = 8 * (num_pools * (MASK_SIZE + 1) + 2 * CORESET + 1)
    assert exchanged["signals"] == 4 * LARGE  # which signals are finite
    assert 0 < exchanged["selection"] <= sums + columns + choice
    if not lora:  # the saving grows with d: 27 here, 128 at the paper's sizes
        assert exchanged["selection"] < 4 * LARGE * d


@pytest.mark.distributed
def test_exact_reads_few_bytes_of_large_gradients(outcomes: Runner) -> None:
    """What depends on d does not grow with r: twice the examples add masked columns only."""
    small = outcomes(matrix_case("exact", False, 0), 2)[0].steps[0].stats["exchange_bytes"]["selection"]
    twice = Case(
        "exact, 2 r", colm={"large_batch_size": 2 * LARGE, "coreset_size": 26, "probe": {"estimator": "exact"}}
    )
    large = outcomes(twice, 2)[0].steps[0].stats["exchange_bytes"]["selection"]
    assert large - small <= 4 * LARGE * MASK_SIZE * 1.25 + 8 * 2 * CORESET


@pytest.mark.distributed
def test_counted_steps(outcomes: Runner) -> None:
    """In the steps asked for, and in no others, allocations are counted by phase; the result is the same."""
    counting = Case("counted", colm={"memory": {"count_steps": [2]}}, steps=3)
    steps = outcomes(counting, 1)[0].steps
    assert [step.stats["counted_gib"] is None for step in steps] == [True, False, True]
    counted = steps[1].stats["counted_gib"]
    assert set(counted) == {"probe", "exchange", "select", "train", "forward", "backward", "step", "total"}
    assert counted["total"] == max(counted.values()) < steps[1].stats["memory_gib"]["peak"]
    assert counted["forward"] < counted["backward"] <= counted["train"]
    plain = outcomes(Case("not counted", steps=3), 1)[0].steps
    assert [step.stats["loss"] for step in steps] == [step.stats["loss"] for step in plain]
