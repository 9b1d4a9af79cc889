"""Rules that hold for every selector by name: absent signals, ties, whole pools, quotas, seeds, weights, targets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.selection import (
    SELECTORS,
    SINGLE_PROCESS,
    SelectionSettings,
    SelectorContext,
    Signals,
    coreset_quotas,
    make_selector,
    needs_of,
    takes_outer_rules,
)
from colm_ds.types import Coreset, LargeBatch, PastLosses

R, B, K, HIDDEN = 24, 9, 6, 5
SOURCES = torch.tensor([1, 0, 1, 2, 1, 1, 2, 1, 3, 2, 1, 1, 2, 1, 2, 1, 1, 2, 1, 3, 2, 1, 1, 2])
SMALL = (0, 3)

STALE = {"stale": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SELECTORS},
    "ccs by margin": ("ccs", {"score": "margin", "weights": "inverse"}),
    "ccs by el2n": ("ccs", {"score": "el2n", "strata": 3, "beta": 0.3}),
    "simcore stopped": ("simcore", {"stop": True, "patience": 1, "threshold": 1.0, "truncate": "random"}),
    "simcore without clusters": ("simcore", {"clusters": 0}),
    "best of": ("vector_sum", {"method": "best_of"}),
    "importance": ("vector_sum", {"method": "importance"}),
    "cube": ("vector_sum", {"method": "balanced"}),
    "stale selective backprop": ("selective_backprop", STALE),
    "unbiased selective backprop": ("selective_backprop", {"weights": "inverse", "power": 2}),
    "greats, auto": ("greats", {"eta": "auto", "self_term": True, "normalise": True}),
    "greats, averaged": ("greats", {"eta": 0.5, "average": 0.9}),
    "opus, raw": ("opus", {"scale": "raw"}),
    "herding": ("grab", {"rule": "herding"}),
    "grab, carried": ("grab", {"carry": True, "weights": "uniform"}),
    "rho by softmax": ("rho_loss", {"sample": "softmax"}),
    "stale bands": ("loss_band", {**STALE, "focus": "medium", "temperature": 2.0}),
    "stale differences": ("delta_loss", STALE),
}


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(step: int = 1, sources: Tensor = SOURCES) -> LargeBatch:
    """A large batch with everything that a selector may ask for."""
    r = len(sources)
    last = numbers(r, seed=70 + step).abs()
    last[::5] = torch.nan
    return LargeBatch(
        step=step,
        indices=torch.arange(r),
        sources=sources,
        lengths=torch.full((r,), 9),
        num_label_tokens=torch.arange(r) % 7 + 1,
        home=torch.zeros(r, dtype=torch.int64),
        examples={},
        past=PastLosses(last, last + numbers(r, seed=80), 100),
        reference=numbers(r, seed=90).abs(),
        lr=1e-3,
    )


def width_of(name: str, options: dict[str, Any]) -> int:
    """Columns of the signal that a selector asks for."""
    needs = needs_of(name, options)
    return {"gradient": K, "hidden": HIDDEN + len(needs.also)}.get(needs.signal or "", 1)


def make_signals(
    name: str,
    options: dict[str, Any],
    step: int = 1,
    vectors: Tensor | None = None,
    rows: Tensor | None = None,
    target: Tensor | None = None,
) -> Signals | None:
    """Signals for a selector; None if it needs none."""
    needs, width = needs_of(name, options), width_of(name, options)
    if needs.signal is None:
        return None
    vectors = numbers(R, width, seed=step) if vectors is None else vectors
    rows = torch.arange(len(vectors)) if rows is None else rows
    widths = {"hidden": HIDDEN, "gradient_norm": 1} if needs.also else {}
    target = numbers(4, width, seed=60 + step) if target is None else target
    return Signals(
        rows,
        torch.isfinite(vectors).all(dim=1),
        vectors=vectors[rows],
        widths=widths,
        target=target,
        target_indices=[7, 8, 9, 3],
    )


def context(size: int = B, options: dict[str, Any] | None = None, **changes: Any) -> SelectorContext:
    """Arguments of a selector."""
    given: dict[str, Any] = {"settings": SelectionSettings(geometry="plain", seed=4), "small": SMALL} | changes
    return SelectorContext(size, options=options or {}, **given)


def choose(variant: str, size: int = B, batch: LargeBatch | None = None, **signals: Any) -> Coreset:
    """One choice of a new selector."""
    name, options = VARIANTS[variant]
    selector = make_selector(name, context(size, options))
    return selector.select(batch or make_batch(), make_signals(name, options, **signals), SINGLE_PROCESS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ccs", {"strata": 4}),
        ("vector_sum", {"method": "best_of", "trials": 7}),
        ("simcore", {"clusters": 4}),
        ("goracs", {"swaps": 5}),
    ],
)
def test_whole_numbers_may_be_written_with_a_point(name: str, options: dict[str, Any]) -> None:
    """JSON made by a program has 4.0 for 4."""
    written = {key: float(value) if isinstance(value, int) else value for key, value in options.items()}
    one, other = (
        make_selector(name, context(B, given)).select(make_batch(), make_signals(name, given), SINGLE_PROCESS)
        for given in (options, written)
    )
    assert one.positions.tolist() == other.positions.tolist()


@pytest.mark.parametrize("variant", ["opus", "greats, auto"])
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_size_of_gradients_does_not_matter(variant: str, size: float) -> None:
    """Losses may be means or sums, and gradients shrink in training."""
    name, options = VARIANTS[variant]
    width, scale = width_of(name, options), 2.0 ** round(math.log2(size))  # no rounding
    vectors, target = numbers(R, width, seed=1), numbers(4, width, seed=61)
    plain = choose(variant, vectors=vectors, target=target)
    scaled = choose(variant, vectors=vectors * scale, target=target * scale)
    assert scaled.positions.tolist() == plain.positions.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_picks_are_distinct_and_repeatable(variant: str) -> None:
    state = torch.random.get_rng_state()
    coreset = choose(variant)
    assert torch.equal(torch.random.get_rng_state(), state)
    wanted = R if variant == "full" else B
    assert coreset.positions.dtype == torch.int64
    assert len(set(coreset.positions.tolist())) == coreset.size == len(coreset.weights) == wanted
    assert coreset.weights.dtype == torch.float32
    assert bool((coreset.weights >= 0).all())
    again = choose(variant)
    assert again.positions.tolist() == coreset.positions.tolist()
    assert torch.equal(again.weights, coreset.weights)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [R, R + 5])
def test_what_fits_is_taken_whole(variant: str, size: int) -> None:
    coreset = choose(variant, size)
    name = VARIANTS[variant][0]
    kept = coreset.positions[: coreset.num_kept].tolist()
    picked = coreset.positions[coreset.num_kept :].tolist()
    assert sorted(kept + picked) == list(range(R))
    assert torch.allclose(coreset.weights, torch.ones(R), atol=1e-6)
    if takes_outer_rules(name):
        by_source = [[p for p in picked if int(SOURCES[p]) == source] for source in (1, 2)]
        assert kept == sorted(kept)
        assert picked == (by_source[0] + by_source[1] if kept else sorted(picked))


@pytest.mark.parametrize("variant", VARIANTS)
def test_signals_that_are_not_finite(variant: str) -> None:
    name, options = VARIANTS[variant]
    if needs_of(name, options).signal is None:
        return
    bad = [2, 9, 11]
    vectors = numbers(R, width_of(name, options), seed=1)
    vectors[bad[0]], vectors[bad[1], 0], vectors[bad[2], -1] = torch.nan, torch.inf, -torch.inf
    coreset = choose(variant, vectors=vectors)
    assert not set(coreset.positions.tolist()) & set(bad)
    assert (coreset.size, coreset.num_nonfinite, coreset.nonfinite) == (B, 3, tuple(bad))
    everything = choose(variant, R, vectors=vectors)
    assert sorted(everything.positions.tolist()) == [p for p in range(R) if p not in bad]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_equal_signals_are_allowed(variant: str, value: float) -> None:
    name, options = VARIANTS[variant]
    equal = torch.full((R, width_of(name, options)), value)
    coreset = choose(variant, vectors=equal, target=equal[:4])
    assert len(set(coreset.positions.tolist())) == (R if variant == "full" else B)
    assert bool(torch.isfinite(coreset.weights).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_signals_does_not_matter(variant: str) -> None:
    shuffled = torch.randperm(R, generator=torch.Generator().manual_seed(5))
    one, other = choose(variant), choose(variant, rows=shuffled)
    assert one.positions.tolist() == other.positions.tolist()
    assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v][0] not in ("full", "random")])
def test_outer_rules_are_colms(variant: str) -> None:
    """Small sources whole, quotas by source, weights of mean 1 in every pool; around any selector."""
    name, options = VARIANTS[variant]
    given = context(B, options, outer_rules="on" if takes_outer_rules(name) else "auto")
    coreset = make_selector(name, given).select(make_batch(), make_signals(name, options), SINGLE_PROCESS)
    small = [p for p in range(R) if int(SOURCES[p]) in SMALL]
    assert coreset.positions[: coreset.num_kept].tolist() == small
    assert bool((coreset.weights[: coreset.num_kept] == 1.0).all())
    sources = SOURCES[coreset.positions]
    counts = [int((source == SOURCES).sum()) for source in (1, 2)]
    assert [int((sources == source).sum()) for source in (1, 2)] == coreset_quotas(counts, B - len(small))
    for source in (1, 2):
        assert float(coreset.weights[sources == source].mean()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if takes_outer_rules(VARIANTS[v][0]) and v != "random"])
def test_one_source_makes_the_outer_rules_vanish(variant: str) -> None:
    name, options = VARIANTS[variant]
    batch = make_batch(sources=torch.zeros(R, dtype=torch.int64))
    chosen = [
        make_selector(name, context(B, options, small=(), outer_rules=rules)).select(
            batch, make_signals(name, options), SINGLE_PROCESS
        )
        for rules in ("on", "off")
    ]
    assert chosen[0].positions.tolist() == chosen[1].positions.tolist()
    assert torch.equal(chosen[0].weights, chosen[1].weights)
    assert chosen[1].num_kept == 0


def test_random_inside_the_outer_rules_is_keep_random() -> None:
    chosen = [
        make_selector(name, context(outer_rules=rules)).select(make_batch(), None, SINGLE_PROCESS)
        for name, rules in (("random", "on"), ("keep_random", "auto"))
    ]
    assert chosen[0].positions.tolist() == chosen[1].positions.tolist()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if needs_of(*VARIANTS[v]).target])
def test_targets_that_are_not_finite_are_named(variant: str) -> None:
    name, options = VARIANTS[variant]
    target = numbers(4, width_of(name, options), seed=3)
    target[2, 0] = torch.nan
    with pytest.raises(SelectionError, match=r"step 1: target examples 9 of colm\.target\.data"):
        choose(variant, target=target)
    with pytest.raises(SelectionError, match="was given no target"):
        choose(variant, target=target[:0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_goes_on(variant: str) -> None:
    """A selector that is given another's state in the middle chooses as that one."""
    name, options = VARIANTS[variant]
    first = make_selector(name, context(B, options))
    chosen = []
    for step in (1, 2, 3):
        second = make_selector(name, context(B, options))
        second.load_state_dict(dict(first.state_dict()))
        arguments = make_batch(step), make_signals(name, options, step), SINGLE_PROCESS
        alike = [selector.select(*arguments) for selector in (first, second)]
        assert alike[0].positions.tolist() == alike[1].positions.tolist()
        assert torch.equal(alike[0].weights, alike[1].weights)
        chosen.append(alike[0].positions.tolist())
    if variant in ("greats, averaged", "grab, carried"):
        fresh = make_selector(name, context(B, options))
        assert fresh.select(*arguments).positions.tolist() != chosen[-1]
        assert first.state_dict()


