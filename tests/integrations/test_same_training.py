"""The Trainer, the plain loop and the engine choose the same examples and reach the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.oracle import largest_difference
from tests.integrations.runs import CORESET, Trained, resumed, with_engine, with_plain_loop, with_trainer
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

STEPS = 5

SETTINGS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "sketches, matched weights, by tokens": {
        "probe": {"estimator": "sketch"},
        "weights": "matched",
        "loss_normalization": "token",
    },
    "token embeddings": {"probe": {"estimator": "tokens"}},
}


@pytest.fixture(scope="module")
def engine_runs(pools: dict[int, Ranks]) -> Any:
    """The engine's run of each setting on W ranks, once."""
    seen: dict[tuple[str, int], Trained] = {}

    def run(setting: str, world_size: int) -> Trained:
        if (setting, world_size) not in seen:
            seen[setting, world_size] = pools[world_size].run(with_engine, SETTINGS[setting], STEPS)[0]
        return seen[setting, world_size]

    return run


def same(one: Trained, other: Trained) -> None:
    assert one.chosen == other.chosen
    assert largest_difference(one.parameters, other.parameters) <= 1e-5


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_plain_loop_is_the_engine(setting: str, world_size: int, pools: dict[int, Ranks], engine_runs: Any) -> None:
    plain = pools[world_size].run(with_plain_loop, SETTINGS[setting], STEPS)[0]
    same(plain, engine_runs(setting, world_size))


@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_trainer_is_the_engine(
    setting: str, world_size: int, stage: int | None, pools: dict[int, Ranks], engine_runs: Any, tmp_path: Path
) -> None:
    runs = pools[world_size].run(with_trainer, str(tmp_path), SETTINGS[setting], STEPS, stage)
    for run in runs:
        assert run.wrapper == ("DistributedDataParallel" if stage is None else "DeepSpeedEngine 2")
        same(run, engine_runs(setting, world_size))
        assert run.shapes == [3] * (STEPS * CORESET // 3 // world_size)
    steps = [entry for entry in runs[0].logs if "loss" in entry]
    assert len(steps) == STEPS
    assert all(sum(v for k, v in entry.items() if k.startswith("colm/chosen/")) == CORESET for entry in steps)
    same(engine_runs(setting, 1), engine_runs(setting, 2))


@pytest.mark.parametrize(
    ("world_size", "stage", "packing"),
    [
        pytest.param(1, None, "on", marks=pytest.mark.slow),
        (2, None, 64),
        pytest.param(2, 3, 64, marks=pytest.mark.slow),
    ],
)
def test_packed_trainer_is_the_engine(
    world_size: int, stage: int | None, packing: Any, pools: dict[int, Ranks], engine_runs: Any, tmp_path: Path
) -> None:
    """As many micro-batches, but rows of several examples fill the first ones, and the last hold less or nothing."""
    setting = "sketches, matched weights, by tokens"
    colm = {**SETTINGS[setting], "packing": packing}
    for run in pools[world_size].run(with_trainer, str(tmp_path), colm, STEPS, stage):
        same(run, engine_runs(setting, world_size))
        assert len(run.shapes) == STEPS * CORESET // 3 // world_size
        assert sum(run.shapes) <= 0.8 * STEPS * CORESET // world_size


def test_trainer_under_zero_3(pools: dict[int, Ranks], engine_runs: Any, tmp_path: Path) -> None:
    """Weights are cut up: every forward of the probe gathers them, so all ranks run as many."""
    setting = "the paper's"
    for run in pools[2].run(with_trainer, str(tmp_path), SETTINGS[setting], STEPS, 3):
        assert run.wrapper == "DeepSpeedEngine 3"
        same(run, engine_runs(setting, 2))


@pytest.mark.parametrize(("world_size", "stage"), [(2, None), (2, 2)])
def test_resume_continues_exactly(world_size: int, stage: int | None, pools: dict[int, Ranks], tmp_path: Path) -> None:
    for whole, rest in pools[world_size].run(resumed, str(tmp_path), {"probe": {"estimator": "exact"}}, stage):
        assert rest.chosen == whole.chosen[3:]
        assert largest_difference(rest.parameters, whole.parameters) == 0.0
