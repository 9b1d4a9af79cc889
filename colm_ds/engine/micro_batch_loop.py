"""The usual DeepSpeed loop over coresets: a loader of micro-batches, and the step that is spread over its iterations.

for batch in loader:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from colm_ds.batching.assign import by_rank, equal_ranks, equal_slots
from colm_ds.batching.collate import IGNORE_INDEX, pad_batch
from colm_ds.batching.loader import LargeBatchLoader
from colm_ds.batching.micro_batch import PLACE_HOLDER, MicroBatch, make_micro_batch
from colm_ds.batching.move import move_examples, moves_of
from colm_ds.config.resolve import ResolvedConfig
from colm_ds.engine.accumulation import Accumulated, Placement
from colm_ds.engine.arguments import TEXT
from colm_ds.engine.coreset_selector import Selection
from colm_ds.engine.out_of_memory import of_micro_batch
from colm_ds.errors import ConfigError, LoopError
from colm_ds.memory.meter import Meter
from colm_ds.models.example_loss import example_loss_sums
from colm_ds.probe.training_sketch import PassedMicroBatch, TrainingSketch
from colm_ds.selection import Exchange
from colm_ds.selection.transfer import to_device
from colm_ds.types import Example

LOOP = "for batch in loader: loss = engine(**batch).loss; engine.backward(loss); engine.step()"

_SWITCHES = {"use_cache": (None, False), "return_dict": (None, True)}
"""Further arguments of a forward, and the values that change nothing."""

Collate = Callable[[list[Any]], MutableMapping[str, Any]]


@dataclass
class CoresetOutput(ModelOutput):
    """Output of a forward of one micro-batch of a coreset.

    Attributes:
        loss: this rank's part of the step's loss, times ranks and micro-batches: its mean over the micro-batches of all
            ranks is the step's loss, as everywhere under DeepSpeed. 0 for a micro-batch without examples.
    """

    loss: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Raise: only the losses of labelled positions are computed."""
        raise LoopError(
            "outputs.logits: not computed for a micro-batch of a coreset, only the losses at its labels. For logits "
            "call engine.module(**batch) under torch.no_grad()."
        )


