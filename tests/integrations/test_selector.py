"""`CoresetSelector` in a loop of one's own."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

import colm_ds
from colm_ds.engine.accumulation import loss_scale
from colm_ds.errors import ConfigError, DataError, SelectionError
from colm_ds.types import Coreset, LargeBatch
from tests.engine.oracle import largest_difference
from tests.engine.training import Record, records
from tests.integrations.runs import pad
from tests.tiny_models import tiny_model

COUNTS = {"a": 20, "b": 16, "c": 3}
SIZES = {"large_batch_size": 13, "coreset_size": 6, "seed": 1}


def data() -> list[Record]:
    return records(COUNTS)


def make(**colm: Any) -> Any:
    return colm_ds.CoresetSelector(tiny_model("llama"), {**SIZES, **colm}, COUNTS)


def collated(examples: list[Record], *, left: bool = False) -> dict[str, Any]:
    """A padded batch, on either side, with sources by name."""
    batch: dict[str, Any] = pad([{k: row[k] for k in ("input_ids", "labels")} for row in examples])
    if left:
        for row, example in enumerate(examples):
            shift = batch["input_ids"].shape[1] - len(example["input_ids"])
            batch = {key: values.clone() for key, values in batch.items()}
            for values in batch.values():
                values[row] = values[row].roll(shift)
    return {**batch, "source": [row["source"] for row in examples]}


@pytest.mark.parametrize("left", [False, True])
def test_list_and_padded_batch_are_the_same(left: bool) -> None:
    examples = data()[:13]
    one, other = make()(examples), make()(collated(examples, left=left))
    assert one.positions.tolist() == other.positions.tolist()
    numbers = {**collated(examples), "source": torch.tensor([list(COUNTS).index(row["source"]) for row in examples])}
    assert make()(numbers).positions.tolist() == one.positions.tolist()


def test_small_sources_are_kept_and_b_chosen() -> None:
    selector = make()
    coreset = selector(data()[:13])
    kept = [place for place, row in enumerate(data()[:13]) if row["source"] == "c"]
    assert set(kept) <= set(coreset.positions.tolist())
    places, weights = selector.share(coreset)
    assert sorted(places) == sorted(coreset.positions.tolist())
    assert torch.allclose(weights, torch.full((6,), 1 / 6))


def test_share_gives_the_mean_over_tokens() -> None:
    selector = make(loss_normalization="token")
    examples = data()[:13]
    places, weights = selector.share(selector(examples))
    labelled = torch.tensor([sum(label != -100 for label in examples[p]["labels"][1:]) for p in places])
    assert torch.allclose(weights, labelled / labelled.sum())


@pytest.mark.parametrize("estimator", ["spsa", "exact", "sketch"])
def test_state_goes_on_exactly(estimator: str) -> None:
    probe = {"estimator": estimator}
    whole, first, rest = make(probe=probe), make(probe=probe), make(probe=probe)
    batches = [data()[start : start + 13] for start in (0, 13, 26)]
    wanted = [whole(batch).positions.tolist() for batch in batches]
    for batch in batches[:2]:
        first(batch)
    rest.load_state_dict(first.state_dict())
    assert rest(batches[2]).positions.tolist() == wanted[2]
    assert rest.step_count == 3


def test_a_state_of_another_choice_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokens = {"probe": {"estimator": "tokens"}}
    before, after = make(selector="colm", **tokens), make(**tokens)
    make(**tokens).load_state_dict(after.state_dict())
    assert not caplog.messages
    after.load_state_dict(before.state_dict())
    (said,) = caplog.messages
    assert "steps before the checkpoint were chosen with colm.selector = 'colm', colm.weights = 'matched'" in said


def test_weights_of_what_is_left_when_an_example_breaks() -> None:
    """As if it had not been chosen: factors of the others' mean losses add up to 1, in the proportion of weights."""
    lengths = torch.tensor([3, 5, 2, 7])
    nowhere = torch.zeros(4, dtype=torch.int64)
    batch = LargeBatch(1, torch.arange(4), nowhere, lengths, lengths, nowhere, {})
    coreset = Coreset(torch.tensor([0, 1, 3]), torch.tensor([0.3, 0.4, 2.3]), 0, 0, 0)
    for broken, left in (([], [0.1, 0.4 / 3, 0.0, 2.3 / 3]), ([3], [0.3 / 0.7, 0.4 / 0.7, 0.0, 0.0])):
        factors = loss_scale(batch, coreset, "example", broken) * lengths
        assert factors.tolist() == pytest.approx(left)


