"""Top-level keys of a DeepSpeed configuration and its "auto" values, against DeepSpeed and Hugging Face themselves."""

from __future__ import annotations

import copy
import functools
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from colm_ds.config.deepspeed import ADAM_DEFAULTS, KNOWN_KEYS, REMOVED_KEYS, model_facts, resolve_auto
from colm_ds.config.resolve import resolve_config
from colm_ds.errors import ConfigError
from colm_ds.recipes.recipe import load_recipe
from colm_ds.recipes.sections import OptimizerConfig
from tests.tiny_models import tiny_model

COLM = {"large_batch_size": 128, "coreset_size": 64}


def problems(deepspeed: dict[str, Any]) -> list[str]:
    """Problems that `resolve_config` finds; none if it accepts the configuration."""
    try:
        resolve_config({"colm": COLM, **deepspeed}, 2)
    except ConfigError as error:
        return [line.strip() for line in str(error).split("\n")[1:]]
    return []


# --- keys ---


class Recording(dict[str, Any]):
    """A dictionary that notes which keys are asked for."""

    def __init__(self, values: dict[str, Any], asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __copy__(self) -> Recording:
        return Recording(dict(self), self.asked)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def test_every_key_that_deepspeed_reads_is_known() -> None:
    from deepspeed.runtime import config as deepspeed_config

    asked: set[str] = set()
    deepspeed_config.DeepSpeedConfig(Recording({"train_batch_size": 1}, asked))
    assert {"train_batch_size", "zero_optimization", "csv_monitor", "timers"} <= asked
    assert asked <= KNOWN_KEYS | REMOVED_KEYS
    # Ours, and two that make DeepSpeed's groups of ranks.
    assert KNOWN_KEYS - asked <= {"colm", "data_parallel_size", "sequence_parallel_size"}


def test_keys_that_deepspeed_refuses_are_the_removed_ones() -> None:
    from deepspeed.runtime import config as deepspeed_config

    refused = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", None)
    if refused is None:
        pytest.skip("this version of DeepSpeed has no such list")
    assert set(refused) == REMOVED_KEYS
    for key in REMOVED_KEYS:
        (line,) = problems({key: {"enabled": False}})
        assert line.startswith(f"{key}: removed from DeepSpeed (0.19.8 refuses it). ")


@pytest.mark.parametrize(
    ("misspelled", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimizations", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("gradient_accumulation_step", "gradient_accumulation_steps"),
        ("bf_16", "bf16"),
        ("activation_checkpoint", "activation_checkpointing"),
        ("optimiser", "optimizer"),
        ("BF16", None),
        ("learning_rate", None),
    ],
)
def test_misspelled_key_names_the_nearest(misspelled: str, meant: str | None) -> None:
    (line,) = problems({misspelled: 1})
    if meant is None:
        note = f"DeepSpeed would ignore it. Remove it, or write '_{misspelled}' to keep it as a note."
        assert line == f"{misspelled}: unknown key. {note}"
    else:
        assert line == f"{misspelled}: unknown key. Did you mean {meant!r}?"


def test_all_problems_come_in_one_error() -> None:
    lines = problems({"gradient_cliping": 1, "amp": {}, "dump_state": "auto", "train_batch_size": 3, "bf16": True})
    assert [line.split(" = ")[0].split(":")[0] for line in lines] == [
        *("train_batch_size", "gradient_cliping", "amp", "bf16", "dump_state"),
    ]


def test_notes_are_left_alone() -> None:
    assert problems({"_comment": "auto", "//": "four GPUs", "# why": 1, "comment": {"mode": "auto"}}) == []


# --- "auto" ---

AUTO: dict[str, Any] = {
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 100,
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": "auto",
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
"""What configurations written for Hugging Face's Trainer leave to it."""

BATCHES_AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
)


def autos(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys that are still "auto"."""
    for key, value in section.items():
        if value == "auto":
            yield prefix + key
        elif isinstance(value, dict):
            yield from autos(value, f"{prefix}{key}.")


def test_configuration_for_hugging_face_is_accepted_and_resolved() -> None:
    resolved = resolve_config({"colm": COLM, **AUTO, **BATCHES_AUTO}, 2).deepspeed
    before = copy.deepcopy(resolved)
    filled = resolve_auto(resolved, hidden_size=2048, dtype=torch.bfloat16)
    assert resolved == before
    assert filled == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 16,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 100, "warmup_min_lr": 0.0, "warmup_max_lr": 2e-5, "warmup_num_steps": 1},
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": "auto",  # DeepSpeed's default
            "reduce_bucket_size": 2048**2,
            "stage3_prefetch_bucket_size": 3774873,
            "stage3_param_persistence_threshold": 20480,
        },
    }


def test_same_values_as_hugging_faces_trainer() -> None:
    """For everything but the learning rate, of which the Trainer has another default."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    theirs = HfTrainerDeepSpeedConfig({**AUTO, **BATCHES_AUTO})
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, learning_rate=ADAM_DEFAULTS["lr"])
    theirs.trainer_config_process(arguments)
    model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=96))
    theirs.trainer_config_finalize(arguments, model, num_training_steps=100)
    ours = resolve_auto(AUTO, hidden_size=96, dtype=torch.float32)
    assert ours == {key: value for key, value in theirs.config.items() if key not in BATCHES_AUTO}


