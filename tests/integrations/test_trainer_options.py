"""Options and subclasses of the Trainer that selection goes along with, and what it says about them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from colm_ds.errors import ConfigError, DataError
from colm_ds.integrations import large_batches
from colm_ds.integrations.transformers import CoLMMixin, CoLMTrainer
from tests.engine.oracle import largest_difference
from tests.engine.training import EPS, LEARNING_RATE, SOURCES, Record, records
from tests.integrations.runs import CORESET, LARGE, SEED, forget_deepspeed, make_trainer, pad
from tests.tiny_models import add_lora, randomise, tiny_model

SIZES = {"large_batch_size": LARGE}
RANDOM = {"large_batch_size": LARGE, "selector": "random"}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("colm_ds")]


def trained(trainer: Any) -> dict[str, Any]:
    """Train; the parameters at the end."""
    trainer.train()
    weights: dict[str, Any] = trainer.model.state_dict()
    return weights


def plain_trainer(tmp_path: Path, rows: list[Record], **arguments: Any) -> Any:
    """A Trainer on given rows in their order, otherwise as `make_trainer` makes one."""
    forget_deepspeed()
    given: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": CORESET // 3,
        "max_steps": len(rows) // CORESET,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": EPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": SEED,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    data = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    args = TrainingArguments(str(tmp_path), **given | arguments)
    return Trainer(tiny_model("llama").train(), args, pad, train_dataset=data)


@pytest.mark.parametrize("smoothing", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_random_is_the_trainer(smoothing: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten steps on rows of many lengths, in the order in which `random` draws them."""
    ours = make_trainer(str(tmp_path), RANDOM, 10, label_smoothing_factor=smoothing)
    assert "loss: the mean over tokens, as the Trainer's (selector random)." in said(caplog)
    weights = trained(ours)
    data = records(SOURCES)
    rows = [data[index] for step in ours.chosen for index in step]
    theirs = plain_trainer(tmp_path, rows, label_smoothing_factor=smoothing)
    assert largest_difference(weights, trained(theirs)) <= 1e-6
    colm = {**RANDOM, "loss_normalization": "example"}
    by_example = make_trainer(str(tmp_path), colm, 10, label_smoothing_factor=smoothing)
    assert largest_difference(weights, trained(by_example)) > 1e-4
    assert by_example.chosen == ours.chosen


