"""The engine: a DeepSpeed engine whose optimizer step inspects r examples and trains on the b that represent them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from colm_ds.batching.loader import LargeBatchLoader, source_counts
from colm_ds.batching.packing import Packing
from colm_ds.batching.row_facts import is_looked_at
from colm_ds.batching.sources import small_source_ids
from colm_ds.checkpoints.atomic import Checkpoint, check_tag
from colm_ds.checkpoints.engine_state import check_order, find_on_all_ranks, load_engine, save_engine
from colm_ds.config.resolve import ResolvedConfig
from colm_ds.distributed.exchange import make_exchange
from colm_ds.engine.accumulation import (
    Accumulated,
    Placement,
    StepNumbers,
    accumulate,
    assign_and_move,
    broken_positions,
    loss_scale,
    read_step,
)
from colm_ds.engine.choose_ahead import ChooseAhead
from colm_ds.engine.coreset_selector import CoresetSelector, Selection
from colm_ds.engine.data_use import DataUse
from colm_ds.engine.micro_batch_loop import LOOP, OpenStep, place_equally
from colm_ds.engine.monitor import RunMonitor
from colm_ds.engine.out_of_memory import memory_error
from colm_ds.engine.skipped_steps import SkippedSteps, guard_plain_optimizer
from colm_ds.engine.step_stats import describe_coreset
from colm_ds.errors import LoopError, SelectionError
from colm_ds.memory.meter import Meter
from colm_ds.memory.recorder import MemoryRecorder
from colm_ds.models.example_loss import find_loss_head
from colm_ds.models.model_fit import ModelLimits, check_causal, check_router_loss
from colm_ds.models.packing import check_packing
from colm_ds.models.quantized import without_quantized_state
from colm_ds.probe.gradient_sketch import GradientSketch
from colm_ds.process.watchdog import Watchdog
from colm_ds.randomness import random_state, restore_random_state
from colm_ds.run_folder.metrics import events
from colm_ds.types import LargeBatch, SourcedDataset, StepStats


class CoLMEngine:
    """Wrapper of a DeepSpeed engine; other attributes are the DeepSpeed engine's.

    Attributes:
        deepspeed_engine: the wrapped engine.
        config: the resolved configuration.
        loader: the large batches that `train_batch` takes by default.
        coreset_selector: probes and selects.
        step_count: optimizer steps so far.
        num_samples: examples trained on so far, over all ranks.
        data_use: part of the dataset inspected and trained on.
        loss_head: from `find_loss_head`.
        packing: how chosen examples are packed into rows, or None.
        skipped: counts steps that changed nothing because their gradient was not finite.
        watchdog: ends this rank if a phase lasts longer than `colm.phase_timeout_s`.
        monitor: TensorBoard, W&B, Comet and CSV, if the configuration enables them.
        memory: measures every step.
        open_step: step that a loop over the micro-batch loader is at, or None.
        last_stats: numbers of the last step, or None.
        resumed_in: folder of the checkpoint that was loaded last, or None.
    """

    def __init__(
        self, engine: Any, config: ResolvedConfig, dataset: SourcedDataset, target: SourcedDataset | None = None
    ) -> None:
        self.deepspeed_engine = engine
        self.config = config
        self.step_count = 0
        self.num_samples = 0
        self.data_use = DataUse(len(dataset))
        self.open_step: OpenStep | None = None
        self._before: dict[str, Any] = {}
        self._broken_off: int | None = None
        self.last_stats: StepStats | None = None
        self.resumed_in: Path | None = None
        self._contexts = ExitStack()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device(engine.device)
        self._source_names = list(dataset.source_names)
        self._exchange = make_exchange(self._device)
        check_causal(engine.module)
        check_router_loss(engine.module)
        if config.colm.variance_every:
            GradientSketch(engine.module, config.colm.seed)  # raises now what it would in the first step that measures
        self._limits = None if is_looked_at(dataset) else ModelLimits.of(engine.module)
        self.loss_head = find_loss_head(engine.module)
        self.packing = self._find_packing(dataset)
        self.skipped = SkippedSteps(config.colm.max_skipped_steps)
        self.watchdog = Watchdog(config.colm.phase_timeout_s, self._rank)
        self.monitor = RunMonitor(config.deepspeed)
        self.memory = MemoryRecorder(config.colm.memory, self._device, self._rank)
        guard_plain_optimizer(engine)
        self.loader = LargeBatchLoader(
            dataset,
            config.colm.large_batch_size,
            seed=config.colm.seed,
            rank=self._rank,
            world_size=self._world_size,
            num_workers=config.colm.num_workers,
            kept_sources=small_source_ids(config.colm, source_counts(dataset)),
        )
        self.coreset_selector = CoresetSelector(
            engine.module,
            config.colm,
            source_counts(dataset),
            device=self._device,
            exchange=self._exchange,
            optimizer=engine.optimizer,
            equal_counts=engine.zero_optimization_stage() == 3,
            rank=self._rank,
            mean_length=float(dataset.lengths.mean()),
            dataset=dataset,
            target=target,
            learning_rate=lambda: float(engine.get_lr()[0]),
            by_engine=True,
        )
        self._batches: Iterator[LargeBatch] = self._read()

    def _find_packing(self, dataset: SourcedDataset) -> Packing | None:
        """Return how examples are packed: into rows as long as the longest of the dataset, or as configured."""
        packing = self.config.colm.packing
        if packing == "off":
            return None
        row_tokens = int(dataset.lengths.max()) if packing == "on" else packing
        return check_packing(self.deepspeed_engine.module, packing, row_tokens, self.config.micro_batch_size)

    def __getattr__(self, name: str) -> Any:
        if "deepspeed_engine" not in self.__dict__:  # accessed before __init__, as copy and pickle do
            raise AttributeError(name)
        return getattr(self.deepspeed_engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the model; of a micro-batch of the loader, return its `CoresetOutput`.

        Raises:
            LoopError: if a micro-batch of the loader comes with more than its text.
        """
        step = self.open_step
        if step is None or not step.takes(args, kwargs):
            return self.deepspeed_engine(*args, **kwargs)
        with self._naming_what_ran_out(step.selection.batch):
            return step.forward(args, kwargs)

    forward = __call__

    def backward(self, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Run the backward pass of a micro-batch of the loader.

        Args:
            loss: the loss that the engine returned for it, as it is.
            retain_graph: keep the graph, as in DeepSpeed.
            scale_wrt_gas: must be True: the loss is divided by the micro-batches of the step here.

        Returns:
            This micro-batch's part of the step's loss.

        Raises:
            LoopError: if the loss is not that of the micro-batch.
        """
        step = self.open_step
        if step is None or not step.is_given:
            raise LoopError(
                "engine.backward: no micro-batch of the loader that colm_ds.initialize returned is at work, so the "
                f"loss is not one of a coreset. Write {LOOP}, or call engine.train_batch()."
            )
        if not scale_wrt_gas:
            raise LoopError("engine.backward: scale_wrt_gas=False: the loss is of the whole step. Leave it out.")
        self._check_whole("backward")
        with self._naming_what_ran_out(step.selection.batch), self._breaking_off(step.selection.batch.step):
            return step.backward(loss, retain_graph)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Take the optimizer's step after the last micro-batch of a coreset; after the others do nothing.

        The step's numbers are then in `last_stats`.

        Args:
            lr_kwargs: arguments of the learning-rate scheduler, as in DeepSpeed.

        Raises:
            LoopError: if the micro-batch's backward pass was not made, or other token ids or labels came in than the
                loader's.
        """
        step = self.open_step
        if step is None or not step.is_done:
            where = "no micro-batch of the loader is at work" if step is None else f"{step.name} had no backward pass"
            raise LoopError(f"engine.step: {where}. Write {LOOP}, or call engine.train_batch().")
        if not step.is_last:
            return
        selection = step.selection
        with self._naming_what_ran_out(selection.batch), self.watchdog.watching(f"step {selection.batch.step}"):
            done, differs = step.accumulated()
            others = self._exchange.sum(differs.float()).tolist()
            if any(others):
                names = " and ".join(name for name, count in zip(("input_ids", "labels"), others, strict=True) if count)
                raise LoopError(
                    f"step {selection.batch.step}: the engine was given other {names} than the loader's. A coreset "
                    f"is trained on as it was chosen: write {LOOP}, with labels as the dataset's records or collate_fn "
                    "make them, and evaluate under torch.no_grad()."
                )
            lr = float(self.deepspeed_engine.get_lr()[0])
            passed = _Passed(step.placement, step.token_bytes, done, lr_kwargs)
            with self._breaking_off(selection.batch.step):
                update = self._update(selection, step.meter, passed)
                self._contexts.close()
                self.open_step = None
                time_s = {"data": step.data_s, **self.memory.seconds(), "total": time.perf_counter() - step.start}
                self._record(selection, update, step.variance, lr, time_s)

    def next_micro_batch(self) -> OpenStep:
        """Move to the next micro-batch, of the step under way or of a new one; `MicroBatchLoader` calls it.

        Raises:
            LoopError: if the step was not taken after its last micro-batch.
        """
        self._check_whole("a loop over the loader")
        step = self.open_step
        if step is None:
            step = self.open_step = self._begin()
        elif step.is_done:
            if step.is_last:
                raise LoopError(f"{step.name}: engine.step() was not called after engine.backward. Write {LOOP}.")
            step.advance()
        return step

    def _begin(self) -> OpenStep:
        """Read and choose the next coreset, and place it for a loop over its micro-batches."""
        if self.packing is not None:
            raise LoopError(
                "colm.packing: a loop over the loader hands out examples one by one. Call engine.train_batch(), or "
                "remove colm.packing."
            )
        self.skipped.check(self.step_count)
        self.monitor.open()
        with self.watchdog.watching(f"step {self.step_count + 1}"), ExitStack() as contexts:
            start = time.perf_counter()
            batch = self._next_batch()
            data_s = time.perf_counter() - start
            contexts.enter_context(self._naming_what_ran_out(batch))
            contexts.enter_context(self._breaking_off(batch.step))
            meter = contexts.enter_context(self._measuring(batch))
            self._before = {"selector": self.coreset_selector.snapshot(), "random_state": random_state()}
            selection = self._select(batch, meter)
            variance = self._gradient_variance(selection)
            with meter.phase("train"), self._exchange.counting("tokens") as count:
                placement, num_replayed = place_equally(
                    selection,
                    self._exchange,
                    self._rank,
                    num_micro_batches=self.gradient_accumulation_steps(),
                    max_examples=self.config.micro_batch_size,
                )
            step = OpenStep(
                self.deepspeed_engine,
                self.loss_head,
                selection,
                placement,
                num_replayed=num_replayed,
                scale=loss_scale(batch, selection.coreset, self.config.colm.loss_normalization),
                rank=self._rank,
                token_bytes=count.num_bytes,
                variance=variance,
                meter=meter,
                start=start,
                data_s=data_s,
                sketch=self.coreset_selector.training_sketch,
            )
            self._contexts = contexts.pop_all()
            self._contexts.callback(step.close)
            return step

    def _close_step(self, what: str) -> None:
        """Forget a step of which no forward was made.

        Raises:
            LoopError: if one was made.
        """
        step = self.open_step
        if step is None:
            return
        if not self._is_untouched():
            raise LoopError(f"engine.{what}: a loop over the loader is at {step.name}. Let it take that step first.")
        self.loader.next_step = step.selection.batch.step  # its large batch is read again
        self.coreset_selector.load_state_dict({**self.coreset_selector.state_dict(), **self._before["selector"]})
        restore_random_state(self._before["random_state"])
        self._batches = self._read()
        self.open_step = None
        self._contexts.close()

    def _is_untouched(self) -> bool:
        """Return whether a loop has a first micro-batch in hand that no forward was made of, as after `break`."""
        step = self.open_step
        return step is not None and not step.place and not step.is_done and step.loss is None

    def gradient_accumulation_steps(self) -> int:
        """Return the micro-batches of a coreset in a loop over the loader, on every rank."""
        per_rank = math.ceil(self.config.coreset_size / self._world_size)
        return math.ceil(per_rank / self.config.micro_batch_size)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether a loop over the loader is at the last micro-batch of a coreset, or after it."""
        return self.open_step is None or self.open_step.is_last

    def train_batch(self, batch: LargeBatch | None = None) -> StepStats:
        """Take one optimizer step on the coreset of a large batch.

        Args:
            batch: this rank's view of the large batch; default: the loader's next.

        Raises:
            SelectionError: if no example of the batch has a finite signal.
            DeviceMemoryError: if memory runs out, with the phase and advice.
            DivergenceError: if the gradient was not finite in the last `colm.max_skipped_steps` steps.
            LoopError: after an error in an earlier step, whose choice and gradient are half done.
        """
        self._check_whole("train_batch")
        self._close_step("train_batch")
        self.skipped.check(self.step_count)
        self.monitor.open()
        with self.watchdog.watching(f"step {self.step_count + 1}"):  # covers the time between its phases
            start = time.perf_counter()
            batch = batch if batch is not None else self._next_batch()
            data_s = time.perf_counter() - start
            with self._breaking_off(batch.step), self._naming_what_ran_out(batch):
                return self._train_batch(batch, start, data_s)

    def _next_batch(self) -> LargeBatch:
        """Read the next large batch; if that fails, the next call reads it again, but for several ranks."""
        next_step = self.loader.next_step
        try:
            with self.watchdog.watching(f"reading the batch of step {self.step_count + 1}"):
                batch = next(self._batches)
            if self._limits is not None:
                self._limits.check(batch.examples.values())
        except BaseException:
            self.loader.next_step = next_step
            self._batches = self._read()
            if self._world_size > 1:  # the others are in this step
                self._broken_off = next_step
            raise
        return batch

    @contextmanager
    def _breaking_off(self, step: int) -> Iterator[None]:
        """Remember that an error ended a step whose choice or gradient is half done: the next one would go by it."""
        count = self.step_count
        try:
            yield
        except (LoopError, SelectionError):
            raise  # before anything was changed
        except BaseException:
            if self.step_count == count:
                self._broken_off = step
            raise

    def _check_whole(self, what: str) -> None:
        if self._broken_off is not None:
            raise LoopError(
                f"{what}: an error broke off step {self._broken_off}, and what was done of its choice and gradient is "
                "still held. Make the engine again, and load its last checkpoint."
            )

    @contextmanager
    def _naming_what_ran_out(self, batch: LargeBatch) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise memory_error(error, batch, self.memory, self._rank) from error

    def _train_batch(self, batch: LargeBatch, start: float, data_s: float) -> StepStats:
        inner = self.deepspeed_engine
        inner.train()
        with self._measuring(batch) as meter:
            selection = self._select(batch, meter)
            variance = self._gradient_variance(selection)
            lr = float(inner.get_lr()[0])
            update = self._update(selection, meter)
        time_s = {"data": data_s, **self.memory.seconds(), "total": time.perf_counter() - start}
        return self._record(selection, update, variance, lr, time_s)

    def _measuring(self, batch: LargeBatch) -> AbstractContextManager[Meter]:
        inner = self.deepspeed_engine
        return self.memory.step(batch.step, partial(self._watching, batch.step), inner.module, inner.optimizer)

    def _select(self, batch: LargeBatch, meter: Meter) -> Selection:
        selection = self.coreset_selector(batch, meter)
        if selection.size == 0:
            raise SelectionError(
                f"step {batch.step}: none of the {batch.size} examples has a finite signal. "
                "The model has diverged: resume from an earlier checkpoint with a lower learning rate."
            )
        self.memory.note_selected(self.coreset_selector.kept_tensors(), selection.replay)
        return selection

    def _gradient_variance(self, selection: Selection) -> dict[str, float] | None:
        """Measure the variance in the steps that are due."""
        every, step = self.config.colm.variance_every, selection.batch.step
        if not every or step % every:
            return None
        with self._watching(step, "variance"):
            return self.coreset_selector.gradient_variance(selection)

    def _update(self, selection: Selection, meter: Meter, passed: _Passed | None = None) -> _Update:
        """Place the coreset, accumulate its gradient, take the optimizer's step, and read its results.

        A loss that is not finite spoils the sum of all gradients. The optimizer then skips, and the other examples are
        passed through again. In a packed row it spoils its neighbours' losses too, so first all are passed unpacked.

        Args:
            selection: the choice.
            meter: measures the phases.
            passed: the passes of a loop over the loader, whose step is to be taken.
        """
        inner, batch, positions = self.deepspeed_engine, selection.batch, selection.positions.tolist()
        broken: list[int] = []
        token_bytes, replay, packing = 0, selection.replay, self.packing
        lr_kwargs: dict[str, Any] | None = None
        while True:
            kept = [position for position in positions if position not in broken]
            if passed is not None:
                placement, done, lr_kwargs = passed.placement, passed.done, passed.lr_kwargs
                token_bytes, passed = passed.token_bytes, None
                selection = replace(selection, replay=None)  # a second pass places examples elsewhere
            else:
                with meter.phase("train"):
                    with self._exchange.counting("tokens") as count:
                        placement = self._place(selection, kept, packing)
                    token_bytes += count.num_bytes
                    scale = loss_scale(batch, selection.coreset, self.config.colm.loss_normalization, broken)
                    done = accumulate(
                        inner,
                        self.loss_head,
                        placement,
                        scale,
                        selection.replay,
                        rank=self._rank,
                        device=self._device,
                        part=meter.part,
                        sketch=self.coreset_selector.training_sketch,
                    )
            self.memory.note_trained(inner.module, inner.optimizer, replay)
            with meter.phase("step"):
                inner.step(lr_kwargs)
            numbers = read_step(done, batch, kept, inner.get_global_grad_norm(), self._exchange)
            skipped = not inner.was_step_applied()
            if numbers.num_broken > 0 and skipped and packing is not None:
                packing = None
                continue
            if numbers.num_broken > 0:
                broken += broken_positions(done, batch, self._exchange)
            if numbers.num_broken == 0 or not skipped or len(broken) == len(positions):
                if len(broken) == len(positions):
                    numbers = replace(numbers, loss=None)
                cosine = None
                if numbers.sketches is not None:
                    cosine = self.coreset_selector.note_sketches(batch, kept, numbers.sketches)
                return _Update(placement, token_bytes, numbers, skipped, sorted(broken), cosine)

    def _place(self, selection: Selection, positions: Sequence[int], packing: Packing | None) -> Placement:
        return assign_and_move(
            selection.batch,
            positions,
            selection.replay,
            self._exchange,
            self._rank,
            max_examples=self.config.micro_batch_size,
            max_tokens=self.config.colm.micro_batch_tokens,
            packing=packing,
        )

    def _record(
        self,
        selection: Selection,
        update: _Update,
        variance: dict[str, float] | None,
        lr: float,
        time_s: dict[str, float],
    ) -> StepStats:
        """Count the step and report it to the monitors."""
        batch, placement = selection.batch, update.placement
        self.coreset_selector.note_losses(
            batch, [p for p in selection.positions.tolist() if p not in update.broken], update.numbers.losses
        )
        self.step_count += 1
        self.skipped.note(update.skipped)
        trained = [] if update.skipped else [p for p in selection.positions.tolist() if p not in update.broken]
        self.num_samples += len(trained)
        self.data_use.note(batch.size, batch.indices[trained])
        stats = StepStats(
            step=batch.step,
            loss=update.numbers.loss,
            lr=lr,
            grad_norm=update.numbers.grad_norm,
            skipped=update.skipped,
            tokens=int(batch.lengths[selection.positions].sum()),
            samples=self.num_samples,
            data_use=self.data_use.as_dict(),
            examples_probed=len(selection.probed),
            examples_trained=selection.size - len(update.broken),
            padding_fraction=placement.padding_fraction,
            micro_batches={"count": len(placement.plans[0]), "largest_tokens": placement.largest_tokens},
            exchange_bytes={
                "signals": selection.num_bytes["signals"] + update.numbers.sketch_bytes,
                "selection": selection.num_bytes["selection"],
                "tokens": update.token_bytes,
            },
            selected=selection.ran,
            time_s=time_s,
            **self.memory.stats(),
            coreset=describe_coreset(
                batch,
                selection.coreset,
                self._source_names,
                losses=update.numbers.losses,
                broken=update.broken,
                variance=variance,
                stored=_with_cosine(selection.stored, update.cosine),
            ),
        )
        self.memory.save = None
        self.last_stats = stats
        if self.monitor.enabled:
            self.monitor.write_events(events(stats.as_dict(), stats.samples))
        return stats

    def set_sources(self, names: Sequence[str], ids: Any) -> None:
        """Divide the dataset into other sources from the next batch on; checkpoints store them.

        All ranks call it with the same arguments. Histories of the selection are kept.

        Args:
            names: names of the sources.
            ids: source id of every example of the dataset, `[n]`.
        """
        self._close_step("set_sources")
        self._choose_by(names, ids)
        self.loader.set_sources(names, ids, self.coreset_selector.small)
        self._batches = self._read()

    def _read(self) -> Iterator[LargeBatch]:
        """Yield large batches from the loader's next step on, chosen ahead if no pass of the model is needed.

        Batches read and chosen ahead by an earlier iterator are discarded with it.
        """
        if not self.coreset_selector.chooses_ahead:
            yield from self.loader
            return
        every = self.config.colm.variance_every
        yield from ChooseAhead(
            self.loader,
            self.coreset_selector.chooser(self.loader.dataset),
            self._exchange,
            self._rank,
            size=self.config.coreset_size,
            carry=self.coreset_selector.carry,
            reads_all=lambda step: every > 0 and step % every == 0,
        )

    def _choose_by(self, names: Sequence[str], ids: Any) -> None:
        self._source_names = list(names)
        counts = np.bincount(ids, minlength=len(names)).tolist()
        self.coreset_selector.set_sources(dict(zip(names, counts, strict=True)))

    def train_batch_size(self) -> int:
        """Return b, the examples trained on in a step."""
        return self.config.coreset_size

    def state_dict(self) -> dict[str, Any]:
        """Return counts, data position and selection history, without DeepSpeed's state; complete on rank 0."""
        state = {
            "step_count": self.step_count,
            "num_samples": self.num_samples,
            "data_use": self.data_use.state_dict(),
            "skipped": self.skipped.state_dict(),
            "selector": self.coreset_selector.state_dict(),
            **self.loader.state_dict(),
        }
        if self.open_step is not None and self._is_untouched():  # that step will be begun once more
            state["selector"] |= self._before["selector"]
            state["next_step"] = self.open_step.selection.batch.step
        return state

    def random_state(self) -> dict[str, Any]:
        """Return the state of this process's random generators that goes with `state_dict`."""
        return self._before["random_state"] if self._is_untouched() else random_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; every rank is given rank 0's."""
        self._close_step("load_state_dict")
        self.step_count, self.num_samples = state["step_count"], state["num_samples"]
        self.skipped.load_state_dict(state["skipped"])
        if "data_use" in state:
            self.data_use.load_state_dict(state["data_use"])
        else:  # version 0.1.0 did not record which rows it trained on
            self.data_use.seen = self.step_count * self.config.colm.large_batch_size
            self.data_use.trained = self.num_samples
        if state["sources"]:
            self._choose_by(state["sources"]["names"], state["sources"]["ids"].numpy())
        elif self.loader.restore_sources():  # later sources than the checkpoint's
            self._choose_by(self.loader.dataset.source_names, self.loader.dataset.source_ids)
        self.coreset_selector.load_state_dict(state["selector"])
        self.loader.load_state_dict({"kept_sources": self.coreset_selector.small, **state})
        self._batches = self._read()
        self.monitor.resume(self.num_samples)

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = True,
        *,
        keep_last: int | None = None,
    ) -> bool:
        """Write model, optimizer, scheduler, selector history, data position, counts and every rank's random state.

        The checkpoint is written aside, read back and only then renamed: see `colm_ds.checkpoints.atomic`. After a
        resume from an older checkpoint of the folder, those of later steps are removed then.

        Args:
            save_dir: folder of the run's checkpoints.
            tag: name of the checkpoint, a folder's name or a number; default: by step.
            client_state: the caller's own state, returned by `load_checkpoint`; rank 0's is kept.
            save_latest: name it in the file `latest`, which DeepSpeed's own loading reads and ours does not.
            exclude_frozen_parameters: leave out weights that are not trained, which the model is loaded with anyway.
            keep_last: delete all but this many of the newest checkpoints, and those of later steps in any case.

        Raises:
            CheckpointError: on every rank, if any could not write, or for a tag that names no folder; earlier
                checkpoints are untouched.
        """
        if self.open_step is not None and not self._is_untouched():
            raise LoopError(
                f"engine.save_checkpoint: a loop over the loader is at {self.open_step.name}, whose gradients no "
                "checkpoint holds. Save after its engine.step(): where engine.is_gradient_accumulation_boundary()."
            )
        self._check_whole("save_checkpoint")
        tag = f"step_{self.step_count}" if tag in (None, "") else str(tag)
        check_tag(tag)
        without_base = without_quantized_state(self.deepspeed_engine.module)
        watching = self.watchdog.watching(f"saving the checkpoint of step {self.step_count}")
        with watching, self.memory.saving(), without_base:
            save_engine(
                self,
                Path(save_dir),
                tag,
                client_state or {},
                keep_last=keep_last,
                save_latest=save_latest,
                exclude_frozen=exclude_frozen_parameters,
            )
        return True

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any]]:
        """Restore everything that `save_checkpoint` wrote, also with another number of ranks.

        Args:
            load_dir: folder of the run's checkpoints.
            tag: name of the checkpoint; default: the newest whole one (see `checkpoints.atomic.find`).
            kwargs: further arguments of DeepSpeed's `load_checkpoint`.

        Returns:
            The loaded path and the client state; None and an empty state if there is no checkpoint.

        Raises:
            CheckpointError: if no checkpoint is whole, or it does not fit the model, or its place in the data is of
                another order.
        """
        with self.watchdog.watching(f"finding a checkpoint in {load_dir}"):
            checkpoint = find_on_all_ranks(Path(load_dir), None if tag in (None, "") else str(tag))
        if checkpoint is None:
            self.monitor.resume(self.num_samples)
            return None, {}
        if not kwargs.get("load_module_only"):
            check_order(self, checkpoint)
        return str(checkpoint.path), self.resume(checkpoint, **kwargs)

    def resume(self, checkpoint: Checkpoint, **kwargs: Any) -> dict[str, Any]:
        """Restore everything from a checkpoint known to be whole, without checking its bytes again.

        Args:
            checkpoint: from `find_on_all_ranks`, the same on every rank.
            kwargs: further arguments of DeepSpeed's `load_checkpoint`.

        Returns:
            The client state.

        Raises:
            CheckpointError: if it does not fit the model.
        """
        self._close_step("load_checkpoint")
        with self.watchdog.watching(f"loading the checkpoint {checkpoint.path}"):
            client_state = load_engine(self, checkpoint, **kwargs)
        if not kwargs.get("load_module_only"):  # else this is a new run, to which later checkpoints are nothing
            self.resumed_in = checkpoint.path.parent
        return client_state

    def _watching(self, step: int, phase: str) -> AbstractContextManager[None]:
        return self.watchdog.watching(f"phase {phase!r} of step {step}")


@dataclass(frozen=True)
class _Passed:
    """The passes of a loop over a coreset's micro-batches.

    Attributes:
        placement: assignment of examples to ranks.
        token_bytes: payload of moving their tokens.
        done: results of the passes.
        lr_kwargs: arguments of the learning-rate scheduler.
    """

    placement: Placement
    token_bytes: int
    done: Accumulated
    lr_kwargs: dict[str, Any] | None


@dataclass(frozen=True)
class _Update:
    """Results of training on one coreset.

    Attributes:
        placement: assignment of examples to ranks.
        token_bytes: payload of moving their tokens.
        numbers: loss and losses, gradient norm before clipping; the loss is None if no example has a finite one.
        skipped: whether the gradient was not finite, so that nothing changed.
        broken: positions left out because their loss was not finite.
        cosine: of replaced sketches with new ones, see `SketchStore.note`.
    """

    placement: Placement
    token_bytes: int
    numbers: StepNumbers
    skipped: bool
    broken: list[int]
    cosine: float | None = None


def _with_cosine(stored: dict[str, float] | None, cosine: float | None) -> dict[str, float] | None:
    return stored if stored is None or cosine is None else {**stored, "cosine": cosine}
