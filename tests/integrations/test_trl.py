"""TRL's `SFTTrainer` on coresets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colm_ds.errors import ConfigError
from tests.engine.oracle import largest_difference
from tests.engine.training import EPS, LEARNING_RATE, SOURCES, records
from tests.integrations.runs import CORESET, LARGE, SEED, forget_deepspeed, make_trainer
from tests.integrations.tiny import rows, tiny_tokenizer
from tests.tiny_models import tiny_model

pytest.importorskip("trl")

SIZES = {"large_batch_size": LARGE, "small_sources": ["drama", "essays"]}


def make(tmp_path: Path, data: list[dict[str, Any]], colm: dict[str, Any], **arguments: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    from colm_ds.integrations.trl import CoLMSFTTrainer

    forget_deepspeed()
    given = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": CORESET // 3,
        "max_steps": 3,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": EPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    } | arguments
    dataset = Dataset.from_list(data)
    args = SFTConfig(str(tmp_path), **given)
    model = tiny_model("llama").train()
    return CoLMSFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        eval_dataset=dataset.select(range(len(dataset) // 2)),
        colm=colm,
    )


@pytest.mark.parametrize("colm", [SIZES, {"large_batch_size": LARGE, "probe": {"estimator": "tokens"}}])
def test_same_training_as_with_the_trainer(colm: dict[str, Any], tmp_path: Path) -> None:
    ours = make(tmp_path, records(SOURCES), colm)
    ours.train()
    plain = make_trainer(str(tmp_path), colm, 3)
    plain.train()
    one, other = (trainer.model.state_dict() for trainer in (ours, plain))
    assert largest_difference(one, other) <= 1e-5
    steps = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, plain)]
    for mine, theirs in zip(*steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert {"mean_token_accuracy", "entropy", "num_tokens", "colm/kept_small"} <= mine.keys()
    assert ours.evaluate()["eval_loss"] > 0


def test_resume_continues_exactly(tmp_path: Path) -> None:
    colm = {**SIZES, "probe": {"estimator": "exact"}}
    whole = make(tmp_path, records(SOURCES), colm, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    rest = make(tmp_path, records(SOURCES), colm, max_steps=4)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.coreset_selector.step_count == 4
    assert largest_difference(rest.model.state_dict(), whole.model.state_dict()) == 0.0


def test_completion_only_loss(tmp_path: Path) -> None:
    trainer = make(tmp_path, rows(), {"large_batch_size": LARGE}, max_steps=1)
    seen: list[dict[str, Any]] = []
    fetch = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: (seen.extend((found := fetch(*args))[0]), found)[1]
    trainer.train()
    tokenizer, texts = tiny_tokenizer(), {row["prompt"]: row["completion"].strip() for row in rows()}
    assert sum(len(inputs["labels"]) for inputs in seen) == CORESET
    for inputs in seen:
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            trained = labels != -100
            prompt = tokenizer.decode(ids[: int(trained.nonzero()[0])])
            assert tokenizer.decode(ids[trained]) == f"{texts[prompt]} </s>"


@pytest.mark.parametrize("option", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packing_is_refused_with_a_reason(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a packed row holds documents of several sources") as raised:
        make(tmp_path, rows(), {"large_batch_size": LARGE}, **{"max_length": 32, **option})
    assert str(raised.value).startswith("1 problem in the arguments of CoLMSFTTrainer")
    assert "pack every source by itself beforehand" in str(raised.value)


def test_rows_packed_source_by_source_are_examples(tmp_path: Path) -> None:
    """Blocks of 16 tokens, each cut out of the documents of one source."""
    blocks = []
    for source in SOURCES:
        tokens = [token for row in records(SOURCES) if row["source"] == source for token in row["input_ids"]]
        starts = range(0, len(tokens) - 16, 16)
        blocks += [{"input_ids": tokens[start : start + 16], "source": source} for start in starts]
    trainer = make(tmp_path, blocks, SIZES, max_steps=1)
    trainer.train()
    assert trainer.last_coreset.size == CORESET


def test_packing_by_colm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"packing = 64: TRL computes its metrics from unpacked rows\. Write \"off\""):
        make(tmp_path, records(SOURCES), {**SIZES, "packing": 64})