@pytest.mark.parametrize("variant", ["random", "ccs", "opus", "grab", "infobatch", "loss_band", "importance"])
def test_random_choices_differ_by_step_and_seed(variant: str) -> None:
    name, options = VARIANTS[variant]
    signals = make_signals(name, options)
    made = set()
    for step in range(1, 11):
        batch = dataclasses.replace(make_batch(), step=step)
        made.add(
            tuple(
                sorted(
                    make_selector(name, context(B, options)).select(batch, signals, SINGLE_PROCESS).positions.tolist()
                )
            )
        )
    assert len(made) >= 6


def test_wrong_options_are_all_named() -> None:
    wrong = {"beta": 2, "strat": 4, "score": "grad", "strata": 2.5}
    with pytest.raises(SelectionError) as raised:
        make_selector("ccs", context(B, wrong))
    text = str(raised.value)
    for part in ("options.beta = 2", "Did you mean 'strata'?", "loss, margin, el2n", "a whole number of at least 1"):
        assert part in text
    with pytest.raises(SelectionError, match="no such option"):
        make_selector("infobatch", context(B, {"ratio": 0.5}))


def test_losses_that_a_table_lacks_are_left_out() -> None:
    reference = numbers(R, seed=90).abs()
    reference[[3, 5]] = torch.nan
    coreset = choose("rho_loss", R, batch=dataclasses.replace(make_batch(), reference=reference))
    assert (coreset.num_nonfinite, coreset.nonfinite) == (2, (3, 5))
    assert coreset.size == R - 2
