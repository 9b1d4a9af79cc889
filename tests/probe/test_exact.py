"""`exact` is per-example autograd of the whole model, in the rows of the V projection."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from colm_ds.batching.micro_batch import PLACE_HOLDER, make_micro_batch
from colm_ds.models import token_loss
from colm_ds.models.architecture import find_architecture
from colm_ds.models.families import FAMILIES
from colm_ds.probe.factors import gradient_factors
from colm_ds.selection import SINGLE_PROCESS, DenseGradients
from colm_ds.types import Example
from tests.probe.oracles import (
    LENGTHS,
    make_estimator,
    make_examples,
    pad_further,
    plain_gradients,
    probe_step,
    probed_gradients,
    relative_error,
    signal_rows,
    trunk,
)
from tests.tiny_models import add_lora, randomise, tiny_model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_in_float64(family: str, lora: bool) -> None:
    model, examples = tiny_model(family, lora), make_examples()
    found = signal_rows(probe_step(make_estimator("exact", find_architecture(model)), model, examples))
    expected = plain_gradients(model, examples)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_equals_autograd_in_it(family: str, lora: bool, dtype: torch.dtype, bound: float) -> None:
    """The bound is a few roundings (bf16 4e-3, fp16 5e-4 each): padding changes the order of sums.

    Processors without units for these types sum in them and are further off, but no further than autograd itself.
    """
    model, examples = tiny_model(family, lora, dtype), make_examples()
    estimator = make_estimator("exact", find_architecture(model))
    signals = probe_step(estimator, model, examples)
    assert isinstance(signals.gradients, DenseGradients)
    assert signals.gradients.matrix.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    found = signal_rows(signals)
    low, high = plain_gradients(model, examples, None), plain_gradients(model, examples)
    own = relative_error(low, high)
    assert own < 10 * bound
    assert relative_error(found, low) < max(bound, own)
    assert relative_error(found, high) < max(bound, 1.5 * own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["exact", "sketch"])
def test_small_gradients_of_long_examples_do_not_underflow(name: str, dtype: torch.dtype) -> None:
    model, examples = tiny_model("llama"), make_examples((120, 110))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-4)  # a gradient of 1e-6 for a token's values
    architecture = find_architecture(model)
    expected = signal_rows(probe_step(make_estimator(name, architecture), model, examples))
    model = model.to(dtype)
    found = signal_rows(probe_step(make_estimator(name, architecture), model, examples))
    assert relative_error(found, expected) < 5e-2


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapter_in_float32_on_a_bf16_model(family: str) -> None:
    """What `get_peft_model` makes of a bf16 model by default."""
    model = add_lora(tiny_model(family, dtype=torch.bfloat16), family)
    randomise(model)
    architecture, tail = trunk(model, make_examples())
    ((delta, inputs),) = gradient_factors(architecture, tail)
    assert delta.dtype == inputs.dtype == torch.float32
    assert relative_error(probed_gradients(architecture, tail), plain_gradients(model, make_examples(), None)) < 2e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["v_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True},
        {"lora_bias": True},
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_other_ways_to_set_lora_up(settings: dict[str, Any]) -> None:
    model, examples = add_lora(tiny_model("llama"), "llama", **settings), make_examples()
    randomise(model)
    assert relative_error(probed_gradients(*trunk(model, examples)), plain_gradients(model, examples)) < 1e-5


def test_factors_are_zero_at_padding() -> None:
    architecture, tail = trunk(tiny_model("llama"), make_examples())
    ((delta, inputs),) = gradient_factors(architecture, tail)
    assert delta.shape == (5, 14, 16)
    assert inputs.shape == (5, 14, 32)
    for row, length in enumerate(LENGTHS):
        assert not delta[row, length - 1 :].any()  # nothing is predicted from the last token either
        assert delta[row, 0].any()


def test_logits_in_chunks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, tail = trunk(tiny_model("llama", lora=True), make_examples())
    expected = probed_gradients(architecture, tail)
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 5 * architecture.vocabulary_size)
    assert relative_error(probed_gradients(architecture, tail), expected) < 1e-6


def test_only_the_tail_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the trunk nor any weight gets a gradient: only what lies after the V projection is in the graph."""
    model = tiny_model("llama")
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: fired.append(name))
    architecture, tail = trunk(model, make_examples())
    gradient_factors(architecture, tail)
    assert fired == []


@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradient_in_any_company(family: str) -> None:
    model, examples = tiny_model(family), make_examples()
    together = probed_gradients(*trunk(model, examples))
    alone = torch.cat([probed_gradients(*trunk(model, [example])) for example in examples])
    backwards = probed_gradients(*trunk(model, examples[::-1])).flip(0)
    padded = probed_gradients(*trunk(model, pad_further(make_micro_batch(examples), 7, 33)))
    for other in (alone, backwards, padded):
        assert relative_error(other, together) < 1e-5


