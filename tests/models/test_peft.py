"""The probe under every way in which people set PEFT up, against autograd of the same model in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colm_ds.errors import ProbeError
from colm_ds.models.architecture import find_architecture
from colm_ds.models.quantized import (
    dequantize,
    float_weight,
    keep_trainable,
    quantize_experts,
    quantized_linears,
)
from colm_ds.probe import tail as of_tail
from colm_ds.probe.directions import Directions
from colm_ds.probe.gradient_sketch import GradientSketch, trained_linears
from colm_ds.probe.replay import why_not_replay
from colm_ds.probe.self_check import check_architecture
from colm_ds.probe.spsa import spsa_coefficients
from colm_ds.probe.tail import label_losses, precise_tail
from tests.models.table import EPSILON, EXACT, REPLAY, SPSA, autograd_gradients, exact_error, replay_error, spsa_error
from tests.probe.oracles import make_examples, plain_losses, probed_gradients, relative_error, trunk
from tests.tiny_models import add_lora, randomise, tiny_model

EXAMPLES = make_examples((7, 9, 5))

WAYS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora of v alone": {"use_dora": True, "target_modules": ["v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.self_attn\.[kv]_proj"},
    "first layer": {"layers_to_transform": [0]},
    "last layer": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}},
    "head": {"modules_to_save": ["lm_head"]},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "mlp": {"modules_to_save": ["mlp"]},
    "v whole": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    "attention whole": {"target_modules": ["gate_proj"], "modules_to_save": ["self_attn"]},
}


def adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A tiny model under PEFT with numbers of its own everywhere, also in `lora_B`, magnitudes and trained copies."""
    model = add_lora(tiny_model(family), family, **settings)
    randomise(model)
    return model.to(dtype).eval()


