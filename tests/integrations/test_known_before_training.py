"""What can be known before training is said in one message by Trainer, TRL, `initialize` and `CoresetSelector`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import colm_ds
from colm_ds.errors import ConfigError, DataError
from colm_ds.integrations import large_batches
from tests.engine.training import SOURCES, Record, records
from tests.integrations.runs import make_trainer
from tests.ranks import Ranks
from tests.tiny_models import VOCABULARY_SIZE, tiny_model

SIZES = {"large_batch_size": 28}
SELECTOR = {"large_batch_size": 28, "coreset_size": 12}
BAD_ROW, LONG_ROW, POSITIONS = 17, 40, 40


def learned(num_positions: int = POSITIONS) -> Any:
    """A GPT-2 with few positions."""
    values = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": num_positions, "vocab_size": VOCABULARY_SIZE}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **values)).train()


def spoiled() -> list[Record]:
    """Rows of which one has an id without an embedding and one is longer than a GPT-2's positions."""
    rows = [dict(row) for row in records(SOURCES)]
    rows[BAD_ROW]["input_ids"] = [*rows[BAD_ROW]["input_ids"][:-1], VOCABULARY_SIZE]
    rows[LONG_ROW] = {**rows[LONG_ROW], "input_ids": [5] * (POSITIONS + 1), "labels": [5] * (POSITIONS + 1)}
    return rows


def as_kind(rows: list[Record], kind: str) -> Any:
    from datasets import Dataset

    if kind == "list":
        return rows
    dataset = Dataset.from_list(rows)
    return dataset if kind == "columns" else dataset.select(list(range(len(rows)))[::-1])


@pytest.mark.parametrize("kind", ["list", "columns", "turned"])
def test_all_of_a_trainers_problems_at_once(kind: str, tmp_path: Path) -> None:
    rows = spoiled()
    rows[3]["source"] = None
    model = learned()
    model.config.num_key_value_heads = 3
    numbers = {"learning_rate": float("nan"), "adam_beta2": 1.5, "weight_decay": -1.0, "max_grad_norm": 0.0}
    with pytest.raises(ConfigError) as raised:
        make_trainer(str(tmp_path), SIZES, 1, model=model, train_dataset=as_kind(rows, kind), **numbers)
    said = str(raised.value).split("\n")
    turned = (lambda row: len(rows) - 1 - row) if kind == "turned" else (lambda row: row)
    assert said[0] == "7 problems in the arguments of Noting"
    wanted = [
        f"train_dataset: source None in example {turned(3)}. Give names or whole numbers.",
        f"token id = {VOCABULARY_SIZE}: in example {turned(BAD_ROW)} of train_dataset, and the model has",
        f"length = {POSITIONS + 1}: of example {turned(LONG_ROW)} of train_dataset in tokens, and the model",
        "learning_rate = nan: not a finite number",
        "adam_beta2 = 1.5: not from 0 to below 1",
        "weight_decay = -1.0: not a finite number",
        "num_key_value_heads = 3: does not divide num_attention_heads = 4",
    ]
    for start in wanted:
        assert any(line.strip().startswith(start) for line in said), (start, said)


def test_an_optimizer_that_was_given(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from colm_ds.integrations.transformers import CoLMTrainer
    from tests.integrations.runs import pad

    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = float("inf")
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.lr = inf: not a finite number"):
        CoLMTrainer(model, args, pad, records(SOURCES), colm=SIZES, optimizers=(optimizer, None))
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.lr = inf: not a finite number"):
        colm_ds.CoresetSelector(model, SELECTOR, SOURCES, optimizer=optimizer)


def test_a_model_that_is_not_causal(tmp_path: Path) -> None:
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=VOCABULARY_SIZE, **values))
    random = {**SIZES, "selector": "random"}
    with pytest.raises(ConfigError, match="model type = 'bert': a token sees later ones"):
        make_trainer(str(tmp_path), random, 1, model=bert)
    with pytest.raises(ConfigError, match="model type = 'bert': a token sees later ones"):
        colm_ds.CoresetSelector(bert, {**SELECTOR, "selector": "random"}, SOURCES)


def test_evaluation_data_that_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = records(SOURCES)
    for kind in ("list", "columns"):
        same, some = as_kind(rows, kind), as_kind(rows[:5], kind)
        caplog.clear()
        make_trainer(str(tmp_path), SIZES, 1, train_dataset=same, eval_dataset=as_kind(rows, kind))
        assert any("eval_dataset: 123 of 123 examples are trained on too" in line for line in caplog.messages)
        make_trainer(str(tmp_path), SIZES, 1, train_dataset=as_kind(rows[2:], kind), eval_dataset={"own": some})
        assert any("eval_dataset['own']: 3 of 5 examples are trained on too" in line for line in caplog.messages)
    bad = as_kind(spoiled(), "columns")
    with pytest.raises(ConfigError, match=rf"token id = .*: in example {BAD_ROW} of eval_dataset"):
        make_trainer(str(tmp_path), SIZES, 1, eval_dataset=bad)


