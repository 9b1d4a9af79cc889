"""Probe a large batch, exchange signals and select its coreset, for the engine and any other training loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colm_ds.batching.gather import gather_large_batch, read_examples
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.batching.resourced import WithSources
from colm_ds.batching.sources import known_counts, small_source_ids
from colm_ds.config.colm import CoLMSection
from colm_ds.config.optimizer import check_groups
from colm_ds.config.resolve import resolve_config, selection_config
from colm_ds.distributed.exchange import make_exchange
from colm_ds.engine.accumulation import loss_scale
from colm_ds.engine.adam_constants import adam_constants
from colm_ds.engine.loss_store import LossStore
from colm_ds.engine.out_of_memory import of_micro_batch
from colm_ds.engine.probe_pass import ProbePass
from colm_ds.engine.reference_losses import read_reference_losses
from colm_ds.engine.sketch_store import SketchStore
from colm_ds.engine.target_stream import TargetStream
from colm_ds.engine.token_table import mean_table, means_of, occurring_ids
from colm_ds.errors import Attempts, ConfigError, SelectionError
from colm_ds.memory.breakdown import tensors_of
from colm_ds.memory.meter import Meter
from colm_ds.models.architecture import Architecture, find_architecture
from colm_ds.models.model_fit import ModelLimits, check_causal, check_rows_fit
from colm_ds.models.quantized import check_adapters, keep_trainable
from colm_ds.probe.estimators import Estimator, multiply_by_parts
from colm_ds.probe.gradient_sketch import MAX_TOKENS, GradientSketch
from colm_ds.probe.registry import make_estimator
from colm_ds.probe.replay import ReplayStore, choose_replay
from colm_ds.probe.self_check import check_architecture
from colm_ds.probe.spsa import SpsaEstimator
from colm_ds.probe.tokens import TokensEstimator, vectors_of_model, vocabulary_size
from colm_ds.probe.training_sketch import TrainingSketch
from colm_ds.probe.variance import GradientVariance
from colm_ds.randomness import private_generator
from colm_ds.selection import (
    SINGLE_PROCESS,
    Exchange,
    SelectionSettings,
    Selector,
    SelectorContext,
    Signals,
    make_selector,
)
from colm_ds.selection.exchange import broadcast_coreset
from colm_ds.selection.sources import most_kept
from colm_ds.types import Coreset, Example, LargeBatch, NumberedExamples, SourcedDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The result of one call of a `CoresetSelector`.

    Attributes:
        batch: the large batch as this rank sees it.
        coreset: examples to train on, the same on every rank.
        ran: whether the configured selector ran; False in a plain step of the schedule.
        probed: positions that any rank passed through the model for their signal, ascending int64 `[n]`.
        replay: hidden states of the probe for training to start from, valid until the next call, or None.
        stored: of choices by stored sketches: `share` of the examples to choose from that had one, and `age`, the mean
            steps since they were made, if there are any; None: of other choices.
        num_bytes: payload of the collectives: signals (what the estimator sends) and selection (masked columns, sums,
            and the choice itself).
    """

    batch: LargeBatch
    coreset: Coreset
    ran: bool
    probed: Tensor
    replay: ReplayStore | None
    num_bytes: dict[str, int]
    stored: dict[str, float] | None = None

    @property
    def positions(self) -> Tensor:
        """Chosen positions in the large batch, int64 `[b]`."""
        return self.coreset.positions

    @property
    def weights(self) -> Tensor:
        """Loss weights of the chosen examples, float32 `[b]`."""
        return self.coreset.weights

    @property
    def size(self) -> int:
        """b, the number of chosen examples."""
        return self.coreset.size


