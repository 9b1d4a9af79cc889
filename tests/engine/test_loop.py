"""The usual DeepSpeed loop over the loader trains what `train_batch` trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from tests.engine.oracle import largest_difference
from tests.engine.test_skipped_steps import POISON, poison, poisoned_records
from tests.engine.training import CORESET, NOTHING_PERSISTS, SOURCES, Case, parameters
from tests.integrations.runs import pad
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

STEPS = 4

EPOCH = sum(SOURCES.values()) // 29


def make(case: Case, **arguments: Any) -> tuple[Any, Any]:
    """Engine and loader of a case, in a rank."""
    import colm_ds

    given = {"model": case.build_model(), "config": case.config(), "training_data": case.records()} | arguments
    engine, _, loader, _ = colm_ds.initialize(**given)
    return engine, loader


@dataclass(frozen=True)
class Looped:
    """What a run of the loop and one of `train_batch` saw, in a rank.

    Attributes:
        parameters: at the end of either run.
        losses: of every step, from the statistics, of either run.
        chosen: tokens and share of the dataset that each step of either run trained on.
        means: mean of the losses that the loop's forwards returned, of every step.
        rows: rows of the micro-batches that the loop handed out.
        replayed: micro-batches of every step that started from the probe's states.
    """

    parameters: tuple[dict[str, Tensor], dict[str, Tensor]]
    losses: tuple[list[Any], list[Any]]
    chosen: tuple[list[Any], list[Any]]
    means: list[float]
    rows: list[int]
    replayed: list[int]


def both_ways(case: Case) -> Looped:
    """Train a case by the loop, and by `train_batch`."""
    engine, loader = make(case)
    means, rows, replayed, stats = [], [], [], []
    per_step = engine.gradient_accumulation_steps()
    for batch in loader:
        loss = engine(**batch).loss
        engine.backward(loss)
        rows.append(len(batch["input_ids"]))
        means.append(float(loss.detach()))
        if engine.is_gradient_accumulation_boundary():
            replayed.append(engine.open_step._num_replayed)
        engine.step()
        if len(means) % per_step == 0:
            stats.append(engine.last_stats)
    looped = parameters(engine)
    engine.destroy()
    engine, _ = make(case)
    plain = [engine.train_batch() for _ in range(EPOCH)]
    trained = parameters(engine)
    engine.destroy()
    return Looped(
        (looped, trained),
        ([each.loss for each in stats], [each.loss for each in plain]),
        ([(each.tokens, each.data_use) for each in stats], [(each.tokens, each.data_use) for each in plain]),
        [sum(means[start : start + per_step]) / per_step for start in range(0, len(means), per_step)],
        rows,
        replayed,
    )


def loop_case(stage: int, replay: bool, **colm: Any) -> Case:
    return Case(
        f"loop-{stage}-{replay}",
        checkpointing=replay,
        stage=stage,
        zero=NOTHING_PERSISTS if stage == 3 else {},
        colm={"replay": "on" if replay else "off", "probe": {"estimator": "exact"}, **colm},
    )


QUICK = {(2, 3, True)}

MATRIX = [
    pytest.param(
        world_size,
        stage,
        replay,
        marks=() if (world_size, stage, replay) in QUICK else pytest.mark.slow,
        id=f"{world_size}ranks-stage{stage}-{'replay' if replay else 'plain'}",
    )
    for world_size in (1, 2)
    for stage in (0, 2, 3)
    for replay in (False, True)
]


@pytest.mark.parametrize(("world_size", "stage", "replay"), MATRIX)
def test_loop_is_train_batch(replay: bool, stage: int, world_size: int, pools: dict[int, Ranks]) -> None:
    found = pools[world_size].run(both_ways, loop_case(stage, replay))
    first = found[0]
    assert largest_difference(*first.parameters) <= 1e-6
    assert first.chosen[0] == first.chosen[1]
    assert first.losses[0] == pytest.approx(first.losses[1], rel=1e-6)
    means = [sum(values) / world_size for values in zip(*(each.means for each in found), strict=True)]
    assert means == pytest.approx(first.losses[1], rel=1e-6)
    per_step = {1: 5, 2: 3}[world_size]  # ceil(13 / 3), ceil(7 / 3)
    assert all(len(each.rows) == EPOCH * per_step for each in found)
    for each in found:
        assert max(each.rows) <= 3
        assert min(each.replayed) >= (per_step - 1 if replay else 0)
        assert max(each.replayed) <= (per_step if replay else 0)


def by_turns(case: Case) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
    """In a rank: an epoch in which steps of the loop and of `train_batch` take turns, and one step more."""
    engine, loader = make(case)
    per_step, handed_out = engine.gradient_accumulation_steps(), 0
    assert len(loader) == EPOCH * per_step
    for batch in loader:
        engine.backward(engine(**batch).loss)
        engine.step()
        handed_out += 1
        if engine.open_step is None:
            engine.train_batch()
    counts = [handed_out, engine.step_count, engine.train_batch().step]
    mixed = parameters(engine)
    engine.destroy()
    engine, _ = make(case)
    for _ in range(EPOCH + 1):
        engine.train_batch()
    plain = parameters(engine)
    engine.destroy()
    return counts, mixed, plain


@pytest.mark.parametrize("selector", ["colm", "random"])
def test_loop_and_train_batch_take_turns(selector: str, pools: dict[int, Ranks]) -> None:
    """They read the same large batches, one after the other; `random` chooses ahead."""
    case = Case("turns", stage=2, colm={"selector": selector, "probe": {"estimator": "exact"}})
    assert EPOCH % 2 == 0
    counts, mixed, plain = pools[1].run(by_turns, case)[0]
    assert counts == [EPOCH // 2 * 5, EPOCH, EPOCH + 1]  # 5 micro-batches a step
    assert largest_difference(mixed, plain) <= 1e-6


def used_wrongly(case: Case) -> dict[str, str]:
    """In a rank: messages of loops that leave a step out or do something else."""
    from colm_ds.errors import CoLMError

    said = {}

    def fails(name: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except CoLMError as error:
            said[name] = str(error)

    engine, loader = make(case)
    given = next(iter(loader))
    again = next(iter(loader))  # looked at only, so it comes again
    said["again"] = str(torch.equal(given["input_ids"], again["input_ids"]) and engine.loader.next_step == 2)
    fails("step first", engine.step)
    fails("another tensor", lambda: engine.backward(engine(**given).loss * 1.0))
    fails("logits", lambda: engine(**given).logits)
    fails("more", lambda: engine(**given, position_ids=torch.zeros_like(given["input_ids"])))
    fails("not scaled", lambda: engine.backward(engine(**given).loss, scale_wrt_gas=False))
    with torch.no_grad():
        said["evaluation"] = str(engine(**given).logits.shape[:2] == given["input_ids"].shape)
    fails("own batch", lambda: engine.backward(engine(**{k: v[:, :3] for k, v in given.items()}).loss))
    fails("train_batch", engine.train_batch)
    fails("save", lambda: engine.save_checkpoint("nowhere"))
    iterator = iter(loader)
    batch = next(iterator)
    fails("no backward", lambda: next(iterator))
    engine.backward(engine(**batch).loss)
    fails("twice", lambda: engine.backward(engine.open_step.loss))
    fails("load", lambda: engine.load_state_dict({}))
    for batch in loader:  # goes on with the second one
        engine.backward(engine(**batch).loss)
        if engine.is_gradient_accumulation_boundary():
            break
        engine.step()
    fails("no step", lambda: next(iter(loader)))
    engine.step()
    fails("after it", engine.step)
    fails("nothing at work", lambda: engine.backward(torch.zeros(())))
    said["stats"] = f"{engine.step_count} {engine.last_stats.examples_trained}"
    for batch in loader:
        loss = engine(**{**batch, "input_ids": batch["input_ids"].flip(0) + 1}).loss
        engine.backward(loss)
        if engine.is_gradient_accumulation_boundary():
            break
    fails("other tokens", engine.step)
    engine.destroy()
    engine, loader = make(case)
    for batch in loader:
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100
        engine.backward(engine(**{**batch, "labels": labels}).loss)
        if engine.is_gradient_accumulation_boundary():
            break
    fails("other labels", engine.step)
    engine.destroy()
    engine, loader = make(dataclasses.replace(case, colm={**case.colm, "micro_batch_tokens": 40}))
    fails("tokens", lambda: next(iter(loader)))
    engine.destroy()
    return said


def test_what_is_done_wrongly_is_said(pools: dict[int, Ranks]) -> None:
    wanted = {
        "again": "True",
        "step first": "engine.step: micro-batch 1 of 5 of step 1 had no backward pass. Write for batch in loader:",
        "another tensor": "micro-batch 1 of 5 of step 1: engine.backward is given another tensor than the loss",
        "logits": "outputs.logits: not computed for a micro-batch of a coreset",
        "more": "micro-batch 1 of 5 of step 1: the model is given position_ids. Examples are probed",
        "not scaled": "engine.backward: scale_wrt_gas=False: the loss is of the whole step. Leave it out.",
        "evaluation": "True",
        "own batch": "micro-batch 1 of 5 of step 1: engine.backward is given another tensor",
        "train_batch": "engine.train_batch: a loop over the loader is at micro-batch 1 of 5 of step 1.",
        "save": "engine.save_checkpoint: a loop over the loader is at micro-batch 1 of 5 of step 1",
        "no backward": "micro-batch 1 of 5 of step 1: the next one was asked for before its backward pass.",
        "twice": "micro-batch 1 of 5 of step 1: engine.backward was called twice.",
        "load": "engine.load_state_dict: a loop over the loader is at micro-batch 1 of 5 of step 1.",
        "no step": "micro-batch 5 of 5 of step 1: engine.step() was not called after engine.backward.",
        "after it": "engine.step: no micro-batch of the loader is at work.",
        "nothing at work": "engine.backward: no micro-batch of the loader that colm_ds.initialize returned is at work",
        "stats": "1 13",
        "other tokens": "step 2: the engine was given other input_ids than the loader's.",
        "other labels": "step 1: the engine was given other labels than the loader's.",
        "tokens": "colm.micro_batch_tokens = 40: coresets have a varying number of micro-batches with it",
    }
    (said,) = pools[1].run(used_wrongly, Case("wrong", colm={"selector": "random"}))
    assert said.keys() == wanted.keys()
    for name, start in wanted.items():
        assert said[name].startswith(start), (name, said[name])


def resumed(case: Case, folder: str) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
    """In a rank: two epochs of the loop with a checkpoint in the middle of the first one, and the rest from that."""
    engine, loader = make(case)
    for _ in range(2):
        for batch in loader:
            engine.backward(engine(**batch).loss)
            engine.step()
            if engine.open_step is None and engine.step_count == 3:
                engine.save_checkpoint(folder)
    whole = parameters(engine)
    engine.destroy()
    engine, loader = make(case)
    next(iter(loader))  # a script may look at a batch before it loads
    engine.load_checkpoint(folder)
    per_epoch = []
    for _ in range(2):
        per_epoch.append(0)
        for batch in loader:
            engine.backward(engine(**batch).loss)
            engine.step()
            per_epoch[-1] += 1
    rest = parameters(engine)
    engine.destroy()
    return per_epoch, whole, rest


def test_resume_in_the_middle_of_an_epoch(pools: dict[int, Ranks], tmp_path: Path) -> None:
    case = Case("resume", stage=2, colm={"probe": {"estimator": "exact"}})
    per_epoch, whole, rest = pools[2].run(resumed, case, str(tmp_path))[0]
    assert per_epoch == [(EPOCH - 3) * 3, EPOCH * 3]
    assert largest_difference(whole, rest) == 0.0


def take(engine: Any, loader: Any, until: int) -> None:
    """Loop until a step was taken; a batch of the next one may be in hand then."""
    while engine.step_count < until:
        for batch in loader:
            if engine.step_count >= until:
                break
            engine.backward(engine(**batch).loss)
            engine.step()


def broken_off(case: Case, folder: str) -> list[dict[str, Tensor]]:
    """In a rank: the weights after six steps of `train_batch`, and in three ways with a break after the third."""
    ends = []
    engine, loader = make(case)
    for _ in range(6):
        engine.train_batch()
    ends.append(parameters(engine))
    engine.destroy()
    for kind in ("loop", "train_batch"):
        engine, loader = make(case)
        take(engine, loader, 3)
        assert engine.open_step is not None
        if kind == "loop":
            engine.save_checkpoint(folder)
            take(engine, loader, 6)
        else:
            for _ in range(3):
                engine.train_batch()
        ends.append(parameters(engine))
        engine.destroy()
    engine, loader = make(case)
    engine.load_checkpoint(folder)
    take(engine, loader, 6)
    ends.append(parameters(engine))
    engine.destroy()
    return ends


@pytest.mark.parametrize(
    "case",
    [
        Case("exact", colm={"probe": {"estimator": "exact"}}),
        Case("sketch", colm={"probe": {"estimator": "sketch", "num_probes": 32}}),
        Case("quotas", colm={"probe": {"estimator": "tokens"}, "selector": "colm", "per_source": True}),
        Case("dropout", family="phi", model={"resid_pdrop": 0.1, "embd_pdrop": 0.1}, colm={"selector": "random"}),
    ],
    ids=lambda case: case.name,
)
def test_a_break_leaves_no_trace(case: Case, pools: dict[int, Ranks], tmp_path: Path) -> None:
    """A batch was chosen and handed out that nobody trained on: it is chosen once more, from the state before it."""
    plain, *others = pools[1].run(broken_off, case, str(tmp_path))[0]
    for end in others if case.name != "dropout" else ():  # whose masks depend on the micro-batches
        assert largest_difference(plain, end) <= 1e-6
    assert largest_difference(others[0], others[-1]) == 0.0


def read_by_one_thread(selector: str) -> list[int]:
    """In a rank: identities of the threads that read the records of a loop with a `collate_fn`."""
    import threading

    threads = []

    class Records(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            threads.append(threading.get_ident() == threading.main_thread().ident)
            return super().__getitem__(index)

    case = Case("threads", colm={"selector": selector, "probe": {"estimator": "tokens"}})
    engine, loader = make(case, training_data=Records(case.records()), collate_fn=pad)
    threads.clear()
    take(engine, loader, 3)
    engine.destroy()
    return threads


@pytest.mark.parametrize("selector", ["random", "importance"])
def test_without_workers_the_callers_thread_reads(selector: str, pools: dict[int, Ranks]) -> None:
    """A dataset that seeks in a file would give one thread the row of another."""
    threads = pools[1].run(read_by_one_thread, selector)[0]
    assert threads
    assert all(threads)


def with_losses_that_are_not_finite(case: Case) -> list[Any]:
    """In a rank: an epoch of the loop and one of `train_batch` on examples of which some have no finite loss."""
    records = poisoned_records(case)
    for record in records:
        if record["source"] == "drama":
            record["input_ids"][0] = POISON
    found = []
    for by_loop in (True, False):
        model = poison(case.build_model())
        model.get_input_embeddings().weight.requires_grad_(False)
        engine, loader = make(case, model=model, training_data=records)
        trained, losses, skipped = [], [], []
        for batch in loader if by_loop else range(EPOCH):
            if not by_loop:
                engine.train_batch()
            else:
                engine.backward(engine(**batch).loss)
                engine.step()
            if engine.is_gradient_accumulation_boundary():
                trained.append(engine.last_stats.examples_trained)
                losses.append(engine.last_stats.loss)
                skipped.append(engine.last_stats.skipped)
        found.append((trained, losses, parameters(engine), skipped))
        engine.destroy()
    return found


@pytest.mark.parametrize("replay", [False, True], ids=["plain", "replay"])
def test_losses_that_are_not_finite_are_left_out(replay: bool, pools: dict[int, Ranks]) -> None:
    """Only kept examples of small sources come to training without a finite signal; `random` takes any."""
    colm = {"probe": {"estimator": "exact"}, "replay": "on"} if replay else {"selector": "random"}
    case = Case(
        "poison",
        stage=3 if replay else 2,
        zero=NOTHING_PERSISTS if replay else {},
        colm=colm,
        checkpointing=replay,
        model={"tie_word_embeddings": False},
    )
    looped, plain = pools[2].run(with_losses_that_are_not_finite, case)[0]
    assert looped[0] == plain[0]
    assert min(looped[0]) < CORESET
    assert looped[1] == pytest.approx(plain[1], rel=1e-6)
    assert largest_difference(looped[2], plain[2]) <= 1e-6
    assert not any(looped[3] + plain[3])


def collated(case: Case) -> dict[str, Any]:
    """In a rank: loops over what a `collate_fn` makes, with fields of its own, of records without tokens."""
    texts = [
        {"text": row["input_ids"], "answer": row["labels"], "source": row["source"], "number": place}
        for place, row in enumerate(case.records())
    ]
    texts[5]["answer"] = [-100] * len(texts[5]["answer"])

    def collate(rows: list[dict[str, Any]]) -> BatchEncoding:
        assert all("source" not in row for row in rows)
        padded = pad([{"input_ids": row["text"], "labels": row["answer"]} for row in rows])
        padded = {key: value.flip(1) for key, value in padded.items()}  # padding on the left, tokens backwards
        return BatchEncoding({**padded, "number": torch.tensor([row["number"] for row in rows])})

    engine, loader = make(case, training_data=texts, collate_fn=collate)
    numbers, same = [], True
    for given in islice(loader, engine.gradient_accumulation_steps()):
        batch = given.to(engine.device)  # which a BatchEncoding has, a dict has not
        trained = (batch["labels"] != -100).any(1)
        numbers.append(batch.pop("number")[trained].tolist())
        for row, number in zip(batch["input_ids"][trained], numbers[-1], strict=True):
            same &= row.flip(0)[: len(texts[number]["text"])].tolist() == texts[number]["text"]
        engine.backward(engine(**batch).loss)
        engine.step()
    stats = engine.last_stats
    found = {"numbers": numbers, "same": same, "size": len(engine.loader.dataset), "loss": stats.loss}
    engine.destroy()
    backwards = [
        {"input_ids": row["text"][::-1], "labels": row["answer"][::-1], "source": row["source"]} for row in texts
    ]
    engine, _ = make(case, training_data=backwards)
    found["without"] = engine.train_batch().loss
    engine.destroy()
    return found


def test_collate_fn_gives_tokens_and_fields_of_its_own(pools: dict[int, Ranks]) -> None:
    """Row 5 has no label, so it is left out; one rank has 6 of 13 examples, so its last micro-batch has none."""
    case = Case("collate", colm={"selector": "random"})
    found = pools[2].run(collated, case)
    assert all(each["same"] for each in found)
    assert {each["size"] for each in found} == {sum(SOURCES.values()) - 1}
    numbers = [number for each in found for batch in each["numbers"] for number in batch]
    assert len(set(numbers)) == CORESET
    assert 5 not in numbers
    assert found[0]["loss"] == pytest.approx(found[0]["without"], rel=1e-6)
