"""Every selector in training: the same choice on 1 rank at stage 0, on 2 at another, and from its state half-way."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import colm_ds
from colm_ds.batching.loader import RecordDataset, source_counts
from colm_ds.config.colm import TargetConfig
from colm_ds.config.resolve import resolve_config
from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.engine.loss_store import LossStore
from colm_ds.engine.reference_losses import read_reference_losses, write_reference_losses
from colm_ds.engine.target_stream import TargetStream, draw_targets
from colm_ds.errors import CheckpointError, ConfigError, DataError, SelectionError
from colm_ds.selection import SELECTORS, StatelessSelector
from tests.engine.oracle import token_losses
from tests.engine.training import NOTHING_PERSISTS, Case, records, start
from tests.ranks import Ranks

R, B, STEPS = 14, 6, 3
FEW = {"algebra": 11, "biology": 10, "code": 8, "drama": 2, "essays": 1}
"""Sources of so few examples that most are seen twice in three steps."""

SIZES = {"large_batch_size": R, "coreset_size": B}
TARGETS = {"size": 5, "batch": 3}
RUN = {"estimator": "sketch", "num_probes": 16, "refresh": "run"}

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in SELECTORS if name not in ("full", "colm", "keep_random")},
    "ccs by margin": {"selector": "ccs", "options": {"score": "margin"}},
    "ccs by el2n": {"selector": "ccs", "options": {"score": "el2n", "strata": 3}},
    "big_loss by source": {"selector": "big_loss", "outer_rules": "on"},
    "stale selective backprop": {"selector": "selective_backprop", "options": {"stale": True}},
    "stale differences": {"selector": "delta_loss", "options": {"stale": True}},
    "greats, averaged": {"selector": "greats", "options": {"average": 0.8, "eta": "auto"}, "probe": RUN},
    "opus, raw": {"selector": "opus", "options": {"scale": "raw"}, "loss_normalization": "token"},
    "grab, carried": {"selector": "grab", "options": {"carry": True}, "probe": RUN, "outer_rules": "off"},
    "grab by tokens": {"selector": "grab", "probe": {"estimator": "tokens"}},
    "herding": {"selector": "grab", "options": {"rule": "herding"}},
    "rho, small sources unknown": {"selector": "rho_loss"},
    "simcore, seldom": {"selector": "simcore", "target": {**TARGETS, "refresh": 2}},
}


def section_of(variant: str, table: str) -> dict[str, Any]:
    """The `"colm"` section of a variant."""
    section = {"selector": variant} | VARIANTS[variant]
    if section["selector"] in ("simcore", "goracs", "greats", "opus"):
        section = {"target": TARGETS} | section
    if section["selector"] == "rho_loss":
        known = f"{table}.large_sources" if "unknown" in variant else table
        section = section | {"options": {"table": known}}
    if section["selector"] in ("greats", "opus", "vector_sum", "grab"):
        section = {"probe": {"num_probes": 16}} | section
    return {**SIZES, "seed": 3, **section}


def selector_of(engine: Any, variant: str, table: str) -> CoresetSelector:
    """A new selector of a variant on an engine's model."""
    colm = resolve_config({"colm": section_of(variant, table)}, 1).colm
    group = engine.deepspeed_engine.optimizer.param_groups[0]
    return CoresetSelector(
        engine.module,
        colm,
        source_counts(engine.loader.dataset),
        device=torch.device("cpu"),
        betas=group["betas"],
        eps=group["eps"],
        equal_counts=engine.deepspeed_engine.zero_optimization_stage() == 3,
        dataset=engine.loader.dataset,
        target=RecordDataset(records({"algebra": 5, "drama": 4}, seed=9)) if colm.needs.target else None,
        learning_rate=lambda: float(group["lr"]),
        by_engine=True,
    )


