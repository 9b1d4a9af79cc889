"""The plugin for axolotl, with stand-ins for its modules: the names, calls and steps that ours goes through.

`bash launch/doors/run.sh axolotl` trains with axolotl itself.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from colm_ds.errors import ConfigError
from tests.integrations.runs import forget_deepspeed
from tests.integrations.tiny import SOURCES, rows, tiny_tokenizer
from tests.tiny_models import tiny_model


class Config(dict[str, Any]):
    """As their DictDefault: keys are attributes, and absent ones are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class AxolotlTrainer(Trainer):
    """As theirs: a loss that calls the Trainer's, and a collator for evaluation."""

    def __init__(self, *args: Any, eval_data_collator: Any = None, **kwargs: Any) -> None:
        self.eval_data_collator = eval_data_collator
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


AxolotlTrainer.__module__ = "axolotl.core.trainers.base"


def get_dataset_wrapper(
    dataset_config: Any, tokenizer: Any, cfg: Any, dataset_base_type: str, dataset: Dataset, **others: Any
) -> tuple[Dataset, str]:
    """Tokenize a dataset, leaving out empty answers."""

    def one(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = prompt + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}

    dataset = dataset.filter(lambda row: row["completion"])
    return dataset.map(one, remove_columns=dataset.column_names), "prompter"


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-ins for the modules; returns that of the data."""
    forget_deepspeed()
    sft: Any = ModuleType("axolotl.utils.data.sft")
    sft.get_dataset_wrapper = get_dataset_wrapper
    sft.generate_dataset_hash_from_config = lambda cfg, entries, tokenizer: f"hash of {len(entries)}"
    sft.calculate_total_num_steps = lambda cfg, data, update=True: -(-len(data) * cfg.num_epochs // cfg.batch_size)
    contents: dict[str, dict[str, Any]] = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": object},
        "axolotl.utils": {},
        "axolotl.utils.data": {"sft": sft},
        "axolotl.core": {},
        "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "colm_ds.integrations.axolotl", raising=False)
    return sft


@pytest.fixture
def ours(sft: Any) -> Any:
    """The plugin's module, imported beside the stand-ins."""
    return importlib.import_module("colm_ds.integrations.axolotl")


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "datasets": [Config(path=f"data/{source}.jsonl", type="alpaca") for source in SOURCES],
        "num_epochs": 2,
        "batch_size": 8,
        "colm": Config(large_batch_size=16),
    }
    return Config(values | changes)


def prepare(sft: Any, cfg: Config, columns: tuple[str, ...] = ("prompt", "completion")) -> Dataset:
    """Load, tokenize and merge the datasets in the way of axolotl."""
    parts = []
    for entry, source in zip(cfg.datasets, SOURCES, strict=True):
        given = [
            {"prompt": row["prompt"], "completion": row["completion"] if place % 5 else "", "domain": f"d{place % 2}"}
            for place, row in enumerate(rows())
            if row["source"] == source
        ]
        raw = Dataset.from_list(given).select_columns([*columns])
        processed, prompter = sft.get_dataset_wrapper(
            dataset_config=entry,
            tokenizer=tiny_tokenizer(),
            cfg=cfg,
            dataset_base_type="alpaca",
            dataset=raw,
            dataset_prompt_style=None,
            processor=None,
        )
        assert prompter == "prompter"
        parts.append(processed)
    return concatenate_datasets(parts)


def expected(key: str = "source") -> list[tuple[list[int], str]]:
    """Prompts' tokens and sources of the rows that are kept."""
    tokenizer = tiny_tokenizer()
    kept = [(place, row) for place, row in enumerate(rows()) if place % 5]
    return sorted(
        (tokenizer(row["prompt"])["input_ids"], row["source"] if key == "source" else f"d{place % 2}")
        for place, row in kept
    )


def prepared(data: Dataset, column: str) -> list[tuple[list[int], str]]:
    triples = zip(data["input_ids"], data["labels"], data[column], strict=True)
    return sorted((ids[: labels.count(-100)], source) for ids, labels, source in triples)


def test_datasets_are_sources(ours: Any, sft: Any, tmp_path: Path) -> None:
    cfg = config()
    plugin = ours.CoLMPlugin()
    plugin.register(cfg)
    plugin.register(cfg)  # axolotl reads its file more than once
    data = prepare(sft, cfg)
    assert prepared(data, "source") == expected()
    trainer = train(plugin.get_trainer_cls(cfg), data, tmp_path)
    assert trainer.last_coreset.size == 8
    assert set(trainer._source_counts) == set(SOURCES)
    assert trainer.evaluate()["eval_loss"] > 0
    plugin.post_trainer_create(cfg, trainer)


