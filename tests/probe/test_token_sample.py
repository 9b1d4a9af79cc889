"""`probe.token_sample`: gradients of the mean loss over the sampled labels, the same in any micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colm_ds.batching.gather import gather_large_batch
from colm_ds.batching.micro_batch import make_micro_batch, with_fewer_labels
from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.probe.exact import ExactEstimator
from colm_ds.randomness import private_generator
from colm_ds.selection import SINGLE_PROCESS, Signals
from colm_ds.types import Example
from tests.probe.oracles import make_examples, plain_gradients, relative_error
from tests.tiny_models import tiny_model

SEED, SHARE = 5, 0.4
LENGTHS = (9, 14, 25, 11, 7, 30, 18, 21)


def run(monkeypatch: pytest.MonkeyPatch, examples: list[Example], **colm: Any) -> tuple[Any, list[int]]:
    """One step: the gradients by position, and what was chosen."""
    probe = {"estimator": "exact", **colm.pop("probe", {})}
    section = {"large_batch_size": 8, "coreset_size": 3, "small_sources": "none", "seed": SEED, "probe": probe, **colm}
    selector = CoresetSelector(tiny_model("llama"), section, ["only"])
    estimator, seen = selector._estimator, []
    if isinstance(estimator, ExactEstimator):
        signals = estimator.signals

        def kept(*args: Any) -> Signals:  # the estimator lets go of them
            rows, positions = estimator.local_gradients()
            seen.append(rows[positions.argsort()].clone())
            return signals(*args)

        monkeypatch.setattr(estimator, "signals", kept)
    chosen = selector(gather_large_batch(lambda: examples, 1, 0, SINGLE_PROCESS)).positions.tolist()
    return (seen[0] if seen else None), chosen


def sampled(examples: list[Example]) -> list[Example]:
    """The examples without the labels that the step does not look at."""
    offsets = torch.rand(len(examples), generator=private_generator(SEED, "tokens", 1))
    part = with_fewer_labels(make_micro_batch(examples), SHARE, offsets)
    thinned = []
    for row, each in enumerate(examples):
        labels = torch.full_like(each.labels, -100)
        at = part.positions[part.rows == row] + 1
        labels[at] = each.labels[at]
        thinned.append(Example(each.input_ids, labels, each.source, each.index))
    return thinned


@pytest.mark.parametrize("max_tokens", ["auto", 40])
def test_gradients_are_those_of_the_sampled_labels(max_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(LENGTHS)
    fewer = sampled(examples)
    assert sum(int((each.labels != -100).sum()) for each in fewer) < 0.55 * sum(
        int((each.labels[1:] != -100).sum()) for each in examples
    )
    found, chosen = run(monkeypatch, examples, probe={"token_sample": SHARE, "max_tokens": max_tokens})
    assert relative_error(found, plain_gradients(tiny_model("llama"), fewer)) < 1e-5
    assert chosen == run(monkeypatch, fewer)[1]


def test_all_tokens_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(LENGTHS)
    asked = run(monkeypatch, examples, probe={"token_sample": 1.0})[0]
    assert torch.equal(run(monkeypatch, examples)[0], asked)


def test_hidden_medoids_look_at_the_last_token_still(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(LENGTHS)
    probe = {"token_sample": SHARE}
    assert (
        run(monkeypatch, examples, selector="hidden_medoids", probe=probe)[1]
        == run(monkeypatch, examples, selector="hidden_medoids")[1]
    )