@pytest.mark.parametrize(("row", "says"), [(BAD_ROW, "token id 97"), (LONG_ROW, "41 tokens")])
def test_rows_that_were_not_looked_at_are_checked_when_read(
    row: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_batches, "LOOKED_AT", 10)
    rows = [dict(each) for each in records(SOURCES)]
    rows[row] = spoiled()[row]
    trainer = make_trainer(str(tmp_path), SIZES, 6, model=learned(), train_dataset=rows)
    with pytest.raises(DataError, match=rf"example {row} of the dataset: {says}"):
        trainer.train()


def cutting(rows: list[Record]) -> Any:
    """A collator that cuts rows at 20 tokens, and replaces ids without an embedding."""
    from tests.integrations.runs import pad

    def cut(name: str, row: Record) -> list[int]:
        return [min(token, VOCABULARY_SIZE - 1) for token in row[name][:20]]

    return pad([{name: cut(name, row) for name in ("input_ids", "labels")} for row in rows])


def test_what_the_collator_mends_is_no_problem(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from colm_ds.integrations.transformers import CoLMTrainer

    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, report_to=[])
    for kind in ("list", "columns"):
        trainer = CoLMTrainer(learned(20), args, cutting, as_kind(spoiled(), kind), colm=SIZES)
        assert len(trainer._rows) == 123


def test_labels_that_the_collator_makes_are_looked_at_in_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By transformers' own collator, for which padding is no label; also beyond the rows that are collated."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    from colm_ds.integrations.transformers import CoLMTrainer
    from tests.integrations.tiny import tiny_tokenizer

    monkeypatch.setattr(large_batches, "LOOKED_AT", 5)
    rows = [{"input_ids": row["input_ids"], "source": row["source"]} for row in records(SOURCES)]
    rows[100]["input_ids"] = [7, 0, 0]
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, report_to=[])
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    trainer = CoLMTrainer(tiny_model("llama"), args, collator, Dataset.from_list(rows), colm=SIZES)
    assert sorted(set(range(123)) - set(trainer._rows.tolist())) == [100]
    assert any(line.endswith("left out: 100") for line in caplog.messages)


def test_a_row_that_the_collator_cannot_take(tmp_path: Path) -> None:
    rows = [dict(row) for row in records(SOURCES)]
    rows[9]["labels"] = None
    with pytest.raises(ConfigError, match="example 9 of the dataset: the data collator cannot take it"):
        make_trainer(str(tmp_path), SIZES, 1, train_dataset=rows)


def refused_by_initialize(kind: str) -> str:
    """What `initialize` says of a spoiled dataset and configuration, in a rank."""
    optimizer = {"type": "AdamW", "params": {"lr": -1.0, "betas": [0.9, 1.5]}}
    config = {"colm": SELECTOR, "optimizer": optimizer, "train_micro_batch_size_per_gpu": 3, "gradient_clipping": "x"}
    try:
        colm_ds.initialize(model=learned(), config=config, training_data=as_kind(spoiled(), kind))
    except ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("kind", ["list", "columns"])
def test_all_of_initializes_problems_at_once_on_every_rank(kind: str, pools: dict[int, Ranks]) -> None:
    one, other = pools[2].run(refused_by_initialize, kind)
    assert one == other
    assert one.startswith("2 problems in the arguments of colm_ds.initialize\n  3 problems in the DeepSpeed")
    for part in (
        "optimizer.params.lr = -1.0: not a finite number",
        "optimizer.params.betas = [0.9, 1.5]: not all from 0 to below 1",
        "gradient_clipping = 'x'",
        f"token id = {VOCABULARY_SIZE}: in example {BAD_ROW}",
        f"length = {POSITIONS + 1}: of example {LONG_ROW}",
    ):
        assert part in one, (part, one)


def test_a_selector_checks_its_dataset_and_what_it_is_given() -> None:
    from colm_ds.batching.loader import RecordDataset

    with pytest.raises(ConfigError, match=rf"token id = {VOCABULARY_SIZE}: in example {BAD_ROW}"):
        colm_ds.CoresetSelector(tiny_model("llama"), SELECTOR, RecordDataset(spoiled()))
    selector = colm_ds.CoresetSelector(tiny_model("llama"), SELECTOR, SOURCES)
    selector(records(SOURCES)[:28])
    with pytest.raises(
        DataError, match=rf"example {BAD_ROW} of this rank's: token id {VOCABULARY_SIZE}; the model has"
    ):
        selector(spoiled()[:28])


def test_labels_that_are_no_ids(tmp_path: Path) -> None:
    rows = [dict(row) for row in records(SOURCES)]
    rows[8]["labels"] = [*rows[8]["labels"][:-1], -1]
    for kind in ("list", "columns"):
        with pytest.raises(ConfigError, match="label = -1: in example 8 of train_dataset"):
            make_trainer(str(tmp_path), SIZES, 1, train_dataset=as_kind(rows, kind))


def test_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tests.integrations.test_trl import make

    rows = spoiled()
    with pytest.raises(ConfigError) as raised:
        make(tmp_path, rows, SIZES, learning_rate=float("inf"))
    said = str(raised.value)
    assert f"token id = {VOCABULARY_SIZE}: in example {BAD_ROW} of train_dataset" in said
    assert f"token id = {VOCABULARY_SIZE}: in example {BAD_ROW} of eval_dataset" in said
    assert "learning_rate = inf" in said