def test_deepspeed_takes_what_was_resolved() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved = resolve_config({"colm": COLM, **AUTO, **BATCHES_AUTO}, 1).deepspeed
    parsed = DeepSpeedConfig(resolve_auto(resolved, hidden_size=64, dtype=torch.bfloat16))
    assert parsed.gradient_clipping == 1.0
    assert parsed.bfloat16_config.enabled
    assert not parsed.float16_config.enabled
    assert parsed.zero_config.reduce_bucket_size == 4096


def test_defaults_of_the_optimizer_are_a_recipes() -> None:
    assert {**ADAM_DEFAULTS, "betas": tuple(ADAM_DEFAULTS["betas"])} == OptimizerConfig().model_dump(
        exclude={"torch_adam"}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_follows_the_weights(dtype: torch.dtype) -> None:
    filled = resolve_auto(AUTO, hidden_size=8, dtype=dtype)
    assert filled["bf16"]["enabled"] == (dtype == torch.bfloat16)
    assert filled["fp16"]["enabled"] == (dtype == torch.float16)


def test_what_is_written_stays() -> None:
    given = {"gradient_clipping": 0.3, "optimizer": {"type": "adam", "params": {"lr": 1e-3, "eps": "auto"}}}
    given["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 7}}
    filled = resolve_auto(given, hidden_size=None, dtype=torch.float32)
    assert filled["gradient_clipping"] == 0.3
    assert filled["optimizer"]["params"] == {"lr": 1e-3, "eps": 1e-8}
    assert filled["scheduler"]["params"] == {"warmup_max_lr": 1e-3, "warmup_num_steps": 7}
    filled["optimizer"]["params"]["lr"] = 0
    assert given["optimizer"]["params"]["lr"] == 1e-3  # type: ignore[index]


def test_defaults_are_not_shared() -> None:
    given = {"optimizer": {"type": "AdamW", "params": {"betas": "auto"}}}
    resolve_auto(given, hidden_size=8, dtype=torch.float32)["optimizer"]["params"]["betas"].append(1)
    assert ADAM_DEFAULTS["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("deepspeed", "says"),
    [
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}},
            "scheduler.params.total_num_steps = 'auto': cannot be resolved. "
            "The length of the run is not known here: write the number of optimizer steps.",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}},
            "scheduler.params.warmup_max_lr = 'auto': cannot be resolved. "
            "There is no optimizer.params.lr to take it from: write the peak learning rate.",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}},
            "optimizer.params.lr = 'auto': cannot be resolved. Write the value, or remove",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "torch_adam": "auto"}}},
            "optimizer.params.torch_adam = 'auto': cannot be resolved. Write the value, or remove",
        ),
        ({"optimizer": {"type": "auto"}}, "optimizer.type = 'auto': cannot be resolved. Write \"AdamW\"."),
        (
            {"zero_optimization": {"stage": "auto"}},
            "zero_optimization.stage = 'auto': cannot be resolved. Write 0, 1, 2 or 3.",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
            'zero_optimization.offload_optimizer.device = \'auto\': cannot be resolved. Write "cpu", "nvme" or "none".',
        ),
        ({"prescale_gradients": "auto"}, "prescale_gradients = 'auto': cannot be resolved. Write the value, or"),
        ({"data_types": {"grad_accum_dtype": "auto"}}, "data_types.grad_accum_dtype = 'auto': cannot be resolved."),
        ({"torch_autocast": {"enabled": "auto"}}, "torch_autocast.enabled = 'auto': cannot be resolved."),
        ({"bf16": "auto"}, "bf16 = 'auto': not a section of keys and values."),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(" = ")[0],
)
def test_what_can_not_be_resolved_is_one_problem(deepspeed: dict[str, Any], says: str) -> None:
    (line,) = problems(deepspeed)
    assert line.startswith(says)
    if "bf16" not in deepspeed:
        with pytest.raises(ConfigError, match=r"1 problem in ds\.json"):
            resolve_auto(deepspeed, hidden_size=8, dtype=torch.float32, where="ds.json")