def test_normalisation_of_a_checkpoint_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run of `random` from before, whose loss was the mean over examples, resumes with that."""
    make_trainer(str(tmp_path), RANDOM, 1, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoint-1" / "colm_state.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("loss_normalization") == "token"
    torch.save(state, path)
    caplog.clear()
    resumed = make_trainer(str(tmp_path), RANDOM, 2)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert resumed.colm_config.loss_normalization == "example"
    assert any("its loss was the mean over examples, and stays it" in line for line in said(caplog))


def test_what_a_search_of_hyperparameters_changes(tmp_path: Path) -> None:
    """It sets arguments when training begins; b, the seed of the choices and the rows follow them."""
    trainer = make_trainer(str(tmp_path), {"large_batch_size": LARGE, "probe": {"estimator": "tokens"}}, 2)
    before = trainer.colm_config
    trainer.args.gradient_accumulation_steps, trainer.args.seed = 2, 99
    trainer.train_dataset = records(SOURCES)[:60]
    trainer.train()
    assert (before.coreset_size, before.seed) == (CORESET, SEED)
    assert (trainer.colm_config.coreset_size, trainer.colm_config.seed) == (6, 99)
    assert {len(chosen) for chosen in trainer.chosen} == {6}
    assert len(trainer._rows) == 60


def test_group_by_length_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grouped = make_trainer(str(tmp_path), RANDOM, 2, train_sampling_strategy="group_by_length")
    assert sum(line.startswith("group_by_length: changes nothing") for line in said(caplog)) == 1
    plain = make_trainer(str(tmp_path), RANDOM, 2)
    assert largest_difference(trained(grouped), trained(plain)) == 0.0
    assert grouped.chosen == plain.chosen


def test_neftune_is_in_training_only(tmp_path: Path) -> None:
    """The first choice is made without noise, its step with it."""
    colm = {**SIZES, "probe": {"estimator": "exact"}}
    noisy = make_trainer(str(tmp_path), colm, 1, neftune_noise_alpha=5.0)
    plain = make_trainer(str(tmp_path), colm, 1)
    assert largest_difference(trained(noisy), trained(plain)) > 1e-5
    assert noisy.chosen == plain.chosen


@pytest.mark.slow
def test_torch_compile(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    colm = {**SIZES, "probe": {"estimator": "exact"}}
    compiled = make_trainer(str(tmp_path), colm, 3, torch_compile=True, torch_compile_backend="aot_eager")
    assert any(line.startswith("torch_compile: logits are computed at all positions") for line in said(caplog))
    weights = trained(compiled)
    plain = make_trainer(str(tmp_path), colm, 3)
    assert largest_difference(weights, trained(plain)) <= 1e-5
    assert compiled.chosen == plain.chosen
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)


NEEDS = dict.fromkeys(("lion_32bit", "lion_8bit", "adamw_bnb_8bit"), "bitsandbytes")
NEEDS["schedule_free_adamw"] = "schedulefree"
"""Packages by optimizer."""


@pytest.mark.parametrize(
    ("optimizer", "is_adam"),
    [("adafactor", False), ("lion_32bit", False), ("adamw_bnb_8bit", True), ("schedule_free_adamw", True)],
)
def test_other_optimizers(optimizer: str, is_adam: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if optimizer in NEEDS:
        pytest.importorskip(NEEDS[optimizer])
    colm = {**SIZES, "probe": {"estimator": "exact"}}
    trainer = make_trainer(str(tmp_path), colm, 3, optim=optimizer, learning_rate=1e-4)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert largest_difference(before, trained(trainer)) > 0
    context = trainer.coreset_selector._context
    lines = [line for line in said(caplog) if "has no betas and eps of Adam" in line]
    if is_adam:
        assert not lines
        assert context.eps == EPS
    else:
        assert len(lines) == 1
        assert "colm.geometry plain" in lines[0]
        assert (context.betas, context.eps) == ((0.9, 0.999), 1e-8)


STATES = {
    "adafactor": {"exp_avg_sq_row", "exp_avg_sq_col"},
    "lion_32bit": {"state1"},
    "lion_8bit": {"state1", "absmax1"},
    "adamw_bnb_8bit": {"state1", "state2", "absmax1", "absmax2"},
    "schedule_free_adamw": {"z", "exp_avg_sq"},
}
"""Tensors that an optimizer keeps of a matrix of 4,096 weights or more, from which on bitsandbytes' have 8 bits."""


@pytest.mark.parametrize("optimizer", STATES)
def test_other_optimizers_resume(optimizer: str, tmp_path: Path) -> None:
    """Four steps, with a checkpoint and an evaluation after two, and the last two from that checkpoint."""
    if optimizer in NEEDS:
        pytest.importorskip(NEEDS[optimizer])
    colm = {**SIZES, "probe": {"estimator": "exact"}}
    given = {"optim": optimizer, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 2}
    given |= {"eval_dataset": records(SOURCES)[:3], "save_strategy": "steps", "save_steps": 2}

    def run(resume: str | None = None) -> Any:
        model = tiny_model("llama", hidden_size=64, intermediate_size=128).train()
        trainer = make_trainer(str(tmp_path), colm, 4, model=model, **given)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, rest = run(), run(str(tmp_path / "checkpoint-2"))
    assert rest.chosen == whole.chosen[2:]
    assert largest_difference(rest.model.state_dict(), whole.model.state_dict()) == 0.0
    logs = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (whole, rest)]
    assert logs[0] == logs[1]  # the first two steps come from the checkpoint
    states = [state for state in whole.optimizer.state.values() if STATES[optimizer] <= state.keys()]
    assert states
    if optimizer.endswith("8bit"):
        assert states[0]["state1"].dtype == torch.uint8


