"""The engine: a DeepSpeed engine whose optimizer step looks at r examples and trains on the b that represent them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from colm_ds.config import Config, ResolvedConfig, resolve_config
from colm_ds.coreset_selector import CoresetSelector, small_source_ids
from colm_ds.data.loader import LargeBatchLoader, RecordDataset, source_counts
from colm_ds.data.micro_batch import make_micro_batch
from colm_ds.distributed.assign import micro_batches, training_ranks
from colm_ds.distributed.exchange import make_exchange, move_examples
from colm_ds.errors import CheckpointError, ConfigError, SelectionError
from colm_ds.memory.meter import GIB, Meter
from colm_ds.training_loss import example_loss_sums, find_loss_head
from colm_ds.types import Coreset, LargeBatch, SourcedDataset, StepStats

_ADAM = ("Adam", "AdamW")

_PHASES = ("probe", "exchange", "select", "train", "step")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Callable[[Any], Any] | None = None,
    dist_init_required: bool | None = None,
    config: Config | None = None,
) -> tuple[CoLMEngine, Any, LargeBatchLoader, Any]:
    """`deepspeed.initialize` for training on coresets; same arguments, and a `"colm"` section in the configuration.

    Args:
        args: parsed arguments; `deepspeed_config` in it is used if `config` is not given.
        model: a Hugging Face causal LM, bare or in a `PeftModel`.
        optimizer: a torch optimizer or a function of parameters, instead of the configuration's.
        model_parameters: what to train; default: all parameters that require a gradient.
        training_data: a `SourcedDataset`, or a map-style dataset of records with `input_ids`, `labels`, `source`.
        lr_scheduler: a function of the optimizer, instead of the configuration's.
        dist_init_required: as in DeepSpeed.
        config: path or dict; `train_batch_size` in it is b.

    Returns:
        Engine, optimizer, loader of large batches, learning-rate scheduler.

    Raises:
        ConfigError: listing every problem of the configuration.
        ProbeError: if the selector needs a signal that can not be read from this model.
        DataError: if a record lacks what training needs.
    """
    config = config if config is not None else getattr(args, "deepspeed_config", None)
    if config is None or model is None or training_data is None:
        raise ConfigError("colm_ds.initialize: model, config and training_data are needed. Give all three.")
    prepare_deepspeed()
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_init_required=dist_init_required)
    resolved = resolve_config(config, dist.get_world_size())
    if optimizer is None and not resolved.deepspeed.get("optimizer"):
        raise ConfigError('optimizer: none. Add "optimizer": {"type": "AdamW", ...} to the configuration or give one.')
    dataset = training_data if _is_sourced(training_data) else RecordDataset(training_data)
    _prefer_torch_adam(resolved.deepspeed)
    inner, optimizer, _, scheduler = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters or [p for p in model.parameters() if p.requires_grad],
        lr_scheduler=lr_scheduler,
        dist_init_required=False,
        config=resolved.deepspeed,
    )
    engine = CoLMEngine(inner, resolved, dataset)
    return engine, optimizer, engine.loader, scheduler


def prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling a C++ extension that training on a CPU does not need."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class CoLMEngine:
    """Wraps a DeepSpeed engine; what it does not define is the DeepSpeed engine's.

    Attributes:
        deepspeed_engine: the wrapped engine.
        config: the resolved configuration.
        loader: the large batches that `train_batch` takes by default.
        coreset_selector: probes and selects.
        step_count: optimizer steps so far.
        num_samples: examples trained on so far, over all ranks.
        loss_head: from `find_loss_head`.
    """

    def __init__(self, engine: Any, config: ResolvedConfig, dataset: SourcedDataset) -> None:
        self.deepspeed_engine = engine
        self.config = config
        self.step_count = 0
        self.num_samples = 0
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device(engine.device)
        self._source_names = list(dataset.source_names)
        self._exchange = make_exchange(self._device)
        self.loss_head = find_loss_head(engine.module)
        self.loader = LargeBatchLoader(
            dataset,
            config.colm.large_batch_size,
            seed=config.colm.seed,
            rank=self._rank,
            world_size=self._world_size,
            num_workers=config.colm.num_workers,
            kept_sources=small_source_ids(config.colm, source_counts(dataset)),
        )
        group = engine.optimizer.param_groups[0]
        self.coreset_selector = CoresetSelector(
            engine.module,
            config.colm,
            source_counts(dataset),
            device=self._device,
            exchange=self._exchange,
            betas=group.get("betas", (0.9, 0.999)),
            eps=group.get("eps", 1e-8),
            equal_counts=engine.zero_optimization_stage() == 3,
            rank=self._rank,
            mean_length=float(dataset.lengths.mean()),
        )
        self._batches: Iterator[LargeBatch] = iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        if "deepspeed_engine" not in self.__dict__:  # asked before __init__, as copy and pickle do
            raise AttributeError(name)
        return getattr(self.deepspeed_engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the model, as on a DeepSpeed engine."""
        return self.deepspeed_engine(*args, **kwargs)

    def train_batch(self, batch: LargeBatch | None = None) -> StepStats:
        """One optimizer step on the coreset of a large batch.

        Args:
            batch: this rank's view of the large batch; default: the loader's next.

        Raises:
            SelectionError: if no example of the batch has a finite signal.
        """
        start = time.perf_counter()
        meter = Meter(self._device)
        batch = batch if batch is not None else next(self._batches)
        exchanged = _ByteCount(self._exchange)
        self.deepspeed_engine.train()
        coreset = self.coreset_selector(batch, meter)
        exchanged.note("selection")
        if coreset.size == 0:
            raise SelectionError(
                f"step {batch.step}: none of the {batch.size} examples has a finite signal. "
                "The model has diverged: resume from an earlier checkpoint with a lower learning rate."
            )
        with meter.phase("train"):
            loss, padding = self._accumulate(batch, coreset, exchanged)
        lr = float(self.deepspeed_engine.get_lr()[0])
        with meter.phase("step"):
            self.deepspeed_engine.step()
        self.step_count += 1
        self.num_samples += coreset.size
        mean_loss = float(self._exchange.sum(loss))  # the step's one read of the loss, a synchronisation
        probed = len(self.coreset_selector.probed_positions(batch))
        exchanged.split_signals(self.coreset_selector.signal_bytes)
        return StepStats(
            step=batch.step,
            loss=mean_loss,
            lr=lr,
            grad_norm=_number(self.deepspeed_engine.get_global_grad_norm()),
            tokens=int(batch.lengths[coreset.positions].sum()),
            samples=self.num_samples,
            examples_probed=probed,
            examples_trained=coreset.size,
            padding_fraction=padding,
            exchange_bytes=exchanged.by_kind,
            selected=self.coreset_selector.selects(batch.step),
            time_s={**dict.fromkeys(_PHASES, 0.0), **meter.seconds, "total": time.perf_counter() - start},
            memory_gib=_peaks(meter),
            coreset=self._describe(batch, coreset),
        )

    def train_batch_size(self) -> int:
        """b, the examples trained on in a step."""
        return self.config.coreset_size

    def save_checkpoint(
        self, save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None
    ) -> bool:
        """DeepSpeed's checkpoint with the selector's history, data position and counts beside it.

        Args:
            save_dir: folder of the run's checkpoints.
            tag: name of this one; default: by step.
            client_state: the caller's own state, returned by `load_checkpoint`.
        """
        state = dict(client_state or {})
        state["colm"] = {
            "client_keys": sorted(client_state or {}),
            "selector": self.coreset_selector.state_dict(),
            "next_step": self.loader.next_step,
            "step_count": self.step_count,
            "num_samples": self.num_samples,
        }
        return bool(self.deepspeed_engine.save_checkpoint(save_dir, tag or f"step_{self.step_count}", state))

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any]]:
        """Restore model, optimizer, scheduler, selector history, data position and counts.

        Args:
            load_dir: folder of the run's checkpoints.
            tag: which one; default: the latest.
            kwargs: further arguments of DeepSpeed's `load_checkpoint`.

        Returns:
            The path that was loaded and the client state.

        Raises:
            CheckpointError: if the checkpoint was not saved by this class.
        """
        path, state = self.deepspeed_engine.load_checkpoint(load_dir, tag, **kwargs)
        if path is None:
            return None, {}
        if "colm" not in state:
            raise CheckpointError(
                f"{path}: holds no state of colm_ds. It was saved by a plain DeepSpeed engine; "
                "load it with engine.deepspeed_engine.load_checkpoint to go on from its weights."
            )
        saved = state["colm"]
        self.coreset_selector.load_state_dict(saved["selector"])
        self.loader.next_step = saved["next_step"]
        self.step_count, self.num_samples = saved["step_count"], saved["num_samples"]
        self._batches = iter(self.loader)
        return path, {key: state[key] for key in saved["client_keys"]}  # DeepSpeed adds keys of its own

    def _accumulate(self, batch: LargeBatch, coreset: Coreset, exchanged: _ByteCount) -> tuple[Tensor, float]:
        """Forward and backward over the coreset; this rank's share of the mean loss and the padded share of tokens."""
        positions = coreset.positions.tolist()
        replay = self.coreset_selector.replay
        if replay is None:
            ranks = training_ranks(positions, batch.lengths, batch.home, self._world_size)
        else:  # an example's hidden states are where it was probed
            ranks = {position: int(batch.home[position]) for position in positions}
            replay.keep(positions)
        moves = [(p, int(batch.home[p]), ranks[p]) for p in sorted(positions) if ranks[p] != int(batch.home[p])]
        facts = (batch.sources, batch.indices)
        arrived = move_examples(batch.examples, moves, batch.lengths, facts, self._rank, self._exchange)
        exchanged.note("tokens")
        examples = {**batch.examples, **arrived}
        by_rank = [[p for p in positions if ranks[p] == rank] for rank in range(self._world_size)]
        plans = micro_batches(
            by_rank,
            batch.lengths,
            max_examples=self.config.micro_batch_size,
            max_tokens=self.config.colm.micro_batch_tokens,
        )
        scale = self._loss_scale(batch, coreset)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for mine in plans[self._rank]:
            micro = make_micro_batch([examples[position] for position in mine]).to(self._device)
            scales = torch.zeros(len(micro.counts))
            scales[: len(mine)] = scale[mine]
            # A place holder is replayed too: under ZeRO-3 all ranks gather the same layers in the same order.
            replayed = replay is not None and (not mine or replay.has(mine))
            with replay.replaying(mine) if replay is not None and replayed else nullcontext():
                sums = example_loss_sums(self.deepspeed_engine, self.loss_head, micro)
                loss = (sums * scales.to(self._device, non_blocking=True)).sum()
                total += loss.detach()
                self.deepspeed_engine.backward(loss * self._world_size, scale_wrt_gas=False)
        return total, _padding(plans, batch.lengths)

    def _loss_scale(self, batch: LargeBatch, coreset: Coreset) -> Tensor:
        """Factor of each example's summed token losses, float32 `[r]`; the step's gradient is the sum over ranks."""
        labelled = batch.num_label_tokens[coreset.positions].double()
        weights = coreset.weights.double()
        token = self.config.colm.loss_normalization == "token"
        factors = weights / labelled.sum() if token else weights / (labelled * coreset.size)
        scale = torch.zeros(batch.size)
        scale[coreset.positions] = factors.float()
        return scale

    def _describe(self, batch: LargeBatch, coreset: Coreset) -> dict[str, Any]:
        counts = torch.bincount(batch.sources[coreset.positions], minlength=len(self._source_names)).tolist()
        names = [*self._source_names, "joint"]  # the joint pool has source id -1
        return {
            "kept_small": coreset.num_kept,
            "dropped_small": coreset.num_dropped_small,
            "nonfinite": coreset.num_nonfinite,
            "per_source": dict(zip(self._source_names, counts, strict=True)),
            "coherence": {names[source]: value for source, value in coreset.coherence.items()},
        }