BOTH_WAYS = [pytest.param("llama"), pytest.param("qwen3", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", BOTH_WAYS)
@pytest.mark.parametrize("name", WAYS)
def test_signals_are_those_of_autograd(name: str, family: str) -> None:
    """Of a family with the short way through norm and head, and of one where the model's own code is run."""
    model = adapted(**WAYS[name]) if family == "llama" else qwen3(**WAYS[name])
    assert exact_error(model, EXAMPLES) < EXACT
    assert spsa_error(model, EXAMPLES) < SPSA
    check_architecture(model.float(), find_architecture(model), torch.float64)
    check_architecture(model.bfloat16(), find_architecture(model), torch.float32)


def qwen3(**settings: Any) -> Any:
    """The same for a family that is found by its structure."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(tiny_model("qwen3", head_dim=8), LoraConfig(**options))
    randomise(model)
    return model.double().eval()


@pytest.mark.parametrize("name", WAYS)
def test_replayed_gradients_are_those_of_checkpointing(name: str) -> None:
    assert replay_error(adapted(**WAYS[name]), EXAMPLES) < REPLAY


def test_replay_of_dora_with_dropout_is_refused() -> None:
    """PEFT leaves the dropout out in evaluation mode, in which the probe runs, so its pass is not training's."""
    model = adapted(use_dora=True, lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    reason = why_not_replay(find_architecture(model))
    assert reason is not None
    assert "DoRA" in reason
    plain = adapted(lora_dropout=0.1)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    assert why_not_replay(find_architecture(plain)) is None


def test_norm_of_dora_is_no_part_of_the_signal() -> None:
    """Training holds it constant; were it moved with `lora_B`, the slopes would be others."""
    model = adapted(use_dora=True)
    architecture = find_architecture(model)
    (target,) = architecture.targets
    seen: list[tuple[int, ...]] = []
    with target.hooking(lambda module, inputs, output: seen.append(tuple(output.shape))):
        model(input_ids=EXAMPLES[0].input_ids[None])
    assert seen == [(1, 7, 16)]
    assert "get_lora_weight" not in vars(target.norm)
    model(input_ids=EXAMPLES[0].input_ids[None])
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["dora", "patterns", "head"])
def test_sketches_hold_whole_gradients(name: str) -> None:
    """With sides as large as every dimension a sketch is the gradient itself: that of all adapters by autograd."""
    from colm_ds.batching.micro_batch import make_micro_batch

    model = adapted(**WAYS[name])
    sketch = GradientSketch(model, 0, side=1000)
    modules = [linear.module for linear in sketch.linears]
    modules += [matrix.head for matrix in sketch.tokens if matrix.head is not None]
    assert len(modules) == len(sketch.linears) + (name == "head")
    found = sketch.rows(make_micro_batch(EXAMPLES))
    expected = []
    for example in EXAMPLES:
        model.zero_grad()
        model(input_ids=example.input_ids[None], labels=example.labels[None]).loss.backward()
        expected.append(torch.cat([module.weight.grad.flatten() for module in modules]))  # type: ignore[union-attr,operator]
    assert relative_error(found, torch.stack(expected)) < 1e-6


def mixtral(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("mixtral", num_local_experts=3, num_experts_per_tok=2)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped products do not exist in it
    model.config._experts_implementation = "eager"  # grouped products do not exist in float64
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings))
    randomise(model)
    return model.to(dtype).eval()


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"]], ids=["experts alone", "attention too"])
def test_adapters_of_experts(targets: list[str]) -> None:
    model = mixtral(target_modules=targets, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    assert exact_error(model, EXAMPLES) < EXACT
    assert spsa_error(model, EXAMPLES) < 50 * SPSA  # a token may change its expert: docs/NOTES.md
    assert replay_error(model, EXAMPLES) < REPLAY
    check_architecture(model.float(), find_architecture(model), torch.float64)
    check_architecture(model.bfloat16(), find_architecture(model), torch.float32)
    with pytest.raises(ProbeError, match=r"lora\.target_parameters"):
        trained_linears(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models on disk, as bitsandbytes quantizes what is loaded."""
    pytest.importorskip("bitsandbytes")
    made = {}
    for family in ("llama", "qwen3", "mixtral"):
        made[family] = tmp_path_factory.mktemp(family)
        more = {"num_local_experts": 3} if family == "mixtral" else {}
        tiny_model(family, hidden_size=64, intermediate_size=128, head_dim=16, **more).save_pretrained(made[family])
    return made


def quantized(folder: Path, bits: int, dtype: torch.dtype, **settings: Any) -> Any:
    """A quantized model under LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)
    if bits == 4:
        quantize_experts(model, "nf4", True)
        keep_trainable(model)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def pair(folder: Path, bits: int, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """A quantized model, and the same in float64 with the floats that its weights stand for."""
    model, other = (quantized(folder, bits, dtype, **settings) for _ in range(2))
    dequantize(other, torch.float64)
    assert not list(quantized_linears(other))
    other.base_model.model.config._experts_implementation = "eager"
    return model, other.double()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj"]], ids=["v adapted", "v frozen"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow), "mixtral"])
def test_four_bits(folders: dict[str, Path], family: str, settings: dict[str, Any], targets: list[str]) -> None:
    """The signals are those of the floats that the weights stand for; of a frozen V also of its quantized weight."""
    model, reference = pair(folders[family], 4, target_modules=targets, **settings)
    architecture, tail = trunk(model, EXAMPLES)
    expected = autograd_gradients(reference, find_architecture(reference), EXAMPLES)
    assert relative_error(probed_gradients(architecture, tail), expected) < EXACT
    check_architecture(model, architecture, torch.float64)
    with torch.no_grad(), precise_tail(architecture, torch.float64):
        losses = label_losses(architecture, tail.cast(torch.float64))
    other, other_tail = trunk(reference, EXAMPLES)
    with torch.no_grad():
        assert relative_error(losses[None], label_losses(other, other_tail)[None]) < 1e-5
    (target,), (plain,) = architecture.targets, other.targets
    assert relative_error(target.weight_rows(), plain.weight_rows()) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_slopes_of_quantized_models(folders: dict[str, Path], bits: int) -> None:
    """They are taken along the floats, also where training rounds a layer's inputs to 8 bits as well."""
    model, reference = pair(folders["llama"], bits)
    architecture, tail = trunk(model, EXAMPLES)
    directions = Directions(0, 1, 2, architecture.num_coordinates)
    found = spsa_coefficients(architecture, tail, directions, EPSILON, torch.float64)
    gradients = probed_gradients(find_architecture(reference), tail.cast(torch.float64)).flatten(1)
    expected = gradients @ directions.chunk(0, architecture.num_coordinates).T.double()
    assert relative_error(found, expected) < SPSA


def test_eight_bits(folders: dict[str, Path]) -> None:
    """Gradients pass layers whose inputs were rounded, and are off by the rounding."""
    model, reference = pair(folders["llama"], 8)
    architecture, tail = trunk(model, EXAMPLES)
    expected = probed_gradients(find_architecture(reference), tail.cast(torch.float64))
    assert relative_error(probed_gradients(architecture, tail), expected) < 5e-2
    check_architecture(model, architecture, torch.float64)
    linear = next(module for _, module in quantized_linears(model))
    plain = dict(reference.named_modules())[name_of(model, linear)]
    assert relative_error(float_weight(linear), float_weight(plain).detach()) < 1e-6


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16(folders: dict[str, Path], bits: int) -> None:
    model, reference = pair(folders["qwen3"], bits, torch.bfloat16)
    architecture, tail = trunk(model, EXAMPLES)
    check_architecture(model, architecture, torch.float32)
    expected = autograd_gradients(reference, find_architecture(reference), EXAMPLES)
    assert relative_error(probed_gradients(architecture, tail), expected) < 0.1


def test_a_wrong_weight_is_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the comparison: with other floats the self-check refuses."""
    model = quantized(folders["llama"], 4, torch.float32)
    architecture = find_architecture(model)
    check_architecture(model, architecture, torch.float64)
    own = of_tail.float_weight
    monkeypatch.setattr(of_tail, "float_weight", lambda module: 1.02 * own(module))
    with pytest.raises(ProbeError, match="self-check"):
        check_architecture(model, architecture, torch.float64)


def test_evaluation_leaves_weights_trainable(folders: dict[str, Path]) -> None:
    """A pass in evaluation mode would pack them for a CPU's inference, beyond which nothing has a gradient."""
    model = quantized(folders["llama"], 4, torch.float32)
    linear: Any = next(module for _, module in quantized_linears(model))
    before, floats = linear.weight.data.clone(), float_weight(linear).clone()
    with torch.no_grad():
        expected = plain_losses(model, EXAMPLES)
    assert torch.equal(linear.weight.data, before)
    for _, module in quantized_linears(model):  # as a user's script leaves a model after generating
        module.support_avx512bf16_for_cpu = has_avx512bf16()  # type: ignore[assignment]
    plain_losses(model, EXAMPLES)
    keep_trainable(model)
    assert relative_error(float_weight(linear), floats) < 1e-2  # bitsandbytes rounds the scales to bfloat16
    assert relative_error(plain_losses(model, EXAMPLES)[None], expected[None]) < 0.1
    model.train()
    model(input_ids=EXAMPLES[0].input_ids[None], labels=EXAMPLES[0].labels[None]).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def has_avx512bf16() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())
