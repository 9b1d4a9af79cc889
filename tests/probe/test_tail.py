"""Trunk and tail together are the model: its losses, in its own precision or in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.errors import ProbeError
from colm_ds.models import token_loss
from colm_ds.models.architecture import Architecture, find_architecture
from colm_ds.models.families import FAMILIES
from colm_ds.probe import tail as tail_module
from colm_ds.probe.tail import TailInput, precise_tail, run_trunk, tail_losses
from colm_ds.types import Example
from tests.probe.oracles import make_estimator, make_examples, pad_further, plain_losses, trunk
from tests.tiny_models import tiny_model

BACKENDS: Any = torch.backends


def losses_of(architecture: Architecture, tail: TailInput) -> Tensor:
    with torch.no_grad():
        return tail_losses(architecture, tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_every_example_alone(family: str, lora: bool, dtype: torch.dtype) -> None:
    model, examples = tiny_model(family, lora, dtype), make_examples()
    losses = losses_of(*trunk(model, examples))
    assert losses.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # one rounding of a logit in bf16 is 8e-3
    assert torch.allclose(losses, plain_losses(model, examples), rtol=tolerance)


CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attn_implementation": "eager"}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("llama", {"output_hidden_states": True}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 4, "attn_implementation": "eager"}),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
    ("phi3", {"sliding_window": 4}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("stablelm", {"use_parallel_residual": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "config"), CONFIGURATIONS, ids=str)
def test_variants_of_the_families(family: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    model, examples = tiny_model(family, dtype=dtype, **config), make_examples()
    architecture, tail = trunk(model, examples)
    expected = plain_losses(model, examples)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(losses_of(architecture, tail), expected, rtol=tolerance)
    with precise_tail(architecture):  # also runs every module that these configurations add
        assert torch.allclose(losses_of(architecture, tail.cast(torch.float32)), expected, rtol=tolerance)


def test_no_labels_no_loss() -> None:
    unlabelled = Example(torch.tensor([5, 6, 7]), torch.full((3,), -100), 0, 0)
    only_first = Example(torch.tensor([5, 6, 7]), torch.tensor([5, -100, -100]), 0, 1)
    examples = [unlabelled, *make_examples((6, 4)), only_first]
    model = tiny_model("llama")
    losses = losses_of(*trunk(model, examples))
    assert losses[0] == losses[3] == 0.0
    assert torch.allclose(losses[1:3], plain_losses(model, examples[1:3]), rtol=1e-5)
    assert losses_of(*trunk(model, [unlabelled])).tolist() == [0.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_matter(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    batch = make_micro_batch(make_examples())
    expected = losses_of(*trunk(model, batch))
    for token_id in (0, 2, 50):  # padding, end of text, any
        assert torch.allclose(losses_of(*trunk(model, pad_further(batch, 9, token_id))), expected, rtol=1e-5)


def test_trunk_computes_no_logits() -> None:
    model = tiny_model("llama")
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    examples = make_examples()
    with torch.no_grad():
        architecture = find_architecture(model)
        tail = run_trunk(model, architecture, make_micro_batch(examples))
    assert seen == [torch.Size([5, 1, 32])]  # hidden states of one position, passed on
    assert tail.hidden.shape == (5, max(len(one.input_ids) for one in examples), 32)
    assert not tail.hidden.requires_grad


def test_mlp_norm_and_head_see_labelled_positions_only() -> None:
    model = tiny_model("llama")
    architecture, tail = trunk(model, make_examples())
    seen: dict[str, torch.Size] = {}
    for name in ("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.norm", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].shape}))
    losses_of(architecture, tail)
    num_labels = len(tail.batch.rows)
    assert seen.pop("model.layers.1.self_attn.v_proj") == (5, 14, 32)
    assert set(seen.values()) == {torch.Size([num_labels, 32])}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_of_a_float32_model_in_bf16(family: str, lora: bool) -> None:
    model, batch = tiny_model(family, lora), make_micro_batch(make_examples())
    architecture = find_architecture(model)
    own, lower = (run_trunk(model, architecture, batch, dtype) for dtype in (None, torch.bfloat16))
    assert lower.hidden.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in lower.kwargs["position_embeddings"])
    assert 1e-4 < float((lower.hidden - own.hidden).norm() / own.hidden.norm()) < 3e-2
    assert torch.allclose(losses_of(architecture, lower), losses_of(architecture, own), rtol=0.1)


def test_layer_that_runs_twice_is_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers.append(model.model.layers[-1])
    model.config.num_hidden_layers = 3
    with pytest.raises(ProbeError, match="ran 2 times"):
        trunk(model, make_examples())


def test_added_tokens_are_an_error() -> None:
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ProbeError, match=r"\(5, 14\) tokens became \(5, 17\)(?s:.*)prompt tuning"):
        trunk(model, make_examples())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [1 << 22, 200], ids=["whole", "parts"])
def test_precise_tail_is_the_tail_of_the_model_in_float32(
    monkeypatch: pytest.MonkeyPatch, part: int, family: str, lora: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tail_module, "_CAST_ELEMENTS", part)
    model = tiny_model(family, lora, dtype)
    architecture, tail = trunk(model, make_examples())
    tail = tail.cast(torch.float32)
    expected = losses_of(find_architecture(copy.deepcopy(model).float()), tail)
    with precise_tail(architecture):
        found = losses_of(architecture, tail)
    assert torch.allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 30])
def test_a_precise_head_casts_every_weight_once(monkeypatch: pytest.MonkeyPatch, count: int, bias: bool) -> None:
    """With a bounded number of logits and of cast weights at a time; losses are those of all logits."""
    generator = torch.Generator().manual_seed(count)
    head = nn.Linear(8, 50, bias=bias).bfloat16().requires_grad_(False)
    hidden = 5 * torch.randn(count, 8, generator=generator)
    targets = torch.randint(0, 50, (count,), generator=generator)
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 60)
    precise = tail_module._PreciseLinear(head, torch.float64, part=8 * 20)
    cast: list[tuple[int, int]] = []
    own = precise._of_rows

    def noting(states: Tensor, start: int, stop: int) -> Tensor:
        logits = own(states, start, stop)
        assert logits.numel() <= max(60, count)
        assert logits.shape[1] <= 20
        cast.append((start, start + logits.shape[1]))
        return logits

    monkeypatch.setattr(precise, "_of_rows", noting)
    losses = precise.losses(hidden, targets)
    assert [row for start, stop in cast for row in range(start, stop)] == list(range(50))
    logits = F.linear(hidden.double(), head.weight.double(), head.bias.double() if bias else None)
    assert torch.allclose(losses, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-12)


def test_precise_tail_ignores_autocast() -> None:
    architecture, tail = trunk(tiny_model("llama", dtype=torch.bfloat16), make_examples())
    tail = tail.cast(torch.float32)
    with precise_tail(architecture):
        expected = losses_of(architecture, tail)
    with torch.autocast("cpu", torch.bfloat16), precise_tail(architecture):
        assert torch.equal(losses_of(architecture, tail), expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_precise_tail_ignores_the_autocast_that_accelerate_wraps_a_model_in(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These have no norm of a known kind, so that their own forward computes the logits."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # an earlier test's Trainer may have made another
    model = tiny_model(family, head_dim=8, attn_implementation="eager")
    architecture, tail = trunk(model, make_examples())
    with precise_tail(architecture):
        expected = losses_of(architecture, tail)
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    with precise_tail(architecture):
        assert torch.equal(losses_of(architecture, tail), expected)


@pytest.fixture
def product_settings() -> Iterator[None]:
    """Puts torch's settings for float32 matrix products back."""
    cuda, cpu = BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision = cuda, cpu


