"""Models that users set up with PEFT themselves, given to CoLMTrainer and CoresetSelector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.errors import ConfigError
from tests.engine.training import SOURCES, records
from tests.integrations.runs import CORESET, LARGE, make_trainer
from tests.tiny_models import add_lora, tiny_model


def kbit(folder: Path, **settings: Any) -> Any:
    """QLoRA as PEFT's documentation does it: norms and head in float32, inputs that require gradients."""
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    return add_lora(prepare_model_for_kbit_training(model), "llama", **settings)


@pytest.mark.parametrize("estimator", ["spsa", "exact", "tokens"])
def test_qlora_in_a_trainer(estimator: str, tmp_path: Path) -> None:
    model = kbit(tmp_path / "base")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    section = {"large_batch_size": LARGE, "probe": {"estimator": estimator}}
    trainer = make_trainer(str(tmp_path), section, 2, model=model)
    trainer.train()
    assert all(len(set(chosen)) == CORESET for chosen in trainer.chosen)
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert {name.split(".")[-2 - (".default" in name)] for name in moved} >= {"lora_A", "lora_B"}


def test_dora_in_a_selector() -> None:
    """Fresh magnitudes and a `lora_B` of zero change nothing, so that plain LoRA's gradients choose the same."""
    section = {"large_batch_size": 12, "coreset_size": 5, "probe": {"estimator": "exact"}}
    chosen = []
    for settings in ({}, {"use_dora": True}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = add_lora(tiny_model("llama"), "llama", lora_dropout=0.1, **settings)
        chosen.append(CoresetSelector(model, section, SOURCES)(records(SOURCES)[:12]).positions.tolist())
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 5


def test_quantized_weights_alone_are_refused(tmp_path: Path) -> None:
    model = kbit(tmp_path).unload().requires_grad_(False)
    section = {"large_batch_size": 8, "coreset_size": 4, "probe": {"estimator": "tokens"}}
    with pytest.raises(ConfigError, match="quantized weights are not trained"):
        CoresetSelector(model, section, SOURCES)
