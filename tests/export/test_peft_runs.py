"""Every way to set PEFT up, trained on two ranks: resumed bitwise, exported, and loaded with plain PEFT."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colm_ds.errors import ConfigError
from colm_ds.export.run import export_run
from colm_ds.recipes.sections import LoraConfig, ModelConfig
from tests.engine.training import NOTHING_PERSISTS, Case, parameters, start, step
from tests.export.runs import logits, write_tokenizer
from tests.ranks import Ranks
from tests.tiny_models import tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::UserWarning")]

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@dataclass(frozen=True)
class Way:
    """A run: what its `lora` section adds, its ZeRO stage, and the rest that is not as usual."""

    name: str
    lora: dict[str, Any]
    stage: int
    model: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    colm: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def case(self) -> Case:
        zero = NOTHING_PERSISTS if self.stage == 3 else {}
        return Case(self.name, colm=self.colm, stage=self.stage, zero=zero, deepspeed=self.deepspeed)

    def sections(self, base: str) -> tuple[ModelConfig, LoraConfig]:
        lora = {"rank": 4, "alpha": 8, "dropout": 0.0, **self.lora}
        return ModelConfig.model_validate({"name_or_path": base, **self.model}), LoraConfig.model_validate(lora)


FOUR = {"quantization": "4bit"}
REPLAY = {"activation_checkpointing": True}
TOKENS = {"probe": {"estimator": "tokens"}}
HEAD = {"modules_to_save": ["lm_head"], "use_rslora": True, "layers_to_transform": [0]}
SLOW = pytest.mark.slow
WAYS = [
    pytest.param(Way("dora", {"use_dora": True}, 0), marks=SLOW),
    pytest.param(Way("dora", {"use_dora": True}, 2, REPLAY), marks=SLOW),
    pytest.param(Way("dora and head", {**HEAD, "use_dora": True}, 3), marks=SLOW),
    pytest.param(Way("head", HEAD, 2), marks=SLOW),
    pytest.param(Way("head", HEAD, 3, REPLAY), marks=SLOW),
    pytest.param(Way("4bit", {}, 0, FOUR), marks=SLOW),
    pytest.param(Way("4bit", {}, 1, FOUR), marks=SLOW),
    pytest.param(Way("4bit dora", {"use_dora": True}, 2, FOUR | REPLAY), marks=SLOW),
    pytest.param(Way("4bit experts", {}, 2, FOUR | REPLAY, "mixtral"), marks=SLOW),
    pytest.param(Way("8bit", {}, 2, {"quantization": "8bit"}), marks=SLOW),
    pytest.param(Way("experts", {**EXPERTS, "targets": ["v_proj"]}, 0, {}, "mixtral"), marks=SLOW),
    pytest.param(Way("experts", {**EXPERTS, "targets": ["v_proj"]}, 2, REPLAY, "mixtral"), marks=SLOW),
    pytest.param(Way("experts", {**EXPERTS, "targets": []}, 1, {}, "mixtral", TOKENS), marks=SLOW),
]


def write_base(folder: Path, family: str) -> Path:
    more = {"num_local_experts": 3} if family == "mixtral" else {}
    tiny_model(family, hidden_size=64, intermediate_size=128, **more).save_pretrained(folder)
    return write_tokenizer(folder)


def build(way: Way, base: str) -> Any:
    """The model of a run, as training builds it, the same each time."""
    from colm_ds.recipes.model import load_model, load_tokenizer

    model, lora = way.sections(base)
    torch.manual_seed(0)
    return load_model(model, lora, load_tokenizer(model)).train()


def train(way: Way, base: str, run: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None, bool]:
    """In a rank: three steps with a checkpoint after the second; the third again from it.

    Returns:
        Trained weights without and with a stop, logits of the model as trained, and whether it was replayed.
    """
    from transformers import AutoTokenizer

    from colm_ds.checkpoints.weights import save_trained

    engine = start(way.case(), model=build(way, base))
    records = [step(engine), step(engine)]
    engine.save_checkpoint(f"{run}/checkpoints")
    if way.stage < 3 and dist.get_rank() == 0:
        saved = torch.load(f"{run}/checkpoints/step_2/mp_rank_00_model_states.pt", weights_only=False)["module"]
        trained = {name for name, value in engine.module.named_parameters() if value.requires_grad}
        assert set(saved) - {name for name, _ in engine.module.named_buffers()} == trained  # nothing frozen, no scales
    records.append(step(engine))
    assert all(torch.tensor(one.stats["loss"]).isfinite() for one in records)
    once = parameters(engine)
    own = logits(engine.module.eval()) if way.stage < 3 else None
    save_trained(engine, AutoTokenizer.from_pretrained(base), Path(run), is_main=dist.get_rank() == 0)
    engine.destroy()
    engine = start(way.case(), model=build(way, base))
    assert engine.load_checkpoint(f"{run}/checkpoints")[0] is not None
    step(engine)
    again = parameters(engine)
    engine.destroy()
    return once, again, own, records[-1].replays


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def write_config(run: Path, way: Way, base: Path) -> None:
    model, lora = way.sections(str(base))
    recipe: dict[str, Any] = {
        "output_dir": "somewhere",
        "steps": 3,
        "model": model.model_dump(),
        "lora": lora.model_dump(),
        "data": {"train": "gone.jsonl"},
        "colm": {"large_batch_size": 29, "coreset_size": 13},
        "deepspeed": "gone.json",
    }
    (run / "config.json").write_text(json.dumps({"name": way.name, "seed": 0, "recipe": recipe, "colm": {}}))


def needs_bitsandbytes(way: Way) -> None:
    if "quantization" in way.model and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("no bitsandbytes: pip install --no-deps bitsandbytes")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.name}-stage{way.stage}")
def test_trained_resumed_exported_and_loaded(way: Way, pool: Ranks, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    needs_bitsandbytes(way)
    base, run = write_base(tmp_path / "base", way.family), tmp_path / "run"
    once, again, own, replays = pool.run(train, way, str(base), str(run))[0]
    assert replays == ("activation_checkpointing" in way.model)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)
    write_config(run, way, base)
    adapter = export_run(run, out=tmp_path / "adapter")  # of the checkpoint after two steps
    assert adapter.num_tensors == len(once)

    model, _ = way.sections(str(base))
    options: dict[str, Any] = {}
    if model.quantization is None:
        plain = AutoModelForCausalLM.from_pretrained(base)
        loaded = PeftModel.from_pretrained(plain, run / "adapter").eval()
        expected = logits(loaded) if own is None else own
        assert float((logits(loaded) - expected).abs().max()) < 1e-5
        assert float((logits(loaded) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1e-3
    else:
        expected = own
    # The last step's weights, merged and loaded by transformers alone.
    (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    merged = export_run(run, merge=True, out=tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(merged.folder, **options).eval())
    assert float((found - expected).abs().max()) < (0.2 if model.quantization == "8bit" else 1e-4)
    assert "quantization_config" not in json.loads((merged.folder / "config.json").read_text())


def refused(way: Way, base: str) -> str:
    """In a rank: what `initialize` says."""
    try:
        start(way.case(), model=build(way, base))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("way", "wrong", "advice"),
    [
        (Way("4bit", {}, 3, FOUR), "zero_optimization.stage = 3", "Use stage 0, 1 or 2 with model.quantization"),
        (Way("experts", EXPERTS, 3, {}, "mixtral"), "zero_optimization.stage = 3", "with target_parameters"),
        (
            Way("dora", {"use_dora": True}, 0, {"quantization": "8bit"}, colm=TOKENS),
            "loses weights of 8 bits",
            "Quantize to 4 bits",
        ),
    ],
    ids=lambda value: f"{value.name}-stage{value.stage}" if isinstance(value, Way) else "",
)
def test_refused_before_training(way: Way, wrong: str, advice: str, pool: Ranks, tmp_path: Path) -> None:
    needs_bitsandbytes(way)
    for message in pool.run(refused, way, str(write_base(tmp_path, way.family))):
        assert wrong in message
        assert advice in message