def train(kind: Any, data: Dataset, tmp_path: Path) -> Any:
    sizes: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **sizes)
    args.sample_packing, args.orpo_alpha = False, None
    collator = DataCollatorForSeq2Seq(tiny_tokenizer(), pad_to_multiple_of=64)
    trainer = kind(
        model=tiny_model("llama").train(),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        eval_data_collator=collator,
        processing_class=tiny_tokenizer(),
    )
    rows = [data[0], data[1]]
    assert set(trainer.eval_data_collator(rows)) == {"input_ids", "labels", "attention_mask"}  # hides the source
    trainer.train()
    return trainer


def test_a_column_can_be_the_source(ours: Any, sft: Any) -> None:
    """Also where rows are dropped in the middle of a dataset that holds several."""
    cfg = config(colm=Config(large_batch_size=16, source_column="domain"))
    ours.CoLMPlugin().register(cfg)
    data = prepare(sft, cfg, ("prompt", "completion", "domain"))
    assert prepared(data, "domain") == expected("domain")
    with pytest.raises(ConfigError, match="dataset algebra has no such column"):
        prepare(sft, cfg)


def test_other_runs_are_left_alone(ours: Any, sft: Any) -> None:
    """A configuration without the block passes through the functions as if they had not been replaced."""
    ours.CoLMPlugin().register(config())
    plain = config(colm=None)
    data = prepare(sft, plain)
    assert data.column_names == ["input_ids", "attention_mask", "labels"]
    assert sft.generate_dataset_hash_from_config(plain, plain.datasets, "tokenizer") == "hash of 3"
    assert sft.calculate_total_num_steps(plain, data) == -(-len(data) * 2 // 8)
    assert ours.CoLMPlugin().get_trainer_cls(plain) is None


def test_steps_and_the_prepared_dataset(ours: Any, sft: Any) -> None:
    cfg = config()
    ours.CoLMPlugin().register(cfg)
    data = prepare(sft, cfg)
    assert sft.calculate_total_num_steps(cfg, data) == 2 * (len(data) // 16)
    unlabelled = data.map(
        lambda row, place: {"labels": [-100] * len(row["labels"])} if place < 20 else {}, with_indices=True
    )
    assert sft.calculate_total_num_steps(cfg, unlabelled, update=False) == 2 * ((len(data) - 20) // 16)
    names = {
        sft.generate_dataset_hash_from_config(each, each.datasets, "tokenizer")
        for each in (cfg, config(colm=Config(large_batch_size=32)), config(colm=Config(source_column="domain")))
    }
    assert len(names) == 2
    assert "hash of 3" not in names


def test_keys(ours: Any, sft: Any) -> None:
    """The block is read by pydantic beside axolotl's keys; what cannot work is said together."""
    good: dict[str, Any] = {"colm": {"large_batch_size": 16}, "sample_packing": False}
    assert ours.CoLMArgs.model_validate(good).colm == {"large_batch_size": 16}
    assert ours.CoLMPlugin().get_input_args().rpartition(".")[2] == "CoLMArgs"
    with pytest.raises(ConfigError) as raised:
        ours.CoLMArgs.model_validate(
            {"colm": {"large_batch_size": 16, "metrik": 1}, "sample_packing": True, "rl": "dpo"}
        )
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 problems in the axolotl configuration"
    assert "colm.metrik: unknown key. Did you mean 'metric'?" in lines[1]
    assert "sample_packing = True: a packed row holds documents of several sources" in lines[2]
    assert "pack every source by itself beforehand" in lines[2]
    assert "rl = 'dpo': has no loss per example" in lines[3]
    with pytest.raises(ConfigError, match=r'no colm block\. Add "colm:"'):
        ours.CoLMArgs.model_validate({})


def test_another_plugins_trainer(ours: Any, sft: Any) -> None:
    class Other:
        pass

    with pytest.raises(ConfigError, match="Other was taken as the trainer, which knows nothing of coresets"):
        ours.CoLMPlugin().post_trainer_create(config(), Other())
    ours.CoLMPlugin().post_trainer_create(config(colm=None), Other())
