"""The probe in every causal LM that transformers builds from a configuration, against autograd in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import attention_projections, find_architecture
from colm_ds.models.example_loss import find_loss_head, label_losses
from colm_ds.models.values import ValueRows
from colm_ds.probe.scores import confidences, last_hidden
from colm_ds.probe.self_check import check_architecture
from colm_ds.recipes.model import add_lora, attention_for
from colm_ds.recipes.sections import LoraConfig
from tests.every_model import causal_types, tiny_causal_lm, tiny_config
from tests.models.table import EXACT, PAGE, REPLAY, SPSA, exact_error, measure, replay_error, spsa_error
from tests.probe.oracles import make_examples, relative_error, trunk
from tests.tiny_models import randomise

PROMISED = (
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("llama4_text", "phi", "phi3", "gpt_neox", "gpt2", "gptj", "opt", "bloom", "falcon", "olmo2", "olmo3", "granite"),
    *("granitemoe", "cohere2", "smollm3", "stablelm", "starcoder2", "deepseek_v3", "glm4", "exaone4", "nemotron"),
)
"""Types that must be probed, whatever happens to the others."""

BY_DEFAULT = (
    *("qwen3", "gemma2", "gemma3_text", "mixtral", "granite", "olmo2", "gpt2", "gpt_neox", "bloom", "falcon"),
    *("deepseek_v3", "opt", "llama4_text", "nemotron"),
)
"""One of each kind: norms, soft-caps, experts, scales, `Conv1D`, fused in both layouts, latent."""


def measured() -> dict[str, bool]:
    """Types in the tables of docs/MODELS.md, and whether they are probed."""
    text = PAGE.read_text(encoding="utf-8")
    probed, refused = text.split("## Refused")[0], text.split("## Refused")[1].split("## Not measured")[0]
    rows = re.compile(r"^\| ([a-z][\w.-]*) \|", re.MULTILINE)
    types = dict.fromkeys(rows.findall(probed), True) | dict.fromkeys(rows.findall(refused), False)
    return {name: is_probed for name, is_probed in types.items() if name != "type"}


def by_default(names: list[str]) -> list[Any]:
    return [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", by_default([name for name, is_probed in measured().items() if is_probed]))
def test_signals_are_those_of_autograd(model_type: str) -> None:
    model, examples = tiny_causal_lm(model_type, torch.float64), make_examples((7, 9, 5))
    assert exact_error(model, examples) < EXACT
    assert spsa_error(model, examples) < SPSA
    single = tiny_causal_lm(model_type)
    check_architecture(single, find_architecture(single), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name, is_probed in measured().items() if not is_probed])
def test_what_is_not_supported_is_refused(model_type: str) -> None:
    assert measure(model_type).note.startswith("refused: ")


def test_the_promised_types_are_in_the_table() -> None:
    probed = {name for name, is_probed in measured().items() if is_probed}
    assert set(PROMISED) <= probed
    assert len(probed) >= 40
    assert set(measured()) <= set(causal_types())


@pytest.mark.parametrize("model_type", ["qwen3", "bloom", "falcon", "gemma4_text"])
def test_replayed_gradients_are_those_of_checkpointing(model_type: str) -> None:
    """Also where layers return tuples, or take embeddings of their own."""
    assert replay_error(tiny_causal_lm(model_type, torch.float64), make_examples((7, 9, 5))) < REPLAY


@pytest.mark.parametrize(
    ("model_type", "overrides", "rows"),
    [
        ("gpt2", {}, ValueRows(64, 96, 1)),
        ("gpt_neox", {}, ValueRows(16, 24, 4)),
        ("bloom", {}, ValueRows(16, 24, 4)),
        ("falcon", {"multi_query": True}, ValueRows(40, 48, 1)),
        ("falcon", {"multi_query": False}, ValueRows(16, 24, 4)),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ValueRows(24, 32, 2)),
        ("gpt_bigcode", {"multi_query": False}, ValueRows(16, 24, 4)),
        ("codegen", {}, ValueRows(8, 16, 4)),
        ("deepseek_v3", {}, ValueRows(8, 16, 4)),
    ],
)
def test_rows_of_the_values(model_type: str, overrides: dict[str, Any], rows: ValueRows) -> None:
    model = tiny_causal_lm(model_type, **overrides)
    (target,) = find_architecture(model).targets
    assert (target.start, target.stop, target.groups) == rows
    check_architecture(model, find_architecture(model))
    assert target.weight_rows().shape == (target.out_features, target.in_features)


@pytest.mark.parametrize("layer", ["qkv", "fc"])
@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "gpt_neox"])
def test_other_matrices_of_the_last_layer(model_type: str, layer: str) -> None:
    model, examples = tiny_causal_lm(model_type, torch.float64), make_examples((7, 9, 5))
    architecture = find_architecture(model, layer)
    check_architecture(model, architecture)
    assert len(architecture.targets) == (3 if (model_type, layer) == ("qwen3", "qkv") else 1)
    if len(architecture.targets) == 1:
        from colm_ds.probe.factors import gradient_factors
        from tests.models.table import autograd_gradients

        ((delta, inputs),) = gradient_factors(architecture, trunk(model, examples)[1])
        probed = torch.einsum("blo,bli->boi", delta, inputs)
        assert relative_error(probed, autograd_gradients(model, architecture, examples)) < EXACT


def test_other_layers_where_there_are_none() -> None:
    with pytest.raises(ProbeError, match="no projections of queries and keys beside kv_b_proj"):
        find_architecture(tiny_causal_lm("deepseek_v3"), "qkv")
    with pytest.raises(ProbeError, match="the probe of 'fc' reads it"):
        find_architecture(tiny_causal_lm("mixtral"), "fc")


@pytest.mark.parametrize("model_type", ["gemma2", "cohere2", "bloom"])
def test_scores_of_the_tail(model_type: str) -> None:
    """Probabilities after soft-caps and scales; hidden states as they enter the head."""
    model, examples = tiny_causal_lm(model_type), make_examples((7, 9, 5))
    architecture, tail = trunk(model, examples)
    entering: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        likeliest = [model(input_ids=one.input_ids[None]).logits[0].softmax(-1).amax(-1) for one in examples]
    handle.remove()
    expected = torch.stack(
        [row[:-1][one.labels[1:] != -100].mean() for row, one in zip(likeliest, examples, strict=True)]
    )
    assert torch.allclose(confidences(architecture, tail), expected, rtol=1e-4)
    places = [int((one.labels != -100).nonzero().max()) - 1 for one in examples]
    last = torch.stack([states[0, place] for states, place in zip(entering, places, strict=True)])
    assert torch.allclose(last_hidden(architecture, tail), last, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "is_plain"),
    [("qwen3", True), ("mixtral", True), ("gpt2", True), ("gemma2", False), ("cohere2", False)],
)
def test_losses_without_logits_where_the_head_comes_last(model_type: str, is_plain: bool) -> None:
    model, batch = tiny_causal_lm(model_type), make_micro_batch(make_examples((7, 9, 5)))
    head = find_loss_head(model)
    assert (head is not None) == is_plain
    assert torch.allclose(label_losses(model, head, batch), label_losses(model, None, batch), rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("qwen3", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gpt_neox", ["dense", "query_key_value"]),
        ("bloom", ["dense", "query_key_value"]),
        ("deepseek_v3", ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
    ],
)
def test_lora(model_type: str, names: list[str]) -> None:
    model = tiny_causal_lm(model_type)
    assert sorted(attention_projections(model)) == names
    adapted: Any = add_lora(model, LoraConfig(rank=4, alpha=8))
    randomise(adapted)
    adapted = adapted.double().eval()
    assert sorted(adapted.peft_config["default"].target_modules) == names
    architecture = find_architecture(adapted)
    assert "lora_B" in architecture.targets[0].name
    check_architecture(adapted, architecture, torch.float64)
    assert exact_error(adapted, make_examples((7, 9, 5))) < EXACT


@pytest.mark.parametrize(
    ("model_type", "asked", "attention"),
    [
        ("qwen3", "sdpa", "sdpa"),
        ("gemma2", "sdpa", "eager"),
        ("gpt_oss", "sdpa", "eager"),
        ("bloom", "sdpa", "eager"),
        ("qwen3", "eager", "eager"),
        ("gemma2", "flash_attention_2", "flash_attention_2"),
    ],
)
def test_eager_attention_where_sdpa_cannot_be_had(model_type: str, asked: str, attention: str) -> None:
    assert attention_for(tiny_config(model_type), asked) == attention


class TestSelfCheck:
    """What it refuses."""

    def test_another_loss(self) -> None:
        model = tiny_causal_lm("qwen3")
        architecture = find_architecture(model)

        class Doubled(nn.Module):
            def forward(self, hidden: torch.Tensor) -> torch.Tensor:
                return 2.0 * hidden if hidden.shape[1] > 1 else hidden

        model.model.norm = nn.Sequential(model.model.norm, Doubled())
        with pytest.raises(
            ProbeError, match=r"type 'qwen3': the loss of the probe is .*relative difference of(?s:.*)tokens"
        ):
            check_architecture(model, architecture)

    @pytest.mark.parametrize(("groups", "start", "stop"), [(1, 64, 96), (4, 8, 16)])
    def test_other_rows(self, groups: int, start: int, stop: int) -> None:
        import dataclasses

        model = tiny_causal_lm("gpt_neox")
        architecture = find_architecture(model)
        (target,) = architecture.targets
        wrong = dataclasses.replace(target, groups=groups, start=start, stop=stop)
        with pytest.raises(ProbeError, match="not taken for values"):
            check_architecture(model, dataclasses.replace(architecture, targets=(wrong,)))

    def test_attention_that_looks_ahead(self) -> None:
        model = tiny_causal_lm("bert", is_decoder=False)
        with pytest.raises(ProbeError, match="self-check: model of type 'bert'"):
            check_architecture(model, find_architecture(model))

    def test_bf16(self) -> None:
        for model_type in ("qwen3", "gemma3_text", "gpt_neox"):
            model = tiny_causal_lm(model_type, torch.bfloat16)
            check_architecture(model, find_architecture(model), torch.float32)

    def test_autocast_within_the_forward(self) -> None:
        """As accelerate does for `bf16=True`: the model's own loss is then one of 16 bits."""
        model = tiny_causal_lm("qwen3")
        plain = model.forward

        def lowered(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return plain(*args, **kwargs)

        model.forward = lowered
        check_architecture(model, find_architecture(model), torch.float64)

    def test_leaves_the_model_as_it_was(self) -> None:
        model = tiny_causal_lm("qwen3").train()
        check_architecture(model, find_architecture(model), torch.float64)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
