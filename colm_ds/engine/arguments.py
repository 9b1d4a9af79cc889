"""Check the arguments of `colm_ds.initialize`, which are those of `deepspeed.initialize`."""

from __future__ import annotations

import copy
import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from colm_ds.config.resolve import Config, ResolvedConfig
from colm_ds.errors import ConfigError, DataError, Problems

TEXT = ("input_ids", "labels", "attention_mask", "token_type_ids")
"""Fields of a batch that describe its text, which a step knows already."""

NAME = "colm_ds.initialize"


@dataclass(frozen=True)
class Given:
    """Arguments after the check.

    Attributes:
        config: the configuration, wherever it was given.
        args: the script's, without the configuration; None if there were none.
    """

    config: Config
    args: Any


def check_initialize(
    *,
    args: Any,
    model: Any,
    training_data: Any,
    lr_scheduler: Any,
    mpu: Any,
    dist_init_required: bool | None,
    collate_fn: Any,
    config: Config | None,
    mesh_param: Any,
    config_params: Config | None,
) -> Given:
    """Check arguments without a process group, a configuration file or data being read.

    Raises:
        ConfigError: naming every argument that cannot be used, and why.
    """
    problems = Problems(f"the arguments of {NAME}")
    where = {"config": config, "config_params": config_params}
    where |= {f"args.{name}": getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")}
    configs = {name: value for name, value in where.items() if value is not None}
    if not configs:
        problems.messages.append("config: missing. Give a path or a dict, or args with deepspeed_config.")
    elif len(configs) > 1:
        problems.messages.append(f"{' and '.join(configs)}: one configuration is enough. Leave out all but one.")
    for name, value in configs.items():
        if not isinstance(value, (str, os.PathLike, dict, ResolvedConfig)):
            problems.add(name, type(value).__name__, "neither a path nor a dict", "Give one of them.")
    if model is None:
        problems.messages.append("model: missing. Give a causal LM.")
    elif isinstance(model, PipelineModule):
        problems.messages.append("model: a PipelineModule, whose layers the probe cannot reach. Give the bare model.")
    if lr_scheduler is not None and not callable(lr_scheduler) and not hasattr(lr_scheduler, "step"):
        problems.add(
            "lr_scheduler", type(lr_scheduler).__name__, "not a scheduler", "Give one, or a function of the optimizer."
        )
    if dist_init_required is False and not dist.is_initialized():
        problems.messages.append(
            "dist_init_required = False: there is no process group. Leave it out, or make one before the call."
        )
    if mpu is not None:
        problems.messages.append("mpu: the probe needs whole layers, and every rank its own examples. Leave it out.")
    if mesh_param is not None:
        problems.messages.append("mesh_param: a sequence is not split over ranks. Leave it out.")
    _check_data(training_data, collate_fn, problems)
    problems.raise_if_any()
    if args is not None:
        args = copy.copy(args)
        for name in ("deepspeed_config", "deepscale_config"):
            if hasattr(args, name):
                setattr(args, name, None)
    return Given(next(iter(configs.values())), args)


def _check_data(training_data: Any, collate_fn: Any, problems: Problems) -> None:
    if training_data is None:
        problems.messages.append(
            "training_data: missing: coresets are chosen from large batches of it. Give the dataset; with a data "
            "loader of your own use colm_ds.CoresetSelector."
        )
    elif not (hasattr(training_data, "__len__") and hasattr(training_data, "__getitem__")):
        problems.add("training_data", type(training_data).__name__, "not numbered", "Give a map-style dataset.")
    elif len(training_data) == 0:
        problems.messages.append("training_data: empty.")
    if collate_fn is None:
        return
    if not callable(collate_fn):
        problems.add("collate_fn", type(collate_fn).__name__, "not a function", "Give one of a list of records.")
    elif is_sourced(training_data):
        problems.messages.append("collate_fn: the dataset gives Examples, not records. Leave it out.")


def is_sourced(dataset: Any) -> bool:
    """Return whether a dataset is a `SourcedDataset`."""
    return all(hasattr(dataset, name) for name in ("source_names", "source_ids", "lengths", "num_label_tokens"))


def check_collated(collate_fn: Callable[[list[Any]], Any], records: Any, model: nn.Module) -> None:
    """Check what a `collate_fn` makes of the first record.

    Raises:
        ConfigError: if the model would read more of it than the text.
        DataError: if it is no mapping with `input_ids` and `labels`, or the record is none.
    """
    record = records[0]
    if not isinstance(record, Mapping):
        raise DataError(f"example 0: a {type(record).__name__}. Give mappings, which collate_fn gets without source.")
    batch = collate_fn([{key: value for key, value in record.items() if key != "source"}])
    if not isinstance(batch, Mapping):
        raise DataError(
            f"collate_fn: gives a {type(batch).__name__}. Have it give a mapping with input_ids and labels."
        )
    missing = [key for key in ("input_ids", "labels") if key not in batch]
    if missing:
        raise DataError(f"collate_fn: gives {', '.join(map(str, batch))}. Have it give {' and '.join(missing)} too.")
    given = [key for key in TEXT if key in ("input_ids", "labels") or batch.get(key) is not None]
    others = [key for key in given if not isinstance(batch[key], Tensor)]
    if others:
        kinds = ", ".join(f"{key} as a {type(batch[key]).__name__}" for key in others)
        raise DataError(f"collate_fn: gives {kinds}. Have it give tensors [examples, length].")
    forward = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward)
    read = [key for key in batch if key in forward.parameters and key not in TEXT]
    if read:
        raise ConfigError(
            f"collate_fn: gives {', '.join(read)}, which the model would read. Examples are probed and trained on by "
            "their input_ids and labels alone. Have it give fields that the model does not read."
        )


_REFUSALS = (AssertionError, AttributeError, LookupError, TypeError, ValueError, NotImplementedError)


def refused_by_deepspeed(error: Exception) -> bool:
    """Return whether an error is DeepSpeed's check of its arguments, and not one of the model's or optimizer's code."""
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    if isinstance(error, (DeepSpeedConfigError, ZeRORuntimeException)):
        return True
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = bool(places) and Path(deepspeed.__file__).parent in Path(places[-1]).parents
    return isinstance(error, _REFUSALS) and inside