class _ByteCount:
    """Splits the exchange's running count of bytes by what they were for."""

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange
        self.by_kind: dict[str, int] = {"signals": 0, "selection": 0, "tokens": 0}
        if hasattr(exchange, "num_bytes"):
            exchange.num_bytes = 0

    def note(self, kind: str) -> None:
        """Book what was carried since the last note."""
        self.by_kind[kind] += getattr(self._exchange, "num_bytes", 0)
        if hasattr(self._exchange, "num_bytes"):
            self._exchange.num_bytes = 0

    def split_signals(self, num_bytes: int) -> None:
        """Book a part of the selection's bytes as signals."""
        self.by_kind["signals"] += num_bytes
        self.by_kind["selection"] -= num_bytes


def _padding(plans: Sequence[Sequence[Sequence[int]]], lengths: Tensor) -> float:
    computed = sum(len(batch) * int(lengths[batch].max()) for plan in plans for batch in plan if batch)
    real = sum(int(lengths[batch].sum()) for plan in plans for batch in plan if batch)
    return 1.0 - real / computed if computed else 0.0


def _peaks(meter: Meter) -> dict[str, float]:
    peaks = meter.peak_bytes
    probe = max((peaks[name] for name in ("probe", "exchange", "select") if name in peaks), default=0)
    train = max(peaks["train"], peaks["step"])
    return {"probe": probe / GIB, "train": train / GIB, "peak": max(probe, train) / GIB}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _prefer_torch_adam(config: dict[str, Any]) -> None:
    """On a CPU without offload let torch's Adam serve: DeepSpeed's own compiles an extension (35 s) at first use."""
    section = config.get("optimizer") or {}
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer")
    if section.get("type") in _ADAM and not offload and not torch.cuda.is_available():
        section.setdefault("params", {}).setdefault("torch_adam", True)


def _is_sourced(dataset: Any) -> bool:
    return all(hasattr(dataset, name) for name in ("source_names", "source_ids", "lengths", "num_label_tokens"))
