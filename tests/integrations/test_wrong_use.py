"""What cannot work is one clear error before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.errors import ConfigError
from colm_ds.integrations.transformers import CoLMArguments, CoLMConfig, CoLMTrainer
from colm_ds.selection import SINGLE_PROCESS
from tests.engine.training import SOURCES, Record, records
from tests.integrations.runs import make_trainer, pad
from tests.ranks import Ranks
from tests.tiny_models import tiny_model

SIZES = {"large_batch_size": 28}


def without_source() -> list[Record]:
    return [{key: value for key, value in row.items() if key != "source"} for row in records(SOURCES)]


def fails(tmp_path: Path, colm: Any = SIZES, **arguments: Any) -> str:
    """The message of a trainer that cannot be made."""
    with pytest.raises(ConfigError) as raised:
        make_trainer(str(tmp_path), colm, 2, **arguments)
    return str(raised.value)


def test_processes_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of torchrun, whose ranks would each choose alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2: there is no process group"):
        CoresetSelector(model, {"large_batch_size": 8, "coreset_size": 4}, {"a": 9})
    CoresetSelector(model, {"large_batch_size": 8, "coreset_size": 4}, {"a": 9}, exchange=SINGLE_PROCESS)


def trainer_without_the_others(output: str) -> str:
    """In a rank: the message of a Trainer that was not told to use the CPU, so that it knows of one rank alone."""
    from accelerate.state import AcceleratorState, PartialState

    def forget() -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()

    forget()
    try:
        return fails(Path(output), use_cpu=False)
    finally:
        forget()


@pytest.mark.distributed
@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without an accelerator")
def test_ranks_that_the_trainer_does_not_know(pools: dict[int, Ranks], tmp_path: Path) -> None:
    for message in pools[2].run(trainer_without_the_others, str(tmp_path)):
        assert "2 processes were started, but the Trainer counts 1, so that each would train by itself" in message
        assert "write use_cpu = True" in message


def test_no_source_column_and_no_clusters(tmp_path: Path) -> None:
    message = fails(tmp_path, train_dataset=without_source())
    assert message.startswith("1 problem in the arguments of Noting")
    assert "no 'source' column (it has input_ids, labels) and no clusters" in message


def test_clusters_or_one_pool_do_without_the_column(tmp_path: Path) -> None:
    clusters = [row["source"] for row in records(SOURCES)]
    make_trainer(str(tmp_path), SIZES, 2, train_dataset=without_source(), sources=clusters).train()
    pool = {**SIZES, "small_sources": "none", "per_source": False}
    make_trainer(str(tmp_path), pool, 2, train_dataset=without_source()).train()
    assert "sources: 3 for 123 examples" in fails(tmp_path, train_dataset=without_source(), sources=[0, 1, 2])


@pytest.mark.parametrize("source", [None, 1.5, ["a", "b"]], ids=["None", "number", "list"])
def test_a_source_that_is_none_is_read_only_where_it_is_needed(source: Any, tmp_path: Path) -> None:
    rows = [{**row, "source": source} for row in records(SOURCES)]
    assert f"source {source!r} in example 0. Give names or whole numbers." in fails(tmp_path, train_dataset=rows)
    for colm in ({"selector": "random"}, {"small_sources": "none", "per_source": False}):
        trainer = make_trainer(str(tmp_path), {**SIZES, **colm}, 2, train_dataset=rows)
        assert trainer._source_counts == {"all": len(rows)}


def test_sizes_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    message = fails(tmp_path, {"large_batch_size": 130, "coreset_size": 10, "metrik": "l1"})
    assert "metrik: unknown key. Did you mean 'metric'?" in message
    message = fails(tmp_path, {"large_batch_size": 130, "coreset_size": 10})
    assert "3 problems" in message
    assert (
        "large_batch_size = 130: not divisible by gradient_accumulation_steps = 4 x 1 ranks. Write 128 or 132"
        in message
    )
    assert "train_dataset has 123 examples" in message
    assert "coreset_size = 10: per_device_train_batch_size x gradient_accumulation_steps x 1 ranks is 12" in message
    assert "more than colm.large_batch_size = 8" in fails(tmp_path, {"large_batch_size": 8})
    assert "large_batch_size = 0: missing" in fails(tmp_path, CoLMConfig())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance': cuts batches by length"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size = True"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    message = fails(tmp_path, **arguments)
    assert message.startswith("1 problem")
    assert said in message


def test_keys_of_the_engine(tmp_path: Path) -> None:
    message = fails(tmp_path, {**SIZES, "num_workers": 2, "replay": "on"})
    assert "num_workers = 2: is for colm_ds.initialize. The Trainer reads ahead with dataloader_num_workers" in message
    assert "replay = 'on': needs colm_ds.initialize" in message


def test_unsupported_model(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    def make(selector: str) -> CoLMTrainer:
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, max_steps=1, report_to=[])
        colm = CoLMConfig(large_batch_size=28, selector=selector)
        return CoLMTrainer(tiny_model("mamba", attn_implementation="eager"), args, pad, records(SOURCES), colm=colm)

    with pytest.raises(ConfigError, match="model of type 'mamba': its last layer, MambaBlock, has no attention"):
        make("colm")
    make("keep_random")


def test_a_routers_loss(tmp_path: Path) -> None:
    """It is one of no example, and would be left out without a word."""
    from transformers import TrainingArguments

    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, max_steps=1, report_to=[])
    colm = CoLMConfig(large_batch_size=28, selector="random")
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef = 0.5: the router's loss is one of the whole batch"):
        CoLMTrainer(model, args, pad, records(SOURCES), colm=colm)
    model.config.router_aux_loss_coef = 0.0
    CoLMTrainer(model, args, pad, records(SOURCES), colm=colm)


def test_collator_that_gives_more_than_text(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    def flatten(rows: list[Record]) -> dict[str, Any]:
        return {**pad(rows), "position_ids": torch.zeros(1, 1)}

    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match="data_collator: gives position_ids beside"):
        CoLMTrainer(tiny_model("llama"), args, flatten, records(SOURCES), colm=SIZES)


def test_no_colm(tmp_path: Path) -> None:
    assert "no colm. Give colm=CoLMConfig(large_batch_size=...)" in fails(tmp_path, None)
    assert "no such block in the arguments" in fails(tmp_path, CoLMArguments())
    assert "not readable" in fails(tmp_path, "nowhere.yaml")