def test_micro_batches_in_any_order() -> None:
    model, examples = tiny_model("phi3", lora=True), make_examples()
    architecture = find_architecture(model)
    expected = signal_rows(probe_step(make_estimator("exact", architecture), model, examples))
    for micro_batches in ([[0, 1], [2, 3], [4]], [[4, 1], [0], [3, 2]]):
        signals = probe_step(make_estimator("exact", architecture), model, examples, micro_batches)
        assert signals.positions.tolist() == [position for group in micro_batches for position in group]
        assert signals.finite.tolist() == [True] * 5
        assert relative_error(signal_rows(signals), expected) < 1e-5


def test_not_all_are_probed() -> None:
    model, examples = tiny_model("llama"), make_examples()
    estimator = make_estimator("exact", find_architecture(model))
    signals = probe_step(estimator, model, examples, [[3], [1]], batch_size=7)
    assert sorted(signals.positions.tolist()) == [1, 3]
    assert signals.finite.tolist() == [True] * 7
    assert relative_error(signal_rows(signals), plain_gradients(model, [examples[1], examples[3]])) < 1e-5


def test_rank_without_examples() -> None:
    architecture = find_architecture(tiny_model("llama"))
    estimator = make_estimator("exact", architecture)
    estimator.begin(1, torch.tensor([0, 1]), 0)
    signals = estimator.signals(2, SINGLE_PROCESS)
    assert signals.positions.shape == (0,)
    assert signals.gradients.num_coordinates == architecture.targets[0].num_coordinates
    assert signals.finite.tolist() == [True, True]


def test_place_holder_leaves_no_row() -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    estimator = make_estimator("exact", architecture)
    estimator.begin(1, torch.tensor([0]), 1)
    with torch.no_grad():
        for group in ([examples[0]], []):
            tail = trunk(model, group)[1]
            estimator.observe(tail, torch.arange(len(group)), [len(one.input_ids) for one in group])
    signals = estimator.signals(1, SINGLE_PROCESS)
    assert signals.positions.tolist() == [0]
    assert relative_error(signal_rows(signals), plain_gradients(model, examples[:1])) < 1e-5


def poison(model: Any, token_id: int) -> None:
    """Make the model's output not a number wherever a token has been seen."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] = torch.nan


def with_token(example: Example, token_id: int) -> Example:
    """The example with that token in the middle of its prompt and answer."""
    input_ids = example.input_ids.clone()
    input_ids[2] = token_id
    return dataclasses.replace(example, input_ids=input_ids)


@pytest.mark.parametrize("name", ["spsa", "exact", "sketch"])
def test_example_that_is_not_finite_is_flagged_and_the_others_are_not(name: str) -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    token_id = max(int(one.input_ids.max()) for one in examples) + 1
    expected = signal_rows(probe_step(make_estimator(name, architecture), model, examples))
    poison(model, token_id)
    examples[1] = with_token(examples[1], token_id)
    signals = probe_step(make_estimator(name, architecture), model, examples, [[0, 1, 2], [3, 4]], batch_size=6)
    assert signals.finite.tolist() == [True, False, True, True, True, True]
    others = torch.tensor([0, 2, 3, 4])
    found = signal_rows(signals)[others]
    assert torch.allclose(found, expected[others], rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["spsa", "exact", "sketch"])
def test_step_forgets_the_one_before(name: str) -> None:
    model, examples = tiny_model("llama"), make_examples()
    architecture = find_architecture(model)
    used, fresh = (make_estimator(name, architecture) for _ in range(2))
    token_id = max(int(one.input_ids.max()) for one in examples) + 1
    poison(model, token_id)
    broken = [*examples[:4], with_token(examples[4], token_id)]
    assert not probe_step(used, model, broken).finite.all()
    found, expected = (probe_step(one, model, examples, [[2], [0]], step=2) for one in (used, fresh))
    assert found.finite.all()
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(signal_rows(found), signal_rows(expected))


@pytest.mark.parametrize("name", ["spsa", "exact", "sketch"])
def test_example_without_labels_has_a_signal_of_zero(name: str) -> None:
    model = tiny_model("llama")
    examples = [PLACE_HOLDER, dataclasses.replace(PLACE_HOLDER, labels=torch.tensor([-100, -100]))]
    signals = probe_step(make_estimator(name, find_architecture(model)), model, examples)
    assert signals.finite.tolist() == [True, True]
    assert signal_rows(signals)[0].any()
    assert not signal_rows(signals)[1].any()