@dataclass(frozen=True)
class _Observed:
    """What was read of a large batch, before the ranks exchange it.

    Attributes:
        batch: the large batch as this rank sees it.
        estimator: holds what it read.
        probed: positions whose signal is needed, ascending int64 `[n]`.
        replay: hidden states of the probe, or None.
        parts: factor of each example's signal, `[r]`, or None.
        weights: the probed weights, if the mask needs them.
        refreshes: whether target examples were observed too.
        size: r, and the target examples that were observed.
    """

    batch: LargeBatch
    estimator: Estimator | TokensEstimator
    probed: Tensor
    replay: ReplayStore | None
    parts: Tensor | None
    weights: Tensor | None
    refreshes: bool
    size: int


class CoresetSelector:
    """Select the coreset of every large batch; all ranks call it together.

    Attributes:
        small: ids of the small sources.
        source_names: names of all sources, by id.
        step_count: step of the last large batch.
        carry: carry-over of the quotas up to then, by source id.
        selector: the selector in use.
        plain: the selector of the schedule's plain steps, a random b of r.
        why_not_replay: why `replay: auto` is off, if it is.
        training_sketch: sketches the gradients of the examples that training passes, where choices go by them, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CoLMSection | Mapping[str, Any],
        source_counts: Mapping[str, int] | Sequence[str] | SourcedDataset | None = None,
        *,
        optimizer: Any = None,
        device: torch.device | None = None,
        exchange: Exchange | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        equal_counts: bool | None = None,
        rank: int | None = None,
        mean_length: float = 0.0,
        dataset: NumberedExamples | None = None,
        target: SourcedDataset | None = None,
        learning_rate: Callable[[], float] | None = None,
        by_engine: bool = False,
        is_checked: bool = False,
    ) -> None:
        """Prepare for a model and a dataset.

        Args:
            model: the module that a forward calls, bare or wrapped by DDP, DeepSpeed or PEFT.
            config: the `"colm"` section: keys and values, or a `CoLMSection`.
            source_counts: examples of every source in the dataset, in the order of their ids, or the dataset; names are
                enough if `small_sources` is not `auto`, and None if the selection ignores sources.
            optimizer: the model's optimizer; its betas and eps, or Adam's defaults if it has none, override those given
                here.
            device: device of the model; default: that of its parameters.
            exchange: the ranks that share the large batch; default: the process group, if there is one.
            betas: beta1 and beta2 of the optimizer.
            eps: eps of the optimizer.
            equal_counts: give every rank the same number of probe forwards (ZeRO-3 gathers weights in each); default:
                if ZeRO-3 partitions the model's parameters.
            rank: this rank; default: that in the process group.
            mean_length: mean tokens of an example, from which the memory of a replay is estimated.
            dataset: the training data, if available: `tokens` standardises embeddings by the ids that occur in it, and
                losses of earlier steps and of a reference model are kept by its indices.
            target: target data, for selectors that compare with one.
            learning_rate: returns that of the next step; default: the optimizer's.
            by_engine: whether batches have dataset indices, and losses are reported by `note_losses`, as in the step of
                `colm_ds.initialize`.
            is_checked: whether model, data and configuration were checked before, as the engine and the Trainer do; by
                default they are checked here.

        Raises:
            ProbeError: if the selector needs a signal that the probe cannot read from this model.
            ConfigError: listing what cannot work: in the configuration, the adapters, the optimizer's numbers, a model
                that does not fit the dataset or is not causal, a listed small source that is not in the dataset.
        """
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        check_adapters(model, 3 if partitioned else 0)
        keep_trainable(model)
        device = device if device is not None else next(model.parameters()).device
        is_given = exchange is not None
        exchange = exchange if exchange is not None else make_exchange(device)
        unlike_adam = None
        if optimizer is not None:
            betas, eps, unlike_adam = adam_constants(optimizer)
            group = optimizer.param_groups[0]
            learning_rate = learning_rate or (lambda: float(group["lr"]))
        if equal_counts is None:
            equal_counts = partitioned
        if rank is None:
            rank = dist.get_rank() if exchange.num_processes > 1 else 0
        if dataset is None and not isinstance(source_counts, (Mapping, Sequence)):
            dataset = source_counts
        attempts = Attempts("the arguments of CoresetSelector")
        if not is_given:
            attempts.of(_check_alone)
        resolved = config if (is_checked or by_engine) and isinstance(config, CoLMSection) else None
        if resolved is None or resolved.coreset_size is None:
            size = exchange.num_processes
            resolved = attempts.of(
                lambda: resolve_config({"colm": config}, size).colm if by_engine else selection_config(config, size)
            )
        attempts.of(lambda: check_groups(optimizer))
        if not (is_checked or by_engine):
            counted: Any = dataset if hasattr(dataset, "num_label_tokens") else None
            attempts.of(lambda: check_rows_fit(model, counted))
        attempts.raise_if_any()
        assert resolved is not None
        config = resolved
        if not (is_checked or by_engine):
            check_causal(model)
        self._limits = ModelLimits.of(model)
        counts = known_counts(config, source_counts)
        assert config.coreset_size is not None
        self._model = model
        self._config = config
        self._device = device
        self._exchange = exchange
        self._rank = rank
        self.source_names = list(counts)
        self._source_key = None if source_counts is None else "source"
        self.step_count = 0
        self.carry: dict[int, float] = {}
        self.small = small_source_ids(config, counts)
        if unlike_adam and rank == 0 and config.geometry == "adam" and config.signal == "gradient":
            logger.warning(
                "%s has no betas and eps of Adam, so gradients are compared as Adam with betas %s and eps %s would "
                "scale them; colm.geometry plain compares them as they are.",
                *(unlike_adam, betas, eps),
            )
        reads_layer = config.probes_model or config.stores_sketches
        architecture = find_architecture(model, config.probe.layer) if reads_layer else None
        settings = SelectionSettings(
            geometry=config.geometry,
            metric=config.metric,
            weights=config.weights,
            per_source=config.per_source,
            small_share=None if config.small_share == "auto" else config.small_share,
            carries=config.quotas == "carry",
            mask_size=self._mask_size(config, architecture),
            mask_criterion=config.mask.criterion,
            seed=config.seed,
        )
        self._context = context = SelectorContext(
            config.coreset_size, self.small, settings, betas, eps, config.options, config.outer_rules
        )
        self.selector: Selector = make_selector(config.selector, context)
        self.plain: Selector = make_selector("random", replace(context, options={}, outer_rules="auto"))
        self._learning_rate = learning_rate
        needs = config.needs
        self._losses = LossStore(_length_of(dataset, config.selector)) if needs.past else None
        self.training_sketch: TrainingSketch | None = None
        self._sketches: SketchStore | None = None
        if config.stores_sketches:
            assert architecture is not None
            num_examples, width = _length_of(dataset, config.selector), config.probe.resolved_num_probes
            self.training_sketch = TrainingSketch(architecture, width, config.seed, device)
            max_age = config.probe.max_age * num_examples / config.large_batch_size
            made_by = f"the layer {config.probe.layer} with seed {config.seed}"
            self._sketches = SketchStore(num_examples, width, max_age, made_by)
        self._reference: Tensor | None = None
        if needs.reference:
            table = config.options["table"]
            self._reference = read_reference_losses(table, _length_of(dataset, config.selector))
        self._target: TargetStream | None = None
        if needs.target:
            if target is None:
                raise ConfigError(f"colm.selector = {config.selector!r}: compares with a target. Give target_data.")
            if getattr(dataset, "candidates", None) is not None:
                raise ConfigError(f"colm.selector = {config.selector!r}: not for classification data.")
            self._target = TargetStream(target, config.target, config.seed, exchange.num_processes)
        self._probe_pass = ProbePass(
            model,
            config,
            architecture,
            device=device,
            rank=rank,
            num_ranks=exchange.num_processes,
            equal_counts=equal_counts,
        )
        self._estimator: Estimator | TokensEstimator | None = None
        self._known_means: tuple[SourcedDataset, Tensor, Callable[[Sequence[int]], Tensor]] | None = None
        self._store: ReplayStore | None = None
        self.why_not_replay: str | None = None
        if config.stores_sketches:
            pass  # signals come from the store, without an estimator
        elif config.signal is not None and not config.probes_model:
            occurs = None if dataset is None else occurring_ids(dataset, vocabulary_size(model), exchange, rank)
            vectors = vectors_of_model(model, config.seed, exchange, occurs)
            self._estimator = TokensEstimator(vectors, config.probe.length_power)
        elif architecture is not None and config.signal is not None:
            num_tokens = config.large_batch_size / exchange.num_processes * mean_length
            self._store, self.why_not_replay = choose_replay(config, architecture, num_tokens, device)
            if self.why_not_replay and rank == 0:
                logger.warning("no forward replay: %s", self.why_not_replay)
            self._estimator = make_estimator(
                config.probe,
                architecture,
                device,
                seed=config.seed,
                betas=betas,
                eps=eps,
                adam=config.geometry == "adam",
                signal=self.selector.signal or "gradient",
                also=needs.also,
                targets_from=config.large_batch_size if needs.target else None,
                absolute=config.options.get("scale") == "raw",
            )
            tail_dtype = self._estimator.dtype if isinstance(self._estimator, SpsaEstimator) else None
            check_architecture(model, architecture, tail_dtype)

    def __call__(self, batch: LargeBatch | Sequence[Any] | Mapping[str, Any], meter: Meter | None = None) -> Selection:
        """Select the coreset of a large batch.

        Args:
            batch: this rank's examples, a list of records or a padded batch (see `batching.gather.read_examples`): a
                position in the large batch then counts through the ranks' examples in the order of the ranks, and the
                step is the one after the last. Or the large batch as this rank sees it.
            meter: measures the phases probe, exchange and select.

        Raises:
            DataError: on every rank, if the examples of any cannot be read.
            SelectionError: on every rank, if there are fewer examples than b.
        """
        if not isinstance(batch, LargeBatch):
            batch = self._gather(batch)
        self.step_count = batch.step
        selection = self._selected(self._with_histories(batch), meter or Meter(self._device, peaks=False))
        if selection.coreset.carry is not None:
            self.carry = selection.coreset.carry
        return selection

    def _with_histories(self, batch: LargeBatch) -> LargeBatch:
        """Return a large batch with what is known of its examples from earlier steps."""
        return replace(
            batch,
            carry=self.carry,
            past=None if self._losses is None else self._losses.of(batch.indices),
            reference=None if self._reference is None else self._reference[batch.indices],
            lr=None if self._learning_rate is None else self._learning_rate(),
        )

    def _selected(self, batch: LargeBatch, meter: Meter) -> Selection:
        ran, nothing = self._config.schedule.selects(batch.step), torch.empty(0, dtype=torch.int64)
        if batch.chosen is not None:
            with meter.phase("select"):
                counted = {"signals": 0, "selection": batch.chosen.num_bytes}
                return Selection(batch, batch.chosen.coreset, ran, nothing, None, counted)
        if self._store is not None:
            self._store.begin(batch.step)
        if ran and self._sketches is not None:
            return self._by_stored(batch, self._sketches, meter)
        if not ran or self._estimator is None:
            with meter.phase("select"):
                coreset = (self.selector if ran else self.plain).select(batch, None, SINGLE_PROCESS)
            return Selection(batch, coreset, ran, nothing, None, {"signals": 0, "selection": 0})
        return self._choose(self._observe(batch, self._estimator, meter), meter)

    def _observe(self, batch: LargeBatch, estimator: Estimator | TokensEstimator, meter: Meter) -> _Observed:
        """Let the estimator read what it needs of a large batch, each rank of its own examples."""
        probed = self._to_probe(batch)
        replay = self._store if len(probed) else None
        by_token = self._config.loss_normalization == "token"
        parts = batch.num_label_tokens.float() if by_token else None
        refreshes = self._target is not None and self._target.due(batch.step)
        extended = self._target.extend(batch, self._rank) if self._target is not None and refreshes else batch
        with meter.phase("probe"):
            weights = self._read_signals(extended, batch.size, probed, estimator, replay, parts)
        return _Observed(batch, estimator, probed, replay, parts, weights, refreshes, extended.size)

    def _choose(self, observed: _Observed, meter: Meter) -> Selection:
        """Exchange the signals of what was observed and select."""
        batch, estimator, probed = observed.batch, observed.estimator, observed.probed
        with meter.phase("exchange"), self._exchange.counting("signals") as signal_bytes:
            signals = estimator.signals(observed.size, self._exchange)
            if self._target is not None:
                signals = self._target.split(signals, batch, observed.refreshes)
        unprobed = self._unprobed(batch, probed)
        signals = replace(signals, parameters=observed.weights, parts=observed.parts, unprobed=unprobed)
        with meter.phase("select"), self._exchange.counting("selection") as selection_bytes:
            coreset = self._select(batch, signals, is_local=estimator.is_local)
            estimator.update(coreset, self._exchange)
        counted = {count.kind: count.num_bytes for count in (signal_bytes, selection_bytes)}
        if not self._config.probes_model:  # no pass was made, and agreement of features says nothing about gradients
            probed, coreset = probed[:0], replace(coreset, coherence={})
        return Selection(batch, coreset, True, probed, observed.replay, counted)

    def _by_stored(self, batch: LargeBatch, sketches: SketchStore, meter: Meter) -> Selection:
        """Select by the sketches that earlier steps left; examples without one are drawn at random."""
        with meter.phase("select"), self._exchange.counting("selection") as selection_bytes:
            wanted = self._to_probe(batch)
            stored = sketches.of(batch.indices[wanted], batch.step)
            positions, unseen = wanted[stored.known], torch.ones(batch.size, dtype=torch.bool)
            unseen[positions] = False
            by_token = self._config.loss_normalization == "token"
            parts = batch.num_label_tokens.float() if by_token else None
            signals = Signals(
                positions,
                torch.ones(batch.size, dtype=torch.bool),
                vectors=multiply_by_parts(stored.vectors, parts, positions),
                parts=parts,
                unseen=unseen,
            )
            coreset = self._select(batch, signals, is_local=False)
        facts = {}
        if len(wanted):
            facts["share"] = len(positions) / len(wanted)
        if len(positions):
            facts["age"] = float(stored.ages.double().mean())
        counted = {"signals": 0, "selection": selection_bytes.num_bytes}
        return Selection(batch, coreset, True, wanted[:0], None, counted, facts)

    @property
    def chooses_ahead(self) -> bool:
        """True if the choice depends on the data alone, so that it can be made before a step."""
        by_data = not (self._config.probes_model or self._config.stores_sketches)
        return by_data and getattr(self.selector, "can_choose_ahead", False)

    def chooser(self, dataset: SourcedDataset) -> Callable[[LargeBatch], Coreset]:
        """Return a function that chooses the coreset of a large batch on rank 0 without reading its examples.

        All ranks call this together, if `chooses_ahead`; the function has no state.

        Raises:
            ProbeError: on every rank, if a token id of the dataset has no vector.
        """
        estimator = self._estimator if isinstance(self._estimator, TokensEstimator) else None
        means = None if estimator is None else self._means(dataset, estimator.vectors)
        selector, plain = self.selector, self.plain

        def choose(batch: LargeBatch) -> Coreset:
            ran = self._config.schedule.selects(batch.step)
            if not ran or estimator is None or means is None:
                return (selector if ran else plain).select(batch, None, SINGLE_PROCESS)
            parts = batch.num_label_tokens.float() if self._config.loss_normalization == "token" else None
            vectors = means(batch.indices.tolist())
            signals = estimator.signals_of(vectors, batch.num_label_tokens, self._to_probe(batch), parts)
            coreset = selector.select(batch, replace(signals, parts=parts), SINGLE_PROCESS)
            return replace(coreset, coherence={})  # agreement of features says nothing about gradients

        return choose

    def _means(self, dataset: SourcedDataset, vectors: Tensor) -> Callable[[Sequence[int]], Tensor]:
        """Return a function for the mean vectors of a dataset's examples, cached for the same examples and vectors."""
        examples = dataset.dataset if isinstance(dataset, WithSources) else dataset
        if self._known_means is None or self._known_means[0] is not examples or self._known_means[1] is not vectors:
            table = mean_table(examples, vectors, self._exchange, self._rank, getattr(examples, "cache", None))
            self._known_means = examples, vectors, means_of(examples, vectors, table)
        return self._known_means[2]

    def gradient_variance(self, selection: Selection) -> dict[str, float] | None:
        """Return how far the coreset's mean gradient is from the large batch's: see `GradientVariance`.

        The gradients are those of all trained linear modules, input embeddings and head, through a `GradientSketch`
        that is the same in every step. All ranks call it together.

        Raises:
            ProbeError: if no matrix is trained, or ZeRO-3 partitions the weights.
        """
        batch = selection.batch
        by_token = self._config.loss_normalization == "token"
        sketch = GradientSketch(self._model, self._config.seed)
        measured = GradientVariance(
            selection.coreset, batch.size, sketch.width, self._device, batch.num_label_tokens if by_token else None
        )
        for positions in self._probe_pass.plan(batch, torch.ones(batch.size, dtype=torch.bool), MAX_TOKENS):
            if not positions:
                continue
            micro = make_micro_batch([batch.examples[position] for position in positions]).to(self._device)
            with of_micro_batch(micro):
                measured.observe(sketch.rows(micro), torch.tensor(positions, dtype=torch.int64))
        return measured.result(self._exchange)

    def share(self, selection: Selection) -> tuple[list[int], Tensor]:
        """Return this rank's part of a coreset, for loops in which each rank trains on its own examples.

        Returns:
            Indices among the examples that this rank passed, and a factor for the mean token loss of each, float32: the
            gradient of the sum of the products, averaged over ranks as DDP and DeepSpeed do, is that of the step.
        """
        batch, coreset = selection.batch, selection.coreset
        chosen = [position for position in coreset.positions.tolist() if int(batch.home[position]) == self._rank]
        scale = loss_scale(batch, coreset, self._config.loss_normalization) * self._exchange.num_processes
        first = int((batch.home < self._rank).sum())
        return [position - first for position in chosen], (scale * batch.num_label_tokens)[chosen].to(self._device)

    def set_sources(self, counts: Mapping[str, int]) -> None:
        """Continue with other sources, by name and number of examples; the histories are kept."""
        self.source_names, self.small = list(counts), small_source_ids(self._config, counts)
        self.carry = {}
        state = self.selector.state_dict()
        self.selector = make_selector(self._config.selector, replace(self._context, small=self.small))
        self.selector.load_state_dict(state)

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors that selector and estimator keep between steps: histories and directions."""
        keepers = (self.selector, self._estimator, self._losses, self._sketches, self._target)
        return [tensor for keeper in keepers for _, tensor in tensors_of(keeper)]

    def state_dict(self) -> dict[str, Any]:
        """Return the last step and the histories of selector and estimator; complete on rank 0."""
        estimator = self._estimator.state_dict() if self._estimator else {}
        state: dict[str, Any] = {"step": self.step_count, "carry": dict(self.carry), "chosen_by": self._chosen_by()}
        if self._losses is not None:
            state["losses"] = self._losses.state_dict()
        if self._sketches is not None:
            state["sketches"] = self._sketches.state_dict()
        if self._target is not None:
            state["target"] = self._target.state_dict()
        return {**state, "selector": self.selector.state_dict(), "estimator": estimator}

    def snapshot(self) -> dict[str, Any]:
        """Copy the part of `state_dict` that a choice changes."""
        state: dict[str, Any] = {"step": self.step_count, "carry": self.carry, "selector": self.selector.state_dict()}
        if self._target is not None:
            state["target"] = self._target.state_dict()
        if self._estimator is not None and not isinstance(self._estimator, TokensEstimator):  # its vectors stay
            state["estimator"] = self._estimator.state_dict()
        return deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore step and histories; every rank is given rank 0's. Warn if steps before were chosen in another way.

        A selector or an estimator that took another's place starts without a history.
        """
        before, now = state.get("chosen_by"), self._chosen_by()
        if before not in (None, now) and self._rank == 0:
            keys = ", ".join(f"colm.{key} = {before.get(key)!r}" for key in now if before.get(key) != now[key])
            logger.warning("steps before the checkpoint were chosen with %s; from now on by this configuration.", keys)
        same = {key for key in now if before is None or before.get(key) == now[key]}
        self.step_count = state.get("step", 0)
        self.carry = dict(state.get("carry", {}))
        if self._losses is not None and "losses" in state:
            self._losses.load_state_dict(state["losses"])
        if self._sketches is not None:
            if "sketches" in state:
                self._sketches.load_state_dict(state["sketches"])
            else:
                self._sketches.clear()
        if self._target is not None:
            self._target.load_state_dict(state.get("target", {}) if "probe.estimator" in same else {}, self._device)
        if {"selector", "probe.estimator"} <= same:
            self.selector.load_state_dict(state["selector"])
        if self._estimator and state["estimator"] and "probe.estimator" in same:
            self._estimator.load_state_dict(state["estimator"])

    def _chosen_by(self) -> dict[str, Any]:
        """Return the keys that decide most about the choice, for a resume to compare."""
        config = self._config
        keys = {"selector": config.selector, "probe.estimator": config.probe.estimator, "weights": config.weights}
        return {**keys, "per_source": config.per_source}

    def _gather(self, examples: Sequence[Any] | Mapping[str, Any]) -> LargeBatch:
        def read() -> list[Example]:
            given = read_examples(examples, self.source_names, self._source_key)
            self._limits.check(given)
            return given

        batch = gather_large_batch(read, self.step_count + 1, self._rank, self._exchange)
        if batch.size < (self._config.coreset_size or 0):
            raise SelectionError(
                f"step {batch.step}: {batch.size} examples, fewer than coreset_size = {self._config.coreset_size}. "
                "Leave out the last, smaller batch of an epoch (drop_last=True)."
            )
        return batch

    def _select(self, batch: LargeBatch, signals: Signals, *, is_local: bool) -> Coreset:
        """Select on all ranks together if each has signals of its own examples, else on rank 0 for all."""
        if is_local:
            return self.selector.select(batch, signals, self._exchange)
        coreset: Coreset | None = None
        failure: SelectionError | None = None
        if self._exchange.is_main:
            try:
                coreset = self.selector.select(batch, signals, SINGLE_PROCESS)
            except SelectionError as error:
                failure = error
        told = broadcast_coreset(coreset, self._config.coreset_size or 0, len(self.source_names), self._exchange)
        if failure is not None:
            raise failure
        if told is None:
            raise SelectionError(f"step {batch.step}: rank 0 could not choose; its message says why.")
        return told

    def note_losses(self, batch: LargeBatch, positions: Sequence[int], losses: Tensor) -> None:
        """Remember the losses that training found, if the selector goes by those of earlier steps.

        Args:
            batch: the large batch.
            positions: positions that were trained on.
            losses: mean token loss by position, `[r]`, the same on every rank.
        """
        if self._losses is not None:
            trained = torch.tensor(list(positions), dtype=torch.int64)
            self._losses.note(batch.indices[trained], losses[trained])

    def note_sketches(self, batch: LargeBatch, positions: Sequence[int], sketches: Tensor) -> float | None:
        """Remember the sketches that training left, if choices go by them; return what `SketchStore.note` does.

        Args:
            batch: the large batch.
            positions: positions that were trained on.
            sketches: sketch of each one's gradient, float32 `[n, K]`, the same on every rank.
        """
        if self._sketches is None:
            return None
        trained = torch.tensor(list(positions), dtype=torch.int64)
        return self._sketches.note(batch.indices[trained], sketches, batch.step)

    def _to_probe(self, batch: LargeBatch) -> Tensor:
        """Return the positions whose signal is needed in this step: none from small sources, ascending int64 `[n]`."""
        config = self._config
        kept, size = self._kept_anyway(batch), config.coreset_size or 0
        lacks = getattr(self.selector, "lacks", None)
        lacking = None if lacks is None else lacks(batch)
        usable = torch.ones_like(kept) if lacking is None else ~lacking
        picks = size - most_kept(int((kept & usable).sum()), size, batch.size, self._context.settings.small_share)
        if picks <= 0:
            return torch.empty(0, dtype=torch.int64)
        rest = (~kept & usable).nonzero().flatten()
        if config.probe.sample == 1.0:
            return rest
        count = max(picks, math.ceil(config.probe.sample * len(rest)))
        generator = private_generator(config.seed, "sample", batch.step)
        return rest[torch.randperm(len(rest), generator=generator)[:count]].sort().values

    def _read_signals(
        self,
        batch: LargeBatch,
        size: int,
        probed: Tensor,
        estimator: Estimator | TokensEstimator,
        store: ReplayStore | None,
        parts: Tensor | None,
    ) -> Tensor | None:
        """Let the estimator read what it needs of the probed examples: their tokens, or `ProbePass.run`."""
        if not isinstance(estimator, TokensEstimator):
            samples_tokens = self.selector.signal == "gradient"
            return self._probe_pass.run(batch, size, probed, estimator, store, parts, samples_tokens=samples_tokens)
        estimator.begin(batch.step, probed, len(probed), parts)
        mine = probed[batch.home[probed] == self._rank].tolist()
        estimator.look_up({position: batch.examples[position] for position in mine})
        return None

    def _unprobed(self, batch: LargeBatch, probed: Tensor) -> Tensor | None:
        """Return which examples outside small sources a subsampling probe leaves out, bool `[r]`."""
        if self._config.probe.sample == 1.0 or len(probed) == 0:
            return None
        unprobed = ~self._kept_anyway(batch)
        unprobed[probed] = False
        return unprobed

    def _kept_anyway(self, batch: LargeBatch) -> Tensor:
        """Return which examples the selector keeps without a signal, bool `[r]`."""
        small = self.small if self.selector.keeps_small else []
        return torch.isin(batch.sources, torch.tensor(small, dtype=torch.int64))

    @staticmethod
    def _mask_size(config: CoLMSection, architecture: Architecture | None) -> int | None:
        if config.mask.size != "auto":
            return config.mask.size
        return architecture.hidden_size if architecture is not None else None


def _length_of(dataset: NumberedExamples | None, selector: str) -> int:
    if dataset is None:
        raise ConfigError(f"colm.selector = {selector!r}: goes by examples' indices in the dataset. Give the dataset.")
    return len(dataset)


def _check_alone() -> None:
    """Raise if a launcher started several processes of which this one would know nothing."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not dist.is_initialized() and size.isdigit() and int(size) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {size}: there is no process group, so each process would choose from its own rows alone. "
            "Call torch.distributed.init_process_group before (accelerate: make the Accelerator first)."
        )