def test_evaluation_leaves_schedule_free_choices_alone(tmp_path: Path) -> None:
    """It puts the mean of the weights into the model, and the next choice is made with those that are trained."""
    pytest.importorskip("schedulefree")
    colm = {**SIZES, "probe": {"estimator": "exact"}}
    given: dict[str, Any] = {"optim": "schedule_free_adamw", "learning_rate": 1e-2}
    plain = make_trainer(str(tmp_path), colm, 5, **given)
    weights = trained(plain)
    evaluated = make_trainer(
        str(tmp_path), colm, 5, eval_strategy="steps", eval_steps=1, eval_dataset=records(SOURCES)[:3], **given
    )
    seen: list[bool] = []
    evaluate = evaluated.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        seen.append(evaluated.optimizer.param_groups[0]["train_mode"])
        return result

    evaluated.evaluation_loop = evaluation_loop
    evaluated.train()
    assert seen == [False] * 5
    assert evaluated.chosen == plain.chosen
    evaluated.optimizer.train()
    assert largest_difference(weights, evaluated.model.state_dict()) <= 1e-5


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
def test_kinds_of_lora(kind: dict[str, bool], tmp_path: Path) -> None:
    colm = {**SIZES, "probe": {"estimator": "tokens"}}
    args = make_trainer(str(tmp_path), colm, 2).args
    model = add_lora(tiny_model("llama"), "llama", **kind)
    randomise(model)
    trainer = CoLMTrainer(model.train(), args, pad, records(SOURCES), colm=colm)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def unlabelled(rows: list[Record], places: set[int]) -> list[Record]:
    """Rows of which some have no label after the first token."""
    emptied = [{**row, "labels": row["input_ids"][:1] + [-100] * (len(row["labels"]) - 1)} for row in rows]
    return [emptied[place] if place in places else row for place, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_rows_without_labels_are_left_out(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset

    empty = {0, 7, 50, 122}
    rows: Any = unlabelled(records(SOURCES), empty)
    rows = Dataset.from_list(rows) if kind == "dataset" else rows
    trainer = make_trainer(str(tmp_path), RANDOM, 8, train_dataset=rows)
    (line,) = [line for line in said(caplog) if "have no label" in line]
    assert line.startswith("4 of 123 examples have no label")
    assert line.endswith("left out: 0, 7, 50, 122")
    assert sum(trainer._source_counts.values()) == 119
    read: set[int] = set()
    fetch = trainer.get_batch_samples

    def fetch_and_note(*args: Any) -> Any:
        samples = fetch(*args)
        read.update(trainer.last_selection.batch.indices.tolist())
        return samples

    trainer.get_batch_samples = fetch_and_note
    trainer.train()
    assert read == set(range(123)) - empty  # in two epochs
    nothing = unlabelled(records(SOURCES), set(range(123)))
    with pytest.raises(ConfigError, match="none of 123 rows has a label"):
        make_trainer(str(tmp_path), RANDOM, 1, train_dataset=nothing)


def test_rows_that_were_not_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when they are read: left out of that step, and counted."""
    monkeypatch.setattr(large_batches, "LOOKED_AT", 20)
    later = set(range(60, 80))
    trainer = make_trainer(str(tmp_path), RANDOM, 4, train_dataset=unlabelled(records(SOURCES), {3} | later))
    assert any(line.startswith("1 of 20 examples have no label") for line in said(caplog))
    trainer.train()
    counts = [int(line.split(": ")[1].split()[0]) for line in said(caplog) if line.startswith("step ")]
    assert trainer._num_without_label == sum(counts) > 10
    assert said(caplog)[-1].endswith(f"({sum(counts)} so far)")
    assert all(len(step) == CORESET for step in trainer.chosen)
    assert not {index for step in trainer.chosen for index in step} & ({3} | later)
    nothing = unlabelled(records(SOURCES), set(range(20, 123)))
    trainer = make_trainer(str(tmp_path), RANDOM, 2, train_dataset=nothing, train_sampling_strategy="sequential")
    with pytest.raises(DataError, match="step 2: none of the examples read has a label"):
        trainer.train()


class OwnLoss(Trainer):
    """A Trainer with a loss and a loader of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        raise AssertionError


class Assigned(Trainer):
    """A Trainer to which its own functions were assigned, as patches of other packages do."""

    compute_loss = Trainer.compute_loss
    get_batch_samples = Trainer.get_batch_samples

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_loss = types.MethodType(Trainer.compute_loss, self)


def trainer_of(kind: type, tmp_path: Path, **arguments: Any) -> Any:
    forget_deepspeed()
    sizes: dict[str, Any] = {"per_device_train_batch_size": 12, "max_steps": 1, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", **sizes)
    mixed: Any = type("Mixed", (CoLMMixin, kind), {})
    return mixed(tiny_model("llama").train(), args, pad, records(SOURCES), colm=RANDOM, **arguments)


def test_overrides_are_named_or_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError) as raised:
        trainer_of(OwnLoss, tmp_path)
    assert str(raised.value).startswith("2 problems")
    assert "OwnLoss.compute_loss: is called in evaluation, not for the micro-batches of a coreset." in str(raised.value)
    assert "colm_allow_overrides=True" in str(raised.value)
    caplog.clear()
    trainer = trainer_of(OwnLoss, tmp_path, colm_allow_overrides=True)
    trainer.train()
    assert trainer.last_coreset.size == 12
    assert sum(line.startswith("OwnLoss.compute_loss: is called in evaluation") for line in said(caplog)) == 1
    assert sum(line.startswith("OwnLoss.get_train_dataloader: is not called") for line in said(caplog)) == 1


def test_compute_loss_func(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def own(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    with pytest.raises(ConfigError, match="compute_loss_func: not called for a coreset"):
        trainer_of(Trainer, tmp_path, compute_loss_func=own)
    trainer_of(Trainer, tmp_path, compute_loss_func=own, colm_allow_overrides=True).train()
    assert any(line.startswith("compute_loss_func: is not called") for line in said(caplog))


def test_the_trainers_own_functions_may_be_assigned(tmp_path: Path) -> None:
    trainer = trainer_of(Assigned, tmp_path)
    trainer.train()
    assert trainer.last_coreset.size == 12


KNOWN = [
    ("llamafactory", "CustomSeq2SeqTrainer", None),
    ("axolotl", "AxolotlTrainer", "AxolotlTrainer.compute_loss: tokens per second"),
]


@pytest.mark.parametrize(("package", "name", "loses"), KNOWN)
def test_known_trainers(
    package: str, name: str, loses: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Classes of these names that do what theirs do: a loss that calls the Trainer's, and an order of rows."""

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)

    def sampler(self: Any, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    body = {"compute_loss": compute_loss, "_get_train_sampler": sampler, "__module__": f"{package}.train.sft.trainer"}
    trainer = trainer_of(type(name, (Trainer,), body), tmp_path)
    trainer.train()
    assert np.sort(trainer.last_selection.batch.indices).tolist() == list(range(LARGE))  # in order
    lost = [line for line in said(caplog) if name in line]
    assert len(lost) == (loses is not None)
    assert all(line.startswith(str(loses)) for line in lost)


def test_in_front_of_the_mixin_nothing_is_lost(tmp_path: Path) -> None:
    """A class in front is called for the loss of a coreset."""
    seen = []

    class Adds(CoLMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            seen.append(float(loss.detach()))
            return loss

    forget_deepspeed()
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, use_cpu=True, report_to=[], max_steps=1)
    Adds(tiny_model("llama").train(), args, pad, records(SOURCES), colm=RANDOM).train()
    assert len(seen) == 1
