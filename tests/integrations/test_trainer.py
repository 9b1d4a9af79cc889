"""What a Trainer does beside choosing: epochs, evaluation, checkpoints, whose examples are where."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colm_ds.errors import CheckpointError, DataError
from colm_ds.integrations.large_batches import ShareSampler, number_sources
from colm_ds.integrations.micro_batches import equal_ranks
from colm_ds.integrations.transformers import CoLMTrainer
from tests.engine.training import SOURCES, records
from tests.integrations.runs import CORESET, LARGE, make_trainer, pad
from tests.tiny_models import tiny_model

SIZES = {"large_batch_size": LARGE, "probe": {"estimator": "sketch"}}


def test_epochs_evaluation_and_workers(tmp_path: Path) -> None:
    """Two epochs of four steps, read by a worker process; the `source` column reaches nobody, in evaluation neither."""
    from transformers import Trainer

    arguments: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "remove_unused_columns": False}
    arguments |= {"eval_strategy": "epoch", "eval_dataset": records(SOURCES)[:9]}
    trainer = make_trainer(str(tmp_path), SIZES, 8, **arguments, dataloader_num_workers=1)
    trainer.train()
    alone = make_trainer(str(tmp_path), SIZES, 8, **arguments)
    alone.train()
    assert trainer.chosen == alone.chosen
    assert trainer.state.global_step == 8
    assert trainer.state.epoch == 2
    assert all(len(set(chosen)) == CORESET for chosen in trainer.chosen)
    assert len({index for chosen in trainer.chosen[:4] for index in chosen}) == 4 * CORESET
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in records(SOURCES)[:9]]
    plain = Trainer(trainer.model, trainer.args, pad, eval_dataset=rows).evaluate()
    assert evaluated[-1] == pytest.approx(plain["eval_loss"], abs=1e-6)
    assert len(evaluated) == 2


def test_epochs_that_a_callback_ends(tmp_path: Path) -> None:
    """The next epoch begins in another order, as in the Trainer; looking at the data again changes nothing."""
    from transformers import TrainerCallback

    class EndEarly(TrainerCallback):
        """End every epoch after its first step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = True

    ended = make_trainer(str(tmp_path), SIZES, -1, num_train_epochs=3)
    ended.add_callback(EndEarly())
    ended.train()
    assert ended.state.global_step == 3
    large = [trainer_rows(ended, step) for step in (1, 5, 9)]
    assert [set(chosen) <= set(rows) for chosen, rows in zip(ended.chosen, large, strict=True)] == [True] * 3
    steps = iter((0, 1, 2))
    sampler = ShareSampler(29, 12, 1, 1, seed=0, global_step=lambda: next(steps))
    plain = ShareSampler(29, 12, 1, 1, seed=0, global_step=lambda: 2)
    reader = iter(sampler)
    next(reader)
    next(iter(sampler))  # a look at the data after the first of two steps
    assert len(list(reader)) == 1
    assert list(sampler) == list(plain)


def trainer_rows(trainer: Any, step: int) -> list[int]:
    """Dataset indices of the large batch of a step of undisturbed training."""
    from colm_ds.batching.mixture import MixtureSampler

    return MixtureSampler(len(trainer.train_dataset), LARGE, trainer.colm_config.seed).indices(step).tolist()


def test_text_that_a_subclass_changes_on_the_way(tmp_path: Path) -> None:
    class Masking(CoLMTrainer):
        """Takes all labels away but the last two."""

        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            prepared = super()._prepare_inputs(inputs)
            prepared["labels"][:, :-2] = -100
            return prepared

    made = make_trainer(str(tmp_path), SIZES, 2)
    trainer = Masking(made.model, made.args, pad, made.train_dataset, colm=SIZES)
    with pytest.raises(
        DataError, match=r"step 1: a micro-batch of a coreset arrived in compute_loss with other input_ids or labels"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


def test_nothing_is_kept_where_nothing_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), SIZES, 4, logging_strategy="no")
    trainer.train()
    statistics = trainer._statistics
    assert set(statistics._counts.values()) == {3}
    assert statistics.take()["colm/select_s"] > 0.0


def test_examples_of_workers_hold_no_file_handles(tmp_path: Path) -> None:
    """However large r: as tensors every example of a large batch would hold two until it is trained."""
    trainer = make_trainer(str(tmp_path), SIZES, 1, dataloader_num_workers=1)
    parts = iter(trainer.get_train_dataloader())
    first = next(parts)
    before = len(os.listdir("/proc/self/fd"))
    kept = [example for part in parts for example in part]
    assert len(os.listdir("/proc/self/fd")) <= before
    assert len(kept) > 3 * LARGE - len(first)
    trainer.train()
    assert trainer.last_selection.batch.examples == {}


def test_checkpoint_of_other_sizes_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(str(tmp_path), SIZES, 1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    other = make_trainer(str(tmp_path), {**SIZES, "large_batch_size": 32}, 2)
    with pytest.raises(CheckpointError, match="Resume with the former"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "colm_state.pt").unlink()
    with caplog.at_level("WARNING"):
        make_trainer(str(tmp_path), SIZES, 2).train(resume_from_checkpoint=str(checkpoint))
    assert "the history of the selection starts empty" in caplog.text


def test_every_rank_reads_its_part_of_each_large_batch() -> None:
    """24 examples, r = 12, on 3 ranks with 2 micro-batches each: accelerate deals the batches out in turn."""
    sampler = ShareSampler(29, 12, 2, 3, seed=0, global_step=lambda: 2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12
    dealt = [[index for batch in batches[rank:6:3] for index in batch] for rank in range(3)]
    assert [index for share in dealt for index in share] == sampler._mixture.indices(3).tolist()
    ordered = list(ShareSampler(29, 12, 1, 1, seed=0, global_step=lambda: 6, shuffle=False))
    assert ordered == [list(range(12)), list(range(12, 24))]


def test_ranks_train_as_many_examples_each() -> None:
    lengths, home = torch.tensor([9, 5, 7, 6, 8, 4]), torch.tensor([0, 0, 0, 0, 0, 1])
    assert equal_ranks([0, 1, 2, 3], lengths, home, 2) == {0: 0, 2: 0, 1: 1, 3: 1}
    assert equal_ranks([5, 0], lengths, home, 2) == {0: 0, 5: 1}
    assert equal_ranks([4], lengths, home, 2) == {4: 0}


def test_sources_are_numbered_as_by_the_engine() -> None:
    from colm_ds.batching.loader import RecordDataset, source_counts

    values = ["b", 10, "a", 2, "b", 2]
    records = [{"input_ids": [1, 2], "source": value} for value in values]
    counts, ids = number_sources(values)
    dataset = RecordDataset(records)
    assert counts == source_counts(dataset)
    assert list(counts) == ["2", "10", "a", "b"]
    assert np.array_equal(ids, dataset.source_ids)


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    """No hook, no replaced forward, training mode."""
    from tests.engine.training import attachments

    before = attachments(tiny_model("llama").train())
    trainer = make_trainer(str(tmp_path), SIZES, 1)
    trainer.train()
    assert attachments(trainer.model) == before
    assert trainer.model.training
