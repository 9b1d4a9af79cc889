"""The door of LLaMA-Factory, with stand-ins for its modules: the names, calls and steps that ours goes through.

`bash launch/doors/run.sh llamafactory` trains with LLaMA-Factory itself.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from colm_ds.errors import ConfigError
from colm_ds.integrations import llamafactory
from tests.integrations.runs import forget_deepspeed
from tests.integrations.tiny import SOURCES, rows, tiny_tokenizer
from tests.tiny_models import tiny_model


class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    """As theirs: a loss that calls the Trainer's."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


CustomSeq2SeqTrainer.__module__ = "llamafactory.train.sft.trainer"


class Processor:
    """Drops rows with an empty answer, as theirs drops invalid ones."""

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = defaultdict(list)
        tokenizer = tiny_tokenizer()
        for prompt, answer in zip(examples["_prompt"], examples["_response"], strict=True):
            if answer:
                ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
                made["input_ids"].append(ids + answer_ids)
                made["labels"].append([-100] * len(ids) + answer_ids)
                made["images"].append(None)
        return made


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stand-ins for the modules; `framework.trainer` is the trainer of the last run."""
    forget_deepspeed()
    seen = SimpleNamespace(trainer=None, config=None)
    loader, workflow, tuner = (ModuleType(name) for name in ("loader", "workflow", "tuner"))
    tables = {
        source: [
            {
                "instruction": row["prompt"],
                "output": row["completion"].strip() if place % 5 else "",
                "domain": place % 2,
            }
            for place, row in enumerate(rows())
            if row["source"] == source
        ]
        for source in SOURCES
    }

    def get_dataset_list(names: list[str], folder: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(dataset_name=f"{name}.json") for name in names]

    def align_dataset(dataset: Dataset, attributes: Any, data_args: Any, training_args: Any) -> Dataset:
        def one(row: dict[str, str]) -> dict[str, str]:
            return {"_prompt": row["instruction"], "_response": row["output"]}

        return dataset.map(one, remove_columns=dataset.column_names)

    def get_dataset(names: list[str]) -> Dataset:
        listed = zip(names, loader.get_dataset_list(names, "."), strict=True)
        parts = [
            loader.align_dataset(Dataset.from_list(tables[name]), attributes, None, None) for name, attributes in listed
        ]
        merged = concatenate_datasets(parts)
        processor = loader._get_dataset_processor(None, "sft", None, None, None, do_generate=False)
        return merged.map(processor.preprocess_dataset, batched=True, batch_size=7, remove_columns=merged.column_names)

    class Collator(DataCollatorForSeq2Seq):  # type: ignore[misc]
        def __call__(self, features: list[dict[str, Any]], **kwargs: Any) -> Any:
            for feature in features:
                feature.pop("images")
            return super().__call__(features, **kwargs)

    def run_exp(config: dict[str, Any]) -> None:
        sizes = {key: value for key, value in config.items() if key not in ("stage", "dataset")}
        args = Seq2SeqTrainingArguments(**sizes, use_cpu=True, report_to=[], disable_tqdm=True)
        args.remove_unused_columns = False
        trainer = workflow.CustomSeq2SeqTrainer(
            model=tiny_model("llama").train(),
            args=args,
            data_collator=Collator(tiny_tokenizer(), pad_to_multiple_of=8),
            train_dataset=get_dataset(config["dataset"].split(",")),
            processing_class=tiny_tokenizer(),
        )
        seen.trainer, seen.config = trainer, config
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    class OmegaConf:
        @staticmethod
        def load(path: str) -> dict[str, Any]:
            loaded: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return loaded

        from_cli = staticmethod(
            lambda words: {key: yaml.safe_load(value) for key, value in (w.split("=") for w in words)}
        )
        merge = staticmethod(lambda one, other: {**one, **other})
        to_container = staticmethod(lambda config: config)

    contents: dict[str, dict[str, Any]] = {
        "llamafactory": {},
        "llamafactory.data": {"loader": loader},
        "llamafactory.train": {"tuner": tuner},
        "llamafactory.train.sft": {"workflow": workflow},
        "omegaconf": {"OmegaConf": OmegaConf},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    vars(loader).update(get_dataset_list=get_dataset_list, align_dataset=align_dataset)
    loader._get_dataset_processor = lambda *args, **kwargs: Processor()  # type: ignore[attr-defined]
    workflow.CustomSeq2SeqTrainer = CustomSeq2SeqTrainer  # type: ignore[attr-defined]
    tuner.run_exp = run_exp  # type: ignore[attr-defined]
    seen.modules = (loader, workflow)
    return seen


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    colm = {"large_batch_size": 16}
    return {"stage": "sft", "dataset": ",".join(SOURCES), "output_dir": str(folder), **sizes, "colm": colm, **changes}


def test_names_of_datasets_are_sources(framework: SimpleNamespace, tmp_path: Path) -> None:
    """Rows that were dropped take their source along."""
    before = [vars(module).copy() for module in framework.modules]
    llamafactory.train(config(tmp_path))
    assert [vars(module) for module in framework.modules] == before  # put back
    trainer = framework.trainer
    kept = [(row["prompt"], row["source"]) for place, row in enumerate(rows()) if place % 5]
    data = trainer.train_dataset
    tokenizer = tiny_tokenizer()
    assert len(data) == len(kept)
    for (prompt, source), ids, labels, name in zip(
        kept, data["input_ids"], data["labels"], data["source"], strict=True
    ):
        assert name == source
        assert ids[: labels.count(-100)] == tokenizer(prompt)["input_ids"]
    assert trainer._source_counts == {name: [source for _, source in kept].count(name) for name in sorted(SOURCES)}
    assert trainer.last_coreset.size == 8
    assert isinstance(trainer, CustomSeq2SeqTrainer)
    assert "colm" not in framework.config


def test_a_column_can_be_the_source(framework: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path, max_steps=5)), encoding="utf-8")
    block = "colm={large_batch_size: 16, source_column: domain}"
    llamafactory.main(["train", str(path), "max_steps=1", block])
    assert set(framework.trainer._source_counts) == {"0", "1"}
    assert framework.trainer.state.global_step == 1


def test_what_cannot_work_is_said_together(framework: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        llamafactory.train(
            config(tmp_path, stage="dpo", packing=True, streaming=True, use_dft_loss=True, colm={"large_batch_siz": 1}),
            "sft.yaml",
        )
    lines = str(raised.value).splitlines()
    assert lines[0] == "5 problems in sft.yaml"
    assert "colm.large_batch_size = None: missing" in lines[1]
    assert "stage = 'dpo': has no loss per example that CoLM knows. Write \"sft\"." in lines[2]
    assert "packing = True: a packed row holds documents of several sources" in lines[3]
    assert "streaming = True: examples of a stream are not numbered. Remove it." in lines[4]
    assert "use_dft_loss = True: is not called for a coreset" in lines[5]
    with pytest.raises(ConfigError, match=r"config: no colm block\. Add"):
        llamafactory.train({"stage": "sft"})
    assert framework.trainer is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat", "sft.yaml"], "arguments 'chat sft.yaml': not understood. Write python -m"),
        (["train"], "arguments 'train': not understood"),
        (["train", "sft.json"], "JSON is YAML, too"),
        (["train", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_arguments(words: list[str], said: str, framework: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        llamafactory.main(words)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(ConfigError, match="not installed here: pip install llamafactory"):
        llamafactory.main(["train", "sft.yaml"])
    with pytest.raises(ConfigError, match="cannot be imported"):
        llamafactory.train(config(tmp_path))
