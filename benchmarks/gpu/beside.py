"""An engine that makes the choice of step t + 1 beside the training of step t, to measure what that hides.

Signals of step t + 1 are read before step t's update, so they are those of weights one step old, and no hidden state
of theirs can be replayed. One process, and estimators that probe the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from colm_ds.config.colm import ScheduleConfig
from colm_ds.engine.coreset_selector import Selection
from colm_ds.engine.engine import CoLMEngine
from colm_ds.errors import ConfigError, SelectionError
from colm_ds.memory.breakdown import tensors_of
from colm_ds.memory.meter import Meter
from colm_ds.types import LargeBatch


class ChoosingBeside(CoLMEngine):
    """Choose in a thread, and on a GPU on a stream of its own, while the coreset before is trained on.

    `probe` then is the probe of the next large batch, `select` what is left to wait for of the choice; the thread's
    seconds are in no phase, its memory is in training's. For runs of `train_batch()` alone, without checkpoints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare as `CoLMEngine`.

        Raises:
            ConfigError: if the choice needs no probe, is one of several processes, or hidden states are to be replayed.
        """
        super().__init__(*args, **kwargs)
        config = self.config.colm
        always = config.schedule == ScheduleConfig()
        if self._world_size > 1 or not config.probes_model or config.replay != "off" or not always:
            raise ConfigError("a choice beside training: for one process, a probe in every step and replay: off.")
        self._thread = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ahead: Future[Selection] | None = None
        self._following: LargeBatch | None = None

    def _next_batch(self) -> LargeBatch:
        if self._following is None:
            return super()._next_batch()
        batch, self._following = self._following, None
        self.loader.next_step = batch.step + 1
        return batch

    def _select(self, batch: LargeBatch, meter: Meter) -> Selection:
        ahead, self._ahead = self._ahead, None  # an error may not leave it for another step
        if ahead is None:
            selection = super()._select(batch, meter)
        else:
            with meter.phase("exchange"):
                pass  # is in the thread
            with meter.phase("select"):
                selection = ahead.result()
        selector = self.coreset_selector
        if selection.batch.step != batch.step or selection.size == 0:
            raise SelectionError(f"step {batch.step}: chosen beside training were {selection.size} of another batch.")
        if selection.coreset.carry is not None:
            selector.carry = selection.coreset.carry
        self.memory.note_selected(selector.kept_tensors(), None)
        self._following = self.loader.batch(batch.step + 1)
        self._ahead = self._start(self._observe(self._following, meter))
        return selection

    def _start(self, choose: Callable[[], Selection]) -> Future[Selection]:
        """Begin a choice."""
        return self._thread.submit(choose)

    def _observe(self, batch: LargeBatch, meter: Meter) -> Callable[[], Selection]:
        """Probe a large batch; return the function that chooses from it, for another thread."""
        selector = self.coreset_selector
        selector.step_count = batch.step
        assert selector._estimator is not None
        observed = selector._observe(selector._with_histories(batch), selector._estimator, meter)
        stream = self._stream
        held = list(tensors_of(observed.estimator))  # training must not be given their memory before they are read
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))

        def choose() -> Selection:
            try:
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    return selector._choose(observed, _Unmeasured(self._device))
            finally:
                if stream is not None:
                    stream.synchronize()
                held.clear()

        return choose


class ChoosingBefore(ChoosingBeside):
    """Do the same work with the choice before training and not beside it: what `ChoosingBeside` is compared with."""

    def _start(self, choose: Callable[[], Selection]) -> Future[Selection]:
        done: Future[Selection] = Future()
        done.set_result(choose())
        return done


class _Unmeasured(Meter):
    """Measures nothing: counters of peaks are those of the process, and training's phases are being measured."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the block."""
        yield