@pytest.mark.parametrize(
    "deepspeed",
    [
        {"data_types": {"keep_in_fp32_modules": "auto"}},
        {"expert_parallel": {"score_func": "auto"}},
        {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}},
        {"bf16": {"enabled": True, "immediate_grad_update": "auto"}},
    ],
)
def test_deepspeeds_own_autos_are_left_to_it(deepspeed: dict[str, Any]) -> None:
    assert problems(deepspeed) == []
    assert resolve_auto(deepspeed, hidden_size=8, dtype=torch.float32) == deepspeed
    assert list(autos(deepspeed))


def test_model_without_a_hidden_size() -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_auto(AUTO, hidden_size=None, dtype=torch.float32)
    head, *lines = str(raised.value).split("\n")
    assert head == "3 problems in the DeepSpeed configuration"
    assert lines[0].strip() == (
        "zero_optimization.reduce_bucket_size = 'auto': the model's configuration has no hidden_size. "
        "Write a number of elements, such as 2e7."
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_facts_of_a_model(family: str, lora: bool) -> None:
    if family == "gpt2" and lora:
        pytest.skip("the tiny adapters are for families that the probe knows")
    model = tiny_model(family, lora, torch.bfloat16)
    width = model.get_input_embeddings().weight.shape[1]
    assert model_facts(model) == (width, torch.bfloat16)


def test_facts_of_a_plain_module_and_of_several_widths() -> None:
    assert model_facts(nn.Linear(3, 4).half()) == (None, torch.float16)
    assert model_facts(nn.Module()) == (None, torch.float32)
    model = nn.Linear(3, 4)
    model.config = types.SimpleNamespace(hidden_sizes=[32, 160, 64])  # type: ignore[assignment]
    assert model_facts(model) == (160, torch.float32)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"reduce_bucket_size": 15099494.4}, "zero_optimization.reduce_bucket_size = 15099494.4"),
        ({"reduce_bucket_size": 0}, "zero_optimization.reduce_bucket_size = 0: must be more than 0"),
        ({"allgather_bucket_size": 0}, "zero_optimization.allgather_bucket_size = 0: a bucket holds nothing"),
        ({"stage": 7}, "zero_optimization.stage = 7"),
        ({"stage": 2, "ovrlap_comm": True}, "zero_optimization.ovrlap_comm"),
    ],
)
def test_values_that_deepspeed_refuses_are_said_at_once(section: dict[str, Any], says: str) -> None:
    config = {"train_batch_size": 4, "zero_optimization": section, "colm": {"large_batch_size": 8}}
    with pytest.raises(ConfigError, match=re.escape(says)):
        resolve_config(config, 1)


def test_a_sum_over_ranks_is_refused() -> None:
    """The gradient of a step would be W times itself."""
    config = {"train_batch_size": 4, "gradient_allreduce_op": "SUM", "colm": {"large_batch_size": 8}}
    with pytest.raises(ConfigError, match=r'gradient_allreduce_op = \'SUM\': .* Write "mean"'):
        resolve_config(config, 1)
    resolve_config({**config, "gradient_allreduce_op": "mean"}, 1)


def test_numbers_with_exponents_written_as_text_are_numbers() -> None:
    section = {
        "stage": 2,
        "reduce_bucket_size": "5e8",
        "allgather_bucket_size": "2.5E7",
        "stage3_max_live_parameters": "auto",
    }
    config = {"train_batch_size": 4, "zero_optimization": section, "colm": {"large_batch_size": 8}}
    zero = resolve_config(config, 1).deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (500_000_000, 25_000_000)
    assert section["reduce_bucket_size"] == "5e8"


def test_engines_of_another_kind_are_refused_together() -> None:
    config = {
        "train_batch_size": 8,
        "colm": {"large_batch_size": 16},
        "zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}},
        "hybrid_engine": {"enabled": True},
        "data_efficiency": {"enabled": True},
        "sequence_parallel_size": 2,
        "tensor_parallel": {"autotp_size": 2},
    }
    with pytest.raises(ConfigError) as raised:
        resolve_config(config, 1)
    message = str(raised.value)
    assert message.startswith("5 problems")
    for name in ("zenflow", "hybrid_engine", "data_efficiency", "sequence_parallel_size", "tensor_parallel"):
        assert f"{name}: not with coresets: " in message
    for name in ("hybrid_engine", "data_efficiency", "tensor_parallel"):
        with pytest.raises(ConfigError, match=f"{name} = 'on': not a section of keys and values"):
            resolve_config({"train_batch_size": 8, "colm": {"large_batch_size": 16}, name: "on"}, 1)
    null = resolve_config({"train_batch_size": 8, "colm": {"large_batch_size": 16}, "tensor_parallel": None}, 1)
    assert "tensor_parallel" not in null.deepspeed
    off = {"enabled": False}
    quiet = {"hybrid_engine": off, "data_efficiency": off, "sequence_parallel_size": 1, "tensor_parallel": {}}
    resolve_config({"train_batch_size": 8, "colm": {"large_batch_size": 16}, **quiet}, 1)