def choices(stage: int, table: str) -> dict[str, list[Any]]:
    """In a rank: what every variant chooses in three steps of one run, and whether its state is all that it knows."""
    zero = NOTHING_PERSISTS if stage == 3 else {}
    engine = start(Case("systems", stage=stage, zero=zero, sources=FEW, colm={**SIZES, "selector": "random"}))
    selectors = {variant: selector_of(engine, variant, table) for variant in VARIANTS}
    made: dict[str, list[Any]] = {variant: [] for variant in VARIANTS}
    engine.coreset_selector = _Noting(engine.coreset_selector, list(selectors.values()))
    try:
        for step in range(1, STEPS + 1):
            batch = engine.loader.batch(step)
            for variant, selector in selectors.items():
                if step == STEPS:
                    resumed = selector_of(engine, variant, table)
                    resumed.load_state_dict(copy.deepcopy(selector.state_dict()))
                    ahead = resumed(batch).coreset
                selection = selector(batch)
                chosen, weights = selection.coreset, [round(weight, 4) for weight in selection.weights.tolist()]
                made[variant].append((chosen.positions.tolist(), weights, len(selection.probed)))
                if step == STEPS:
                    assert ahead.positions.tolist() == chosen.positions.tolist(), variant
                    assert torch.equal(ahead.weights, chosen.weights), variant
            engine.train_batch(batch)
        return made
    finally:
        engine.destroy()


