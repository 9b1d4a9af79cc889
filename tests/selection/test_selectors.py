"""Selectors by name: what each chooses, from what, and how it resumes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.randomness import derive_seed, private_generator
from colm_ds.selection import (
    SELECTORS,
    SINGLE_PROCESS,
    DenseGradients,
    LowRankGradients,
    Selector,
    SelectorContext,
    Signals,
    make_selector,
    select_coreset,
)
from colm_ds.selection.coreset import SelectionSettings
from colm_ds.types import Coreset, LargeBatch
from tests.selection import oracles
from tests.selection.oracles import FixedDirections, randn

D = 30
SOURCES = torch.tensor([0, 1, 2, 1, 2, 2, 1, 0, 2, 1, 2, 2])
R = len(SOURCES)


def make_batch(step: int, sources: Tensor = SOURCES) -> LargeBatch:
    r = len(sources)
    return LargeBatch(
        step=step,
        indices=torch.arange(r) + 100,
        sources=sources,
        lengths=torch.full((r,), 7),
        num_label_tokens=torch.full((r,), 3),
        home=torch.zeros(r, dtype=torch.int64),
        examples={},
    )


def make_signals(step: int, d: int = D) -> Signals:
    c = randn(R, 1, seed=step)
    gradients = LowRankGradients(c, FixedDirections(randn(1, d, seed=step + 500)))
    return Signals(torch.arange(R), torch.ones(R, dtype=torch.bool), gradients, c)


def context(seed: int = 0, size: int = 6, small: tuple[int, ...] = (0,), **settings: object) -> SelectorContext:
    return SelectorContext(size, small, SelectionSettings(seed=seed, mask_size=9, **settings))  # type: ignore[arg-type]


def choose(selector: Selector, step: int, signals: Signals | None = None) -> Coreset:
    return selector.select(make_batch(step), signals, SINGLE_PROCESS)


def test_registry() -> None:
    assert set(SELECTORS) >= {"colm", "random", "keep_random", "full"}
    for name, kind in SELECTORS.items():
        selector = make_selector(name, context())
        assert isinstance(selector, kind)
        assert selector.signal in (None, "gradient", "loss", "confidence", "gradient_norm", "hidden")
        assert getattr(selector, "name", name) == name
        assert selector.keeps_small is (name in ("colm", "balanced", "importance") or getattr(selector, "outer", False))
    with pytest.raises(SelectionError, match="selector 'greedy' is unknown"):
        make_selector("greedy", context())


@pytest.mark.parametrize("name", ["random", "keep_random", "full"])
def test_baselines_have_no_state_and_read_no_signals(name: str) -> None:
    selector = make_selector(name, context())
    assert selector.signal is None
    before = choose(selector, 4)
    choose(selector, 5)
    assert selector.state_dict() == {}
    other = make_selector(name, context())
    other.load_state_dict({})
    assert choose(other, 4).positions.tolist() == before.positions.tolist()
    assert choose(other, 4, make_signals(1)).positions.tolist() == before.positions.tolist()
    assert (before.weights == 1).all()
    assert before.weights.dtype == torch.float32
    assert before.positions.dtype == torch.int64


@pytest.mark.parametrize("name", ["random", "keep_random"])
def test_random_choices_follow_seed_and_step(name: str) -> None:
    def positions(seed: int, step: int) -> tuple[int, ...]:
        return tuple(choose(make_selector(name, context(seed)), step).positions.tolist())

    state = torch.random.get_rng_state()
    assert positions(0, 3) == positions(0, 3)
    assert len({positions(0, step) for step in range(20)}) > 15
    assert len({positions(seed, 3) for seed in range(20)}) > 15
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_takes_every_example_equally_often() -> None:
    selector = make_selector("random", context(size=3))
    often = torch.zeros(R)
    for step in range(800):
        positions = choose(selector, step).positions
        assert positions.tolist() == sorted(set(positions.tolist()))
        assert len(positions) == 3
        often[positions] += 1
    assert float((often - 200).abs().max()) < 62  # standard deviation 12.2


def test_random_of_more_than_there_are() -> None:
    assert choose(make_selector("random", context(size=99)), 1).positions.tolist() == list(range(R))


def test_full_takes_all_in_order() -> None:
    coreset = choose(make_selector("full", context()), 1)
    assert coreset.positions.tolist() == list(range(R))
    assert coreset.num_kept == 0


def test_keep_random_keeps_small_sources_and_fills_the_quotas() -> None:
    selector = make_selector("keep_random", context())
    often = torch.zeros(R)
    for step in range(600):
        coreset = choose(selector, step)
        positions = coreset.positions.tolist()
        assert coreset.num_kept == 2
        assert positions[:2] == [0, 7]
        assert len(set(positions)) == 6
        big = SOURCES[coreset.positions[2:]]
        assert [int((big == source).sum()) for source in (1, 2)] == oracles.quotas([4, 6], 4) == [2, 2]
        often[coreset.positions] += 1
    of_one, of_two = often[SOURCES == 1], often[SOURCES == 2]
    assert float((of_one - 300).abs().max()) < 62  # standard deviation 12.2
    assert float((of_two - 200).abs().max()) < 60  # standard deviation 11.5


def test_keep_random_gives_the_same_room_as_colm() -> None:
    """The control differs from CoLM in the picks alone."""
    for per_source, size in ((True, 6), (False, 6), (True, 1), (True, R), (False, 9)):
        settings = context(size=size, per_source=per_source)
        colm = make_selector("colm", settings).select(make_batch(2), make_signals(2), SINGLE_PROCESS)
        control = choose(make_selector("keep_random", settings), 2)
        assert control.size == colm.size == size
        assert control.num_kept == colm.num_kept
        assert control.num_dropped_small == colm.num_dropped_small == max(0, 2 - size)
        if size >= 2:
            assert control.positions[: control.num_kept].tolist() == colm.positions[: colm.num_kept].tolist()
        if per_source:
            assert torch.equal(
                torch.bincount(SOURCES[control.positions], minlength=3),
                torch.bincount(SOURCES[colm.positions], minlength=3),
            )


def test_keep_random_joint_pool() -> None:
    selector = make_selector("keep_random", context(per_source=False, size=4))
    coresets = [choose(selector, step) for step in range(30)]
    assert all(coreset.positions[:2].tolist() == [0, 7] and coreset.size == 4 for coreset in coresets)
    assert len({int((SOURCES[coreset.positions] == 1).sum()) for coreset in coresets}) > 1


def test_colm_is_select_coreset_with_its_history() -> None:
    selector = make_selector("colm", context())
    assert selector.signal == "gradient"
    assert selector.state_dict() == {}
    coreset = choose(selector, 1, make_signals(1))
    expected = select_coreset(SOURCES, make_signals(1), 6, small=(0,), settings=context().settings)
    assert coreset.num_kept == expected.num_kept == 2
    assert coreset.size == 6
    assert selector.state_dict()["count"] == 1
    assert selector.state_dict()["m"].shape == (D,)


def test_plain_geometry_keeps_no_history() -> None:
    selector = make_selector("colm", context(geometry="plain"))
    chosen = [choose(selector, step, make_signals(step)).positions.tolist() for step in range(1, 6)]
    settings = context(geometry="plain").settings
    expected = [
        select_coreset(SOURCES, make_signals(step), 6, small=(0,), settings=settings, step=step).positions.tolist()
        for step in range(1, 6)
    ]
    assert chosen == expected
    assert selector.state_dict() == {}
    scaled = make_selector("colm", context())
    assert [choose(scaled, step, make_signals(step)).positions.tolist() for step in range(1, 6)] != expected


def test_colm_needs_signals() -> None:
    with pytest.raises(SelectionError, match="no signals"):
        choose(make_selector("colm", context()), 1)


def test_colm_uses_the_optimizers_betas_and_eps() -> None:
    def third(betas: tuple[float, float], eps: float) -> list[int]:
        base = context()
        selector = make_selector("colm", SelectorContext(base.size, base.small, base.settings, betas, eps))
        return [choose(selector, step, make_signals(step)).positions.tolist() for step in range(1, 8)][-1]

    assert third((0.9, 0.999), 1e-8) == third((0.9, 0.999), 1e-8)
    assert len({tuple(third(*each)) for each in (((0.9, 0.999), 1e-8), ((0.0, 0.1), 1e-8), ((0.9, 0.999), 10.0))}) > 1


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("early", [False, True], ids=["saved_after_use", "saved_again_before_use"])
def test_colm_resumes_as_if_it_had_never_stopped(stop: int, early: bool) -> None:
    whole = make_selector("colm", context())
    expected = [choose(whole, step, make_signals(step)).positions.tolist() for step in range(1, 7)]

    first = make_selector("colm", context())
    for step in range(1, stop + 1):
        choose(first, step, make_signals(step))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = make_selector("colm", context())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    if early:  # a checkpoint straight after loading holds the same state
        again = make_selector("colm", context())
        again.load_state_dict(copy.deepcopy(resumed.state_dict()))
        resumed = again
    chosen = [choose(resumed, step, make_signals(step)).positions.tolist() for step in range(stop + 1, 7)]
    assert chosen == expected[stop:]
    for key, value in whole.state_dict().items():
        assert torch.equal(torch.as_tensor(resumed.state_dict()[key]), torch.as_tensor(value))


def test_loading_replaces_what_was_there() -> None:
    used = make_selector("colm", context())
    choose(used, 1, make_signals(1))
    used.load_state_dict({})
    assert used.state_dict() == {}
    fresh = make_selector("colm", context())
    assert choose(used, 2, make_signals(2)).positions.tolist() == choose(fresh, 2, make_signals(2)).positions.tolist()


def test_colm_refuses_a_history_of_another_probe() -> None:
    selector = make_selector("colm", context())
    choose(selector, 1, make_signals(1))
    other = make_selector("colm", context())
    other.load_state_dict(selector.state_dict())
    with pytest.raises(SelectionError, match="history of 30 coordinates does not fit a probe of 31"):
        choose(other, 2, make_signals(2, d=31))


def test_colm_without_gradients_keeps_no_history() -> None:
    selector = make_selector("colm", context())
    choose(selector, 1, Signals(torch.arange(R), torch.ones(R, dtype=torch.bool), vectors=randn(R, 5, seed=1)))
    assert selector.state_dict() == {}
    dense = Signals(torch.arange(R), torch.ones(R, dtype=torch.bool), DenseGradients(randn(R, D, seed=1)))
    choose(selector, 2, dense)
    assert selector.state_dict()["count"] == 1


def test_seeds_differ_by_purpose_and_step() -> None:
    seeds = [derive_seed(0, purpose, step) for purpose in ("a", "b") for step in range(50)] + [derive_seed(1, "a", 0)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1, 23) != derive_seed(0, 12, 3)
    assert torch.equal(
        torch.randn(3, generator=private_generator(0, "a")), torch.randn(3, generator=private_generator(0, "a"))
    )