MASTER = {"enabled": True, "bf16_master_weights_and_grads": True}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"comms_logger": {"verbose": "perhaps"}}, "comms_logger = .*verbose"),
        ({"data_types": {"grad_accum_dtype": "0x10"}}, "data_types = .*'0x10' is not a valid DtypeEnum"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup": 3}}}, "scheduler = .*warmup"),
        ({"scheduler": {"type": "Slow"}}, "there is no scheduler 'Slow'"),
        ({"optimizer": {"type": "AdamZ"}}, "there is no optimizer 'AdamZ'"),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}, "optimizer = .*gradient_clipping"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler = .*params: missing"),
        ({"zero_optimization": {"stage": "two"}}, "^.*\n  zero_optimization"),
        (
            {"bf16": MASTER, "zero_optimization": {"stage": 2}, "comms_logger": {"verbose": "perhaps"}},
            "^1 problem in the DeepSpeed configuration\n  comms_logger",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "momentun": 0.9}}}, "optimizer = .*momentun"),
    ],
)
def test_deepspeeds_own_sections_are_read_before_training(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_config({"train_batch_size": 8, "colm": {"large_batch_size": 16}, **section}, 1)


def test_what_deepspeed_takes_passes() -> None:
    for optimizer in ("Adam", "AdamW", "Muon", "Lion", "SGD", "Adagrad"):
        kind = {"type": optimizer, "params": {"lr": 1e-3, "weight_decay": 0.1}}
        config = {"optimizer": kind, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}
        config |= {"data_types": {"grad_accum_dtype": "bf16"}, "comms_logger": {"enabled": True}}
        resolve_config({"train_batch_size": 8, "colm": {"large_batch_size": 16}, **config}, 1)


@pytest.mark.parametrize(
    "section",
    [
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "set_grad_none": True, "betas": [0, 0.95]}}},
        {"optimizer": {"type": "Adagrad", "params": {"amsgrad": False}}},
        {"optimizer": {"type": "AdamW", "params": None}},
        {"optimizer": {"params": {"lr": 1e-3}}},
        {"scheduler": {"type": None, "params": {}}},
        {"scheduler": {"type": "OneCycleLR", "params": {"max_lr": [1e-3, 1e-4], "total_steps": 9}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0.0, 0.0], "warmup_max_lr": [1e-3, 1e-4]}}},
        {"aio": {"use_gds": True}},
        {"bf16": MASTER, "zero_optimization": {"stage": 2}},
    ],
)
def test_what_deepspeed_takes_passes_too(section: dict[str, Any]) -> None:
    """Of a GPU's Adam, of offload, of several groups of parameters, and sections that it does not read."""
    resolve_config({"train_batch_size": 8, "colm": {"large_batch_size": 16}, **section}, 1)


def test_sections_of_what_the_caller_gives_are_not_read() -> None:
    config = {"train_batch_size": 8, "colm": {"large_batch_size": 16}}
    config |= {"optimizer": {"type": "Mine"}, "scheduler": {"type": "Its"}}
    resolve_config(config, 1, supplied=("optimizer", "scheduler"))
    with pytest.raises(ConfigError, match="there is no optimizer 'Mine'"):
        resolve_config(config, 1, supplied=("scheduler",))


def test_keys_inside_a_recipe_are_named_with_their_section(tmp_path: Path) -> None:
    """As they would be written on the command line; in a file of their own they stand alone."""
    wrong = {"zero_optimization": {"stage": 2}, "gradient_cliping": 1.0}
    values = {"output_dir": "out", "steps": 1, "model": {"name_or_path": "x"}, "colm": {"large_batch_size": 4}}
    values |= {"data": {"store": "here"}, "task": "pretraining"}
    (tmp_path / "ds.json").write_text(json.dumps(wrong))
    for deepspeed, prefix in ((wrong, "deepspeed."), ("ds.json", "")):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "deepspeed": deepspeed}))
        recipe = load_recipe(tmp_path / "recipe.yaml", ["colm.coreset_size=5"])
        for resolve in (functools.partial(recipe.resolve, 2), recipe.resolve_section):
            with pytest.raises(ConfigError) as raised:
                resolve()
            _, *lines = str(raised.value).split("\n  ")
            (unknown,) = [line for line in lines if "gradient_cliping" in line]
            assert unknown.startswith(f"{prefix}gradient_cliping: unknown key. Did you mean 'gradient_clipping'?")
            assert any(line.startswith("colm.coreset_size = 5: more than") for line in lines)
