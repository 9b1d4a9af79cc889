"""Pass examples of a large batch through the model for their signals, each rank its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from colm_ds.batching.assign import by_rank, micro_batches
from colm_ds.batching.micro_batch import make_micro_batch, with_fewer_labels
from colm_ds.config.colm import CoLMSection
from colm_ds.engine.out_of_memory import of_micro_batch
from colm_ds.models.architecture import Architecture
from colm_ds.models.patch import eval_mode
from colm_ds.probe.estimators import Estimator, Observer
from colm_ds.probe.parameters import reading_parameters
from colm_ds.probe.replay import ReplayStore
from colm_ds.probe.tail import run_trunk
from colm_ds.randomness import private_generator
from colm_ds.types import LargeBatch


class ProbePass:
    """The passes of a step's probe; all ranks call it together."""

    def __init__(
        self,
        model: nn.Module,
        config: CoLMSection,
        architecture: Architecture | None,
        *,
        device: torch.device,
        rank: int,
        num_ranks: int,
        equal_counts: bool,
    ) -> None:
        """Prepare for a model.

        Args:
            model: the module that a forward calls.
            config: the `"colm"` section.
            architecture: parts of the model; None: `run` is not called.
            device: device of the model.
            rank: this rank.
            num_ranks: W.
            equal_counts: give every rank the same number of forwards.
        """
        self._model = model
        self._config = config
        self._architecture = architecture
        self._device = device
        self._rank = rank
        self._num_ranks = num_ranks
        self._equal_counts = equal_counts
        self._trunk_dtype = torch.bfloat16 if config.probe.dtype == "bfloat16" else None

    def run(
        self,
        batch: LargeBatch,
        size: int,
        probed: Tensor,
        estimator: Estimator,
        store: ReplayStore | None,
        parts: Tensor | None,
        *,
        samples_tokens: bool,
    ) -> Tensor | None:
        """Run the trunk and the tail over the examples whose signal is needed; with replay the trunk over all.

        Args:
            batch: the large batch, with target examples at positions from `size` on, which are probed with all of their
                labels and not replayed.
            size: r.
            probed: positions whose signal is needed, ascending int64 `[n]`.
            estimator: observes them.
            store: records hidden states for replay, or None.
            parts: factor of each example's signal, `[r]`, or None.
            samples_tokens: whether the probe uses `probe.token_sample` of each example's labels.

        Returns:
            The probed weights, if the mask needs them, float32 `[d]`.
        """
        is_probed = torch.zeros(batch.size, dtype=torch.bool)
        is_probed[probed] = True
        offsets = self._token_offsets(batch) if samples_tokens else None
        is_target = torch.arange(batch.size) >= size
        if batch.size > size:
            probed = torch.cat([probed, is_target.nonzero().flatten()])
            parts = None if parts is None else torch.cat([parts, torch.ones(batch.size - size)])
        with eval_mode(self._model), torch.no_grad(), self._reading_weights() as weights:
            counted = (is_probed | is_target) & (batch.home == self._rank)
            estimator.begin(batch.step, probed, int(counted.sum()), parts)
            for positions in self.plan(batch, is_probed):
                self._pass(batch, positions, estimator, store, offsets)
            for positions in self.plan(batch, is_target) if batch.size > size else ():
                self._pass(batch, positions, estimator, None)
            if store is not None:
                for positions in self.plan(batch, ~is_probed & ~is_target):
                    self._pass(batch, positions, None, store)
        return weights()

    def plan(self, batch: LargeBatch, wanted: Tensor, max_tokens: int | None = None) -> Sequence[Sequence[int]]:
        """Plan this rank's micro-batches of the wanted examples.

        Args:
            batch: the large batch.
            wanted: which examples, bool `[r]`.
            max_tokens: maximum padded tokens of one; default: the probe's.
        """
        places = wanted.nonzero().flatten()
        held = by_rank(places.tolist(), batch.home[places].tolist(), self._num_ranks)
        max_tokens = max_tokens or self._config.probe.resolved_max_tokens(self._device.type)
        plans = micro_batches(held, batch.padded_lengths, max_tokens=max_tokens, equal_counts=self._equal_counts)
        return plans[self._rank]

    def _token_offsets(self, batch: LargeBatch) -> Tensor | None:
        """Draw where in every example the sampled labels begin, float32 `[r]`; None: all labels are used."""
        if self._config.probe.token_sample == 1.0:
            return None
        generator = private_generator(self._config.seed, "tokens", batch.step)
        return torch.rand(batch.size, generator=generator)

    def _pass(
        self,
        batch: LargeBatch,
        positions: Sequence[int],
        estimator: Observer | None,
        store: ReplayStore | None,
        offsets: Tensor | None = None,
    ) -> None:
        assert self._architecture is not None
        micro = make_micro_batch([batch.examples[position] for position in positions])
        if offsets is not None and positions:
            micro = with_fewer_labels(micro, self._config.probe.token_sample, offsets[list(positions)])
        micro = micro.to(self._device)
        with of_micro_batch(micro):
            with store.recording(micro.by_row(positions), micro.lengths) if store is not None else nullcontext():
                tail = run_trunk(self._model, self._architecture, micro, self._trunk_dtype)
            if estimator is not None:
                lengths = micro.example_lengths[: len(positions)]
                estimator.observe(tail, torch.tensor(positions, dtype=torch.int64), lengths)

    @contextmanager
    def _reading_weights(self) -> Iterator[Callable[[], Tensor | None]]:
        """Copy the probed weights if the mask needs them; yield a function that returns them after the block."""
        if self._architecture is None or self._config.mask.criterion not in ("weight", "weight_grad"):
            yield lambda: None
            return
        with reading_parameters(self._architecture.targets) as weights:
            yield weights