@pytest.mark.usefixtures("product_settings")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precise_tail_allows_no_tf32(precision: str) -> None:
    architecture = find_architecture(tiny_model("llama"))
    torch.set_float32_matmul_precision(precision)
    before = (BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision)
    with precise_tail(architecture):
        assert torch.get_float32_matmul_precision() == "highest"
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
        assert not BACKENDS.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == precision
    assert (BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision) == before


@pytest.mark.usefixtures("product_settings")
@pytest.mark.parametrize("everywhere", [False, True])
def test_precise_tail_allows_no_tf32_by_the_newer_interface(everywhere: bool) -> None:
    architecture = find_architecture(tiny_model("llama"))
    switch = BACKENDS if everywhere else BACKENDS.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        effective = BACKENDS.cuda.matmul.fp32_precision
        with precise_tail(architecture):
            assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
        assert BACKENDS.cuda.matmul.fp32_precision == effective
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


class QuantisedLinear(nn.Linear):
    """Stands for a layer of a quantisation library: an `nn.Linear` that reads its weight in its own way."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, 0.5 * self.weight.to(hidden.dtype), None)


class OddScale(nn.Module):
    """A module with weights that the probe does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


def quantised() -> Any:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj = QuantisedLinear(32, 48, bias=False, dtype=torch.bfloat16)
    return model


def odd_scale() -> Any:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.act_fn = OddScale()
    return model


def flash() -> Any:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (quantised, r"mlp\.up_proj \(QuantisedLinear\)"),
        (odd_scale, r"mlp\.act_fn \(OddScale\)"),
        (flash, "attn_implementation = 'flash_attention_2'"),
    ],
)
def test_what_can_not_run_in_float32_is_an_error_at_once(make: Any, wrong: str) -> None:
    architecture = find_architecture(make())
    with pytest.raises(ProbeError, match=rf'{wrong}(?s:.*)"estimator": "exact"'):
        make_estimator("spsa", architecture)
    make_estimator("exact", architecture)
    make_estimator("sketch", architecture)
