"""Initialize training on coresets as `deepspeed.initialize` does training on batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import nn

from colm_ds.batching.loader import RecordDataset
from colm_ds.batching.sources import looks_at_sources
from colm_ds.config.deepspeed import MONITOR_SECTIONS, model_facts, resolve_auto
from colm_ds.config.optimizer import check_groups
from colm_ds.config.resolve import Config, ResolvedConfig, resolve_config
from colm_ds.engine.arguments import NAME, check_collated, check_initialize, is_sourced, refused_by_deepspeed
from colm_ds.engine.engine import CoLMEngine
from colm_ds.engine.micro_batch_loop import Collate, MicroBatchLoader
from colm_ds.errors import Attempts, ConfigError, DataError
from colm_ds.models.model_fit import check_rows_fit
from colm_ds.models.quantized import check_adapters
from colm_ds.types import SourcedDataset

_ADAM = ("Adam", "AdamW")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Collate | None = None,
    config: Config | None = None,
    mesh_param: Any = None,
    config_params: Config | None = None,
    target_data: Any = None,
) -> tuple[CoLMEngine, Any, MicroBatchLoader, Any]:
    """Initialize like `deepspeed.initialize`, for training on coresets, with a `"colm"` section in the configuration.

    The arguments are those of `deepspeed.initialize`, in its order, and `target_data`.

    Args:
        args: parsed arguments; `deepspeed_config` in it is used if `config` is not given.
        model: a Hugging Face causal LM, bare or in a `PeftModel`.
        optimizer: a torch optimizer or a function of parameters, instead of the configuration's.
        model_parameters: parameters to train, or groups of them; default: all that require a gradient.
        training_data: a `SourcedDataset`, or a map-style dataset of records with `input_ids`, `labels`, and `source`
            if the selection looks at sources. Records without a label to train on are left out, and counted in a line.
        lr_scheduler: a scheduler or a function of the optimizer, instead of the configuration's.
        distributed_port: port of rank 0, if the process group is made here.
        mpu: must be None: the probe needs whole layers.
        dist_init_required: as in DeepSpeed.
        collate_fn: makes a batch of records; it may give `input_ids` and `labels` of records that have none, and
            further fields, which the loader's batches then have.
        config: path, dict or `ResolvedConfig`; `train_batch_size` in the first two is b.
        mesh_param: must be None: a sequence is not split over ranks.
        config_params: the same as `config`, as in DeepSpeed.
        target_data: as training_data, for selectors that compare with a target; never trained on.

    Returns:
        Engine, optimizer, loader of micro-batches (see `MicroBatchLoader`), learning-rate scheduler.

    Raises:
        ConfigError: listing every problem of the arguments, or of the configuration.
        ProbeError: if the selector needs a signal that cannot be read from this model.
        DataError: if a record lacks a key that training needs.
    """
    given = check_initialize(
        args=args,
        model=model,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_param=mesh_param,
        config_params=config_params,
    )
    assert model is not None
    prepare_deepspeed()
    if not dist.is_initialized():
        deepspeed.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    attempts = Attempts(f"the arguments of {NAME}")
    resolved = attempts.of(lambda: _resolved(given.config, model, optimizer, lr_scheduler, target_data))
    attempts.of(lambda: check_groups(optimizer))
    needs_sources = resolved is not None and looks_at_sources(resolved.colm)
    dataset = attempts.of(lambda: _sourced(training_data, collate_fn, model, needs_sources))
    attempts.of(lambda: check_rows_fit(model, dataset))
    mixes = resolved is not None and resolved.colm.target.mix == "equal"
    target = attempts.of(lambda: _target(target_data, mixes))
    attempts.of(lambda: check_rows_fit(model, target))
    attempts.raise_if_any()
    assert resolved is not None
    assert dataset is not None
    _prefer_torch_adam(resolved.deepspeed)
    try:
        inner, optimizer, _, scheduler = deepspeed.initialize(
            args=given.args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters or [p for p in model.parameters() if p.requires_grad],
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
            # Its monitors are opened by `RunMonitor`: DeepSpeed's own events count examples by a size that is not b.
            config={key: value for key, value in resolved.deepspeed.items() if key not in MONITOR_SECTIONS},
        )
    except Exception as error:
        if not refused_by_deepspeed(error):
            raise
        why = f"{type(error).__name__}: {str(error).strip()}"
        raise ConfigError(
            f"deepspeed.initialize refuses the configuration or another argument: {why}. "
            "Change what it names, in the DeepSpeed configuration or the call."
        ) from error
    engine = CoLMEngine(inner, resolved, dataset, target)
    pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    loader = MicroBatchLoader(
        engine,
        getattr(dataset, "record", None),
        collate_fn,
        pad_token_id if isinstance(pad_token_id, int) else 0,
    )
    return engine, optimizer, loader, scheduler


def _resolved(config: Config, model: nn.Module, optimizer: Any, scheduler: Any, target_data: Any) -> ResolvedConfig:
    """Resolve the configuration, and check that model, optimizer and target data go with it."""
    given = [name for name, value in (("optimizer", optimizer), ("scheduler", scheduler)) if value is not None]
    resolved = resolve_config(config, dist.get_world_size(), supplied=given)
    hidden_size, dtype = model_facts(model)
    resolved = replace(resolved, deepspeed=resolve_auto(resolved.deepspeed, hidden_size=hidden_size, dtype=dtype))
    check_adapters(model, int((resolved.deepspeed.get("zero_optimization") or {}).get("stage", 0)))
    if optimizer is None and not resolved.deepspeed.get("optimizer"):
        raise ConfigError('optimizer: none. Add "optimizer": {"type": "AdamW", ...} to the configuration or give one.')
    _check_target(resolved, target_data)
    return resolved


def _sourced(data: Any, collate_fn: Collate | None, model: nn.Module, needs_sources: bool) -> SourcedDataset:
    """Return the training data as a dataset that knows its sources and lengths."""
    if is_sourced(data):
        return data
    if collate_fn is not None:
        check_collated(collate_fn, data, model)
    return RecordDataset(data, collate_fn=collate_fn, needs_sources=needs_sources, says_what=_is_first())


def _target(data: Any, needs_sources: bool) -> SourcedDataset | None:
    """Return the target data as a dataset that knows its sources and lengths."""
    if data is None or is_sourced(data):
        return data
    try:
        return RecordDataset(data, needs_sources=needs_sources, says_what=_is_first())
    except DataError as error:
        raise DataError(f"target_data: {error}") from None


def _is_first() -> bool:
    return dist.get_rank() == 0


def prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling a C++ extension that training on a CPU does not need."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_target(config: ResolvedConfig, target_data: Any) -> None:
    """Raise unless target data is given where the selector compares with a target, and only there."""
    selector, target = config.colm.selector, config.colm.target
    if config.colm.needs.target and target_data is None:
        hint = f" (colm.target.data = {target.data!r} is read by recipes)" if target.data else ""
        raise ConfigError(f"colm.selector = {selector!r}: compares with a target{hint}. Give target_data.")
    if target_data is not None and not config.colm.needs.target:
        raise ConfigError(f"target_data: the selector {selector!r} compares with no target. Leave it out.")


def _prefer_torch_adam(config: dict[str, Any]) -> None:
    """Use torch's Adam on a CPU, also for offload: DeepSpeed's own compiles an extension (35 s) at first use."""
    if torch.cuda.is_available():
        return
    section = config.get("optimizer") or {}
    if section.get("type") in _ADAM:
        section["params"] = {"torch_adam": True, **(section.get("params") or {})}
    config.setdefault("zero_force_ds_cpu_optimizer", False)