class _Noting:
    """An engine's selector that tells others what training found."""

    def __init__(self, inner: CoresetSelector, others: list[CoresetSelector]) -> None:
        self._inner, self._others = inner, others

    def __call__(self, *args: Any) -> Any:
        return self._inner(*args)

    def note_losses(self, *args: Any) -> None:
        for other in self._others:
            other.note_losses(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("losses") / "reference.pt"
    losses = torch.rand(sum(FEW.values()), generator=torch.Generator().manual_seed(1)) * 5
    write_reference_losses(path, losses, "digest", {})
    small = [place for place, row in enumerate(records(FEW)) if FEW[row["source"]] < R / 3]
    losses[small] = math.nan  # which are below |V|/c: the others have to fill the whole coreset
    write_reference_losses(Path(f"{path}.large_sources"), losses, "digest", {})
    return str(path)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_stages_and_resuming(stage: int, pools: dict[int, Ranks], table: str) -> None:
    (wanted,) = pools[1].run(choices, 0, table, timeout_s=300)
    for variant, steps in wanted.items():
        assert len({tuple(positions) for positions, _, _ in steps}) > 1, variant
        assert all(len(positions) == B for positions, _, _ in steps), variant
    alike = [{name for name in wanted if wanted[name] == steps} for steps in wanted.values()]
    assert [names for names in alike if len(names) > 1] == []  # each option does something
    for found in pools[2].run(choices, stage, table, timeout_s=300):
        for variant in VARIANTS:
            assert found[variant] == wanted[variant], variant


def losses_and_scores() -> dict[str, Any]:
    """In a rank: what the store holds after a step, and the scores of one pass, beside plain autograd."""
    case = Case("store", colm={**SIZES, "selector": "infobatch"})
    engine = start(case)
    data = case.records()
    before = copy.deepcopy(engine.module)
    batch = engine.loader.batch(1)
    stats = engine.train_batch(batch)
    state = engine.coreset_selector.state_dict()["losses"]
    known = torch.isfinite(state["last"]).nonzero().flatten().tolist()
    with torch.no_grad():
        plain = {index: float(token_losses(before.eval(), data[index]).mean()) for index in known}
    engine.destroy()
    return {"known": known, "state": state, "plain": plain, "trained": stats.examples_trained}


@pytest.mark.distributed
def test_the_store_holds_the_losses_of_training(pools: dict[int, Ranks]) -> None:
    for found in pools[2].run(losses_and_scores):
        assert len(found["known"]) == found["trained"] == B
        for index, loss in found["plain"].items():
            assert float(found["state"]["last"][index]) == pytest.approx(loss, rel=1e-5)
            assert float(found["state"]["first"][index]) == float(found["state"]["last"][index])


def test_the_store_keeps_the_first_and_the_last() -> None:
    store = LossStore(6)
    store.note(torch.tensor([4, 1]), torch.tensor([2.0, 3.0]))
    store.note(torch.tensor([1, 0, 5]), torch.tensor([1.0, torch.nan, 7.0]))
    past = store.of(torch.tensor([1, 4, 0, 5]))
    assert past.last.nan_to_num(-1).tolist() == [1.0, 2.0, -1.0, 7.0]
    assert past.first.nan_to_num(-1).tolist() == [3.0, 2.0, -1.0, 7.0]
    other = LossStore(6)
    other.load_state_dict(store.state_dict())
    assert other.of(torch.arange(6)).first.nan_to_num(-1).tolist() == [-1.0, 3.0, -1.0, -1.0, 2.0, 7.0]
    with pytest.raises(CheckpointError, match="losses of 6 examples, the dataset has 5"):
        LossStore(5).load_state_dict(store.state_dict())


def test_targets_are_a_shuffled_stream() -> None:
    dataset = RecordDataset(records({"algebra": 9, "drama": 3}, seed=9))
    stream = TargetStream(dataset, TargetConfig(size=6, batch=4, refresh=2), 0, 2)
    seen = [stream.indices(step) for step in range(1, 13)]
    assert seen[0] == seen[1] != seen[2]
    flat = [index for step in seen[::2] for index in step]
    assert sorted(flat[:6]) == sorted(flat[6:12]) == sorted(flat[12:18])
    assert flat[:6] != flat[6:12]
    ids = dataset.source_ids
    assert [int((ids[draw_targets(ids, TargetConfig(size=6, mix="equal"), 0)] == k).sum()) for k in (0, 1)] == [3, 3]
    assert [int((ids[draw_targets(ids, TargetConfig(size=8, mix="equal"), 0)] == k).sum()) for k in (0, 1)] == [5, 3]
    with pytest.raises(ConfigError, match="the target data has 12 examples"):
        TargetStream(dataset, TargetConfig(size=13), 0, 1)


def broken_target() -> str:
    """In a rank: train with a target whose signal is not finite."""
    case = Case("broken", colm={**SIZES, "selector": "simcore", "target": TARGETS})
    engine = start(case, target_data=records({"algebra": 5}, seed=9))
    stream = engine.coreset_selector._target
    plain = stream.split

    def spoil(signals: Any, *args: Any) -> Any:
        split = plain(signals, *args)
        target = split.target.clone()
        target[1, 0] = torch.nan
        return dataclasses.replace(split, target=target)

    stream.split = spoil
    try:
        engine.train_batch()
    except SelectionError as error:
        return str(error)
    finally:
        engine.destroy()
    return "nothing"


@pytest.mark.distributed
def test_a_broken_target_is_named_on_every_rank(pools: dict[int, Ranks]) -> None:
    first, second = pools[2].run(broken_target)
    assert "of colm.target.data have a signal that is not finite" in first
    assert second == "step 1: rank 0 could not choose; its message says why."


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "option": ({"selector": "ccs", "options": {"betta": 0.1}}, r"colm\.options\.betta = 0\.1: .* Did you mean 'beta'"),
    "value": ({"selector": "opus", "options": {"scale": "log"}}, r"colm\.options\.scale = 'log': not std, raw"),
    "rules": ({"selector": "full", "outer_rules": "on"}, r"colm\.outer_rules = 'on': 'full' has rules of its own"),
    "exact": (
        {"selector": "grab", "probe": {"estimator": "exact"}},
        "compares short vectors .* Write sketch",
    ),
    "tokens": ({"selector": "greats", "probe": {"estimator": "tokens"}}, "compares gradients, and token embeddings"),
    "weights": ({"selector": "vector_sum", "weights": "matched"}, r"colm\.weights = 'matched'.* weights of its own"),
    "carry": ({"selector": "grab", "options": {"carry": True}}, r"colm\.probe\.refresh = 'step'.* Write run"),
    "geometry": ({"selector": "opus", "geometry": "plain"}, r"colm\.geometry = 'plain': 'opus' scales"),
    "geometry of slopes": (
        {"selector": "grab", "geometry": "adam", "probe": {"estimator": "spsa"}},
        r"colm\.geometry = 'adam': 'grab' goes by the slopes of spsa as they are",
    ),
    "geometry of draws": (
        {"selector": "importance", "geometry": "adam", "probe": {"estimator": "exact"}},
        r"colm\.geometry = 'adam': 'importance' goes by exact gradients as they are",
    ),
    "geometry of a target": (
        {"selector": "greats", "geometry": "adam", "probe": {"estimator": "projection"}},
        r"colm\.geometry = 'adam': 'greats' compares with a target's gradients",
    ),
    "weights of medoids": (
        {"selector": "hidden_medoids", "weights": "cluster"},
        r"colm\.weights = 'cluster': 'hidden_medoids' does not weigh its picks so\. Write \"uniform\"",
    ),
    "refresh": (
        {"probe": {"estimator": "exact", "refresh": "run"}},
        r"colm\.probe\.refresh = 'run': the exact gradient",
    ),
    "endless": (
        {"selector": "ccs", "options": {"strata": float("inf")}},
        r"colm\.options\.strata = inf: not a whole number",
    ),
    "table": ({"selector": "rho_loss"}, r"colm\.options\.table = None: .* Write the file of colm-ds score"),
    "batch": ({"selector": "greats", "target": {"size": 4}}, r"colm\.target\.batch = 8: more than size = 4"),
    "target": (
        {"selector": "grab", "target": {"data": "a.jsonl"}},
        "'grab' compares with no target",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together(name: str) -> None:
    section, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        resolve_config({"colm": {**SIZES, **section}}, 1)


def test_own_selectors_may_use_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package's do not use is refused; what others use is not known."""
    for kind in (SELECTORS["colm"], StatelessSelector):
        monkeypatch.setitem(SELECTORS, "mine", type("Mine", (kind,), {"name": "mine", "signal": "gradient"}))
        for section in ({}, {"weights": "matched"}, {"geometry": "adam"}):
            resolved = resolve_config({"colm": {**SIZES, "selector": "mine", **section}}, 1).colm
            assert resolved.weights == section.get("weights", "uniform")


def test_selectors_that_need_the_engine() -> None:
    model = Case("").build_model()
    for section in (
        {"selector": "infobatch"},
        {"selector": "simcore"},
        {"selector": "rho_loss", "options": {"table": "x"}},
    ):
        with pytest.raises(ConfigError, match=r"which the step of colm_ds\.initialize"):
            CoresetSelector(model, {**SIZES, **section}, {"a": 64})


def test_target_data_may_be_plain_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colm_ds.engine.initialization, "_is_first", lambda: True)
    plain = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    target = colm_ds.engine.initialization._target(plain, needs_sources=False)
    assert target is not None
    assert list(target.source_names) == ["all"]
    with pytest.raises(DataError, match="target_data: example 0: no 'source'"):
        colm_ds.engine.initialization._target(plain, needs_sources=True)


def test_target_data_where_it_is_needed_and_only_there() -> None:
    for selector, given, message in (
        ("greats", None, "compares with a target. Give target_data"),
        ("grab", [], "the selector 'grab' compares with no target"),
    ):
        config = {"colm": {**SIZES, "selector": selector}}
        with pytest.raises(ConfigError, match=message):
            colm_ds.engine.initialization._check_target(resolve_config(config, 1), given)


def test_tables_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "losses.pt"
    with pytest.raises(ConfigError, match=r"no such file\. Write it with colm-ds score"):
        read_reference_losses(path, 3)
    path.write_text("no table")
    with pytest.raises(ConfigError, match="not readable"):
        read_reference_losses(path, 3)
    torch.save({"losses": torch.ones(3)}, path)
    with pytest.raises(ConfigError, match="not a table"):
        read_reference_losses(path, 3)
    write_reference_losses(path, torch.tensor([1.0, torch.nan]), "d", {"model": "m"})
    assert read_reference_losses(path, 2).nan_to_num(-1).tolist() == [1.0, -1.0]
    with pytest.raises(ConfigError, match="losses of 2 examples, the training data has 3"):
        read_reference_losses(path, 3)