def test_example_losses_are_the_model_s() -> None:
    model, examples = tiny_model("llama"), data()[:3]
    losses = colm_ds.example_losses(model, examples)
    for loss, row in zip(losses, examples, strict=True):
        inputs = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
        assert float(loss.detach()) == pytest.approx(float(model(**inputs).loss.detach()), abs=1e-5)
    assert torch.equal(colm_ds.example_losses(model, collated(examples)), losses)
    nothing = colm_ds.example_losses(model, [])
    nothing.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_mistakes_are_named() -> None:
    examples = data()[:13]
    with pytest.raises(DataError, match="source 'z' is not among those counted before training: 'a', 'b', 'c'"):
        make()([*examples[:12], {**examples[12], "source": "z"}])
    with pytest.raises(DataError, match="example 0: no 'source'"):
        make()([{"input_ids": [1, 2]}])
    with pytest.raises(DataError, match=r"examples \[12\] have no label"):
        make()([*examples[:12], {**examples[12], "labels": [-100] * len(examples[12]["labels"])}])
    with pytest.raises(SelectionError, match=r"3 examples, fewer than coreset_size = 6"):
        make()(examples[:3])
    with pytest.raises(ConfigError, match="Did you mean 'metric'"):
        make(metrik="l1")
    with pytest.raises(ConfigError, match=r"more than colm\.large_batch_size = 13"):
        make(coreset_size=14)
    with pytest.raises(ConfigError, match=r"colm\.replay = 'on': needs the step of colm_ds\.initialize"):
        make(replay="on")
    with pytest.raises(ConfigError, match=r"colm\.variance_every = 5: .* Call gradient_variance instead\."):
        make(variance_every=5)
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="the sources of the dataset are not known"):
        colm_ds.CoresetSelector(model, SIZES)
    with pytest.raises(ConfigError, match="names of sources without numbers of examples"):
        colm_ds.CoresetSelector(model, SIZES, ["a", "b", "c"])


@pytest.mark.parametrize("selector", ["colm", "random"])
def test_variance_of_the_gradient(selector: str) -> None:
    """In any loop; of all examples it is nothing."""
    examples = data()[:13]
    choose = make(selector=selector)
    found = choose.gradient_variance(choose(examples))
    assert found is not None
    assert found["coreset"] > 0
    assert found["random"] > 0
    whole = make(selector="full", coreset_size=13)
    assert whole.gradient_variance(whole(examples)) == pytest.approx({"coreset": 0.0, "random": 0.0}, abs=1e-9)


def test_names_or_nothing_where_counts_are_not_needed() -> None:
    model, examples = tiny_model("llama"), data()[:13]
    listed = colm_ds.CoresetSelector(model, {**SIZES, "small_sources": ["c"]}, ["a", "b", "c"])
    assert listed(examples).positions.tolist() == make()(examples).positions.tolist()
    pool = {**SIZES, "small_sources": "none", "per_source": False}
    assert colm_ds.CoresetSelector(model, pool)(examples).coreset.num_kept == 0
    assert Counter(row["source"] for row in data()) == COUNTS


def test_a_plain_loop_resumes_exactly() -> None:
    """Weights, optimizer and selector of a checkpoint after two steps, and the third from it."""

    def loop(state: dict[str, Any] | None, steps: range) -> dict[str, Any]:
        model = tiny_model("llama").train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        selector = colm_ds.CoresetSelector(
            model, {**SIZES, "probe": {"estimator": "exact"}}, COUNTS, optimizer=optimizer
        )
        holders = {"model": model, "optimizer": optimizer, "selector": selector}
        for name, holder in holders.items() if state else ():
            holder.load_state_dict(state[name])
        for step in steps:
            examples = data()[step * 9 : step * 9 + 13]
            places, weights = selector.share(selector(examples))
            (colm_ds.example_losses(model, [examples[place] for place in places]) * weights).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy({name: holder.state_dict() for name, holder in holders.items()})

    whole = loop(None, range(3))
    rest = loop(loop(None, range(2)), range(2, 3))
    assert largest_difference(whole["model"], rest["model"]) == 0.0
    assert rest["selector"]["step"] == 3
