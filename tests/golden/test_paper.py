"""The paper's recipe goes on giving what it gave before the code was rearranged; its preset pins all that decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from colm_ds.config.colm import PAPER, CoLMSection, MaskConfig, ProbeConfig, ScheduleConfig
from colm_ds.config.section import Section
from tests.golden.paper import CASES, load, run
from tests.ranks import Ranks

DECIDES_NOTHING = {
    "": {"preset", "micro_batch_tokens", "packing", "replay", "variance_every", "memory", "num_workers"}
    | {"max_skipped_steps", "phase_timeout_s"},
    "probe": {"dtype", "precision", "max_tokens"},
    "mask": set[str](),
    "schedule": set[str](),
}
"""Keys that say how the choice is computed, and not which it is."""

THE_RUNS_OWN = {"large_batch_size", "coreset_size", "seed"}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "llama60m" else name for name in CASES]
)
def test_same_examples_weights_and_parameters(one_rank: Ranks, name: str) -> None:
    before, now = load(name), one_rank.run(run, CASES[name])[0]
    assert now.indices == before.indices
    for step, (chosen, kept) in enumerate(zip(now.positions, before.positions, strict=True), start=1):
        assert chosen == kept, f"step {step}"
    assert now.weights == before.weights
    torch.testing.assert_close(now.losses, before.losses, rtol=1e-4, atol=1e-5)
    assert now.parameters.keys() == before.parameters.keys()
    moved = 20 * 1e-3  # what Adam can move an entry by in 20 steps
    for key, parameter in before.parameters.items():
        torch.testing.assert_close(now.parameters[key], parameter, rtol=0.0, atol=0.05 * moved, msg=key)


@pytest.mark.parametrize(
    ("kind", "prefix"), [(CoLMSection, ""), (ProbeConfig, "probe"), (MaskConfig, "mask"), (ScheduleConfig, "schedule")]
)
def test_preset_pins_every_key_that_decides(kind: type[Section], prefix: str) -> None:
    pinned = set(PAPER[prefix] if prefix else PAPER)
    free = DECIDES_NOTHING[prefix] | (set() if prefix else THE_RUNS_OWN)
    assert pinned | free == set(kind.model_fields), "a new key: is it pinned, or does it decide nothing?"
    assert not pinned & free


def test_written_keys_go_over_the_preset() -> None:
    sizes = {"large_batch_size": 8, "coreset_size": 4}
    paper = CoLMSection.model_validate({"preset": "paper", **sizes})
    assert paper.probe.num_probes == 1
    written = {"metric": "cosine", "probe": {"estimator": "sketch"}}
    other = CoLMSection.model_validate({"preset": "paper", **written, **sizes})
    assert (other.metric, other.probe.estimator, other.probe.num_probes) == ("cosine", "sketch", "auto")
    assert other.probe.epsilon == paper.probe.epsilon
    again = CoLMSection.model_validate(other.model_dump())
    assert again == other