@dataclass(frozen=True)
class HandedOut:
    """Copies of a micro-batch's text, to compare with what a script gives the engine.

    Attributes:
        input_ids: `[n, length]`.
        labels: of the same shape.
        is_real: False at padding; all True where there is no mask.
    """

    input_ids: Tensor
    labels: Tensor
    is_real: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> HandedOut:
        """Copy what a loop may change in place."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        is_real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return cls(ids.clone(), batch["labels"].clone(), is_real)

    def differs(self, input_ids: Tensor, labels: Any, device: torch.device) -> Tensor:
        """Return whether token ids, or labels that count, are others, bool `[2]` on the device.

        Labels count at real positions from the second on; none given are no others.
        """
        ids = (input_ids.to(device) != self.input_ids.to(device)).any()
        if labels is None:
            return torch.stack([ids, torch.zeros_like(ids)])
        if not isinstance(labels, Tensor) or labels.shape != self.labels.shape:
            return torch.stack([ids, torch.ones_like(ids)])
        others = (labels.to(device) != self.labels.to(device)) & self.is_real.to(device)
        return torch.stack([ids, others[:, 1:].any()])


class OpenStep:
    """An optimizer step whose micro-batches are handed out one by one.

    Attributes:
        selection: the choice.
        placement: examples and micro-batches of the ranks, as many on each.
        place: index of the current micro-batch.
        is_given: whether the loader has handed it out.
        is_done: whether its backward pass was made.
        text: its `input_ids`, `labels` and `attention_mask` (if there is one) as handed out; None before.
        loss: its loss, after its forward.
        token_bytes: payload of moving tokens.
        variance: from `CoresetSelector.gradient_variance`, in steps that are due.
        meter: measures the phases.
        start: when the step began, on the host's clock.
        data_s: seconds of reading the large batch.
    """

    def __init__(
        self,
        engine: Any,
        head: nn.Module | None,
        selection: Selection,
        placement: Placement,
        *,
        num_replayed: int,
        scale: Tensor,
        rank: int,
        token_bytes: int,
        variance: dict[str, float] | None,
        meter: Meter,
        start: float,
        data_s: float,
        sketch: TrainingSketch | None = None,
    ) -> None:
        """Begin with the first micro-batch.

        Args:
            engine: the DeepSpeed engine.
            head: from `find_loss_head`.
            selection: the choice.
            placement: from `place_equally`.
            num_replayed: the first micro-batches, which start from the probe's hidden states.
            scale: from `loss_scale`, `[r]`.
            rank: this rank.
            token_bytes: payload of moving tokens.
            variance: as the attribute.
            meter: measures the phases.
            start: when the step began.
            data_s: seconds of reading the large batch.
            sketch: sketches every example's gradient on the way, if given.
        """
        self.selection, self.placement = selection, placement
        self.token_bytes, self.variance = token_bytes, variance
        self.meter, self.start, self.data_s = meter, start, data_s
        self.place = 0
        self.is_given = self.is_done = False
        self.text: HandedOut | None = None
        self.loss: Tensor | None = None
        self._engine, self._head, self._scale, self._rank = engine, head, scale, rank
        self._num_replayed = num_replayed
        self._device = torch.device(engine.device)
        self._replaying = ExitStack()
        self._micro: MicroBatch | None = None
        self._sketch = sketch
        self._passed_by: PassedMicroBatch | None = None
        if sketch is not None:
            sketch.begin()
        self._sums: list[Tensor] = []  # summed token losses of the examples, by micro-batch
        self._totals: list[Tensor] = []  # weighted sum of the finite ones, by micro-batch
        self._differs: list[Tensor] = []  # whether other token ids came in, or other labels, by micro-batch, bool [2]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of every rank."""
        return len(self.placement.plans[0])

    @property
    def is_last(self) -> bool:
        """True at the step's last micro-batch."""
        return self.place == self.num_micro_batches - 1

    @property
    def name(self) -> str:
        """The current micro-batch in words, for messages."""
        return f"micro-batch {self.place + 1} of {self.num_micro_batches} of step {self.selection.batch.step}"

    def advance(self) -> None:
        """Move to the next micro-batch."""
        self.place += 1
        self.is_given = self.is_done = False
        self.text = self.loss = None

    def examples(self) -> list[Example]:
        """Return this rank's examples of the current micro-batch; none for a placeholder."""
        return [self.placement.examples[position] for position in self._mine()]

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a forward is the current micro-batch's.

        It is if gradients are enabled, there was no backward pass yet, and the token ids have the shape of those handed
        out. Their values, and labels', are compared on the device, and that is read when the step is taken.
        """
        if not self.is_given or self.is_done or not torch.is_grad_enabled():
            return False
        given = _input_ids(args, kwargs)
        assert self.text is not None
        return isinstance(given, Tensor) and given.shape == self.text.input_ids.shape

    def forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CoresetOutput:
        """Compute the loss of the current micro-batch, from its examples; again if it was computed before.

        Args:
            args: arguments of the script's call, `input_ids` first.
            kwargs: its arguments by name.

        Raises:
            LoopError: if one of them would change the computation.
        """
        others = [key for key, value in kwargs.items() if key not in TEXT and value not in _SWITCHES.get(key, (None,))]
        others += [f"argument {place + 1} (write attention_mask=...)" for place in range(1, len(args))]
        if others:
            raise LoopError(
                f"{self.name}: the model is given {', '.join(others)}. Examples are probed and trained on by their "
                "input_ids and labels alone. Leave that out of the call."
            )
        assert self.text is not None
        self._replaying.close()
        mine = self._mine()
        labels = kwargs.get("labels") if mine else None  # a placeholder has none
        differs = self.text.differs(_input_ids(args, kwargs), labels, self._device)
        self._micro = micro = make_micro_batch(self.examples()).to(self._device)
        scales = torch.zeros(len(micro.counts))
        scales[: len(mine)] = self._scale[mine]
        scales = to_device(scales, self._device)
        replay = self.selection.replay
        if replay is not None and self.place < self._num_replayed:
            self._replaying.enter_context(replay.replaying(micro.by_row(mine)))
        self._passed_by = None if self._sketch is None else self._sketch.of(micro, len(mine))
        with self.meter.phase("train"), of_micro_batch(micro), self.meter.part("forward"), self._watching():
            sums = example_loss_sums(self._engine, self._head, micro)
        if self._passed_by is not None:
            self._passed_by.watch_losses(sums)
        self.loss = (sums * scales).sum() * (len(self.placement.plans) * self.num_micro_batches)
        sums = sums.detach()
        for kept, value in (
            (self._sums, sums[: len(mine)]),
            (self._totals, torch.where(torch.isfinite(sums), sums * scales, 0.0).sum().double()),
            (self._differs, differs),
        ):
            kept[self.place :] = [value]
        return CoresetOutput(loss=self.loss)

    def backward(self, loss: Tensor, retain_graph: bool) -> Tensor:
        """Run the backward pass of the current micro-batch's loss.

        Raises:
            LoopError: if it was made before, or `loss` is another tensor.
        """
        if self.is_done:
            raise LoopError(f"{self.name}: engine.backward was called twice. Write {LOOP}.")
        if self.loss is None or loss is not self.loss:
            raise LoopError(
                f"{self.name}: engine.backward is given another tensor than the loss that the engine returned for this "
                f"micro-batch. Write {LOOP}, with the batches of the loader that colm_ds.initialize returned and their "
                "loss as it is: it is weighted, and divided by the accumulation steps in engine.backward."
            )
        assert self._micro is not None
        part: Tensor = loss / self.num_micro_batches
        with self.meter.phase("train"), of_micro_batch(self._micro), self.meter.part("backward"), self._watching():
            self._engine.backward(part, retain_graph=retain_graph, scale_wrt_gas=False)
        if self._passed_by is not None:
            self._passed_by.finish()
        self._replaying.close()
        self.is_done, self._micro = True, None
        return part.detach()

    def accumulated(self) -> tuple[Accumulated, Tensor]:
        """Return the results of all passes, and whether token ids or labels were others than handed out, bool `[2]`."""
        losses = torch.cat(self._sums)
        whole = torch.isfinite(losses)
        positions = [position for mine in self.placement.plans[self._rank] for position in mine]
        totals = torch.stack([torch.stack(self._totals).sum(), (~whole).sum().double()])
        sketches = None if self._sketch is None else self._sketch.sketches()
        done = Accumulated(totals, whole, torch.where(whole, losses, 0.0), positions, sketches)
        return done, torch.stack(self._differs).any(dim=0)

    def close(self) -> None:
        """Take the replay off the model, if a micro-batch was left before its backward pass."""
        self._replaying.close()

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._passed_by is None else self._passed_by.hooked()

    def _mine(self) -> list[int]:
        return self.placement.plans[self._rank][self.place]


def _input_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("input_ids", args[0] if args else None)


def place_equally(
    selection: Selection, exchange: Exchange, rank: int, *, num_micro_batches: int, max_examples: int
) -> tuple[Placement, int]:
    """Spread a coreset over the ranks in equal numbers, and cut it into the same number of micro-batches on each.

    All ranks call it together.

    Args:
        selection: the choice, at most `num_micro_batches * max_examples` examples for each rank.
        exchange: the ranks.
        rank: this rank.
        num_micro_batches: micro-batches of each rank; those without examples are placeholders.
        max_examples: maximum examples of a micro-batch.

    Returns:
        The placement, and how many of the first micro-batches are replayed: on every rank they hold examples that stay
        where they were probed.
    """
    batch, positions, replay = selection.batch, selection.positions.tolist(), selection.replay
    ranks = equal_ranks(positions, batch.lengths, batch.home, exchange.num_processes)
    held = by_rank(positions, [ranks[p] for p in positions], exchange.num_processes)
    home = torch.full_like(batch.home, -1) if replay is None else batch.home
    plans, num_replayed = equal_slots(held, home, batch.lengths, num_slots=num_micro_batches, max_examples=max_examples)
    if replay is not None:
        replay.keep([position for mine in plans[rank][:num_replayed] for position in mine])
    arrived = move_examples(batch, moves_of(ranks, batch.home), rank, exchange)
    lengths = batch.lengths.tolist()
    sizes = [len(micro) * max(lengths[p] for p in micro) for plan in plans for micro in plan if micro]
    padding = 1.0 - sum(lengths[p] for p in positions) / sum(sizes)
    return Placement({**batch.examples, **arrived}, plans, padding, max(sizes)), num_replayed


class Steps(Protocol):
    """The part of a `CoLMEngine` that a loader of micro-batches needs."""

    config: ResolvedConfig
    loader: LargeBatchLoader
    open_step: OpenStep | None

    def next_micro_batch(self) -> OpenStep: ...

    def gradient_accumulation_steps(self) -> int: ...


class MicroBatchLoader:
    """Micro-batches of the coresets of one epoch, the same number of every step and on every rank.

    An iteration ends with the epoch; the next one begins the next epoch, and after `load_checkpoint` it yields the rest
    of the epoch that the checkpoint is from. A micro-batch that was handed out but not trained on is handed out again.
    Batches are on the CPU: `input_ids`, `labels` and `attention_mask`, right-padded, or whatever `collate_fn` makes of
    the examples' records.
    """

    def __init__(
        self, engine: Steps, record: Callable[[int], Any] | None, collate_fn: Collate | None, pad_token_id: int
    ) -> None:
        """Iterate over an engine's steps.

        Args:
            engine: the engine.
            record: returns the record of an example of the dataset, for `collate_fn`.
            collate_fn: makes a batch of records, or None.
            pad_token_id: token id to pad `input_ids` with where there is no `collate_fn`.
        """
        self._engine = engine
        self._record = record
        self._collate = collate_fn
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Return the micro-batches of an epoch on every rank."""
        return self._engine.loader.steps_per_epoch * self._engine.gradient_accumulation_steps()

    def __iter__(self) -> Iterator[MutableMapping[str, Any]]:
        """Yield the micro-batches up to the epoch's end.

        Raises:
            ConfigError: if coresets cannot be cut into the same number of micro-batches.
            LoopError: if the last micro-batch was not trained on, or the last step not taken.
        """
        engine = self._engine
        if engine.config.colm.micro_batch_tokens is not None:
            raise ConfigError(
                f"colm.micro_batch_tokens = {engine.config.colm.micro_batch_tokens}: coresets have a varying number of "
                "micro-batches with it, a loop over the loader the same in every step. Remove it, or call "
                "engine.train_batch()."
            )
        if getattr(engine.loader.dataset, "candidates", None) is not None:
            raise ConfigError("training_data: rows of classification examples are no batch. Call engine.train_batch().")
        loader = engine.loader
        epoch = loader.epoch(loader.next_step if engine.open_step is None else engine.open_step.selection.batch.step)
        while engine.open_step is not None or loader.epoch(loader.next_step) == epoch:
            step = engine.next_micro_batch()
            batch = self._batch(step.examples())
            step.text, step.is_given = HandedOut.of(batch), True
            yield batch
            if not step.is_done:
                raise LoopError(
                    f"{step.name}: the next one was asked for before its backward pass. Write {LOOP}. To look at the "
                    "data, iterate over the dataset."
                )

    def _batch(self, examples: Sequence[Any]) -> MutableMapping[str, Any]:
        if self._collate is not None and self._record is not None:
            batch = self._collate([self._record(e.index) for e in examples] or [self._record(0)])
            if not examples:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            return batch
        padded = pad_batch(list(examples) or [PLACE_HOLDER], self._pad_token_id)
        labels = padded["labels"] if examples else torch.full_like(padded["labels"], IGNORE_INDEX)
        mask = (torch.arange(labels.shape[1]) < padded["lengths"][:, None]).long()
        return {"input_ids": padded["input_ids"], "labels": labels, "attention_mask": mask}
