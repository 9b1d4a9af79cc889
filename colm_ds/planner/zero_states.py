"""Weights, gradients and optimizer states of a rank, by ZeRO stage, as allocated by DeepSpeed 0.19."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colm_ds.planner.activations import Parameters

_FLATTENED = 500_000_000
"""Elements that the all-reduce of stage 0 copies together."""

_MAX_LIVE = 1_000_000_000
_BUCKET = 500_000_000
_PREFETCH = 50_000_000
_PERSISTENT = 100_000
"""DeepSpeed's defaults of stage3_max_live_parameters, reduce_bucket_size, stage3_prefetch_bucket_size and
stage3_param_persistence_threshold."""

_FLOAT32 = 4


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of a DeepSpeed configuration that affect memory.

    Attributes:
        stage: ZeRO stage.
        world_size: W.
        reduce_bucket: elements reduced together; a buffer of this size is allocated, however few are trained.
        num_buckets: number of such buffers: two if communication overlaps with the backward pass in stages 1 and 2.
        prefetch_bucket: stage 3: elements gathered ahead.
        max_live: stage 3: maximum elements kept gathered.
        persistent: stage 3: parameters of at most this many elements stay gathered.
        accumulate_float32: whether gradients of 16-bit weights are added up in float32.
        offload_optimizer: whether float32 copies and states are in host memory.
        offload_parameters: stage 3: whether weights are too.
        adam_temporaries: float32 numbers that a step of Adam needs for each parameter: none in DeepSpeed's kernel, the
            root of v in torch's AdamW on a GPU, that and its quotient on a CPU.
    """

    stage: int
    world_size: int
    reduce_bucket: int = _BUCKET
    num_buckets: int = 1
    prefetch_bucket: int = _PREFETCH
    max_live: int = _MAX_LIVE
    persistent: int = _PERSISTENT
    accumulate_float32: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    adam_temporaries: int = 0


@dataclass(frozen=True)
class States:
    """Bytes on a rank's device (and in host memory) that do not depend on the micro-batch.

    Attributes:
        weights: weights of the model, this rank's share under stage 3.
        optimizer: float32 copies and both moments of Adam.
        gradients: gradients accumulated over micro-batches.
        always_gradients: part of them that is also held while the probe runs.
        gathered: gathered weights of the running layers (stage 3).
        training: further temporaries during the backward pass.
        step: further bytes at the optimizer step.
        host: bytes in host memory.
        always_buckets: communication buffers that are always held.
        forward_buckets: those of the forward, held until the optimizer step.
        backward_buckets: those of the backward pass.
        reduced: gradients of this micro-batch held beside the sum once reduced.
        reducing: copy of a full bucket while it is reduced.
        reduces_once: whether all gradients fit into one bucket, which is then reduced after the last layer.
        saving_host: the largest tensor that passes through host memory when a checkpoint is written.
    """

    weights: int
    optimizer: int
    gradients: int
    always_gradients: int
    gathered: int
    training: int
    step: int
    host: int
    always_buckets: int = 0
    forward_buckets: int = 0
    backward_buckets: int = 0
    reduced: int = 0
    reducing: int = 0
    reduces_once: bool = False
    saving_host: int = 0


def zero_settings(config: Mapping[str, Any], world_size: int, *, on_gpu: bool = True) -> ZeroSettings:
    """Read the settings from a DeepSpeed configuration without "auto" values.

    Args:
        config: the configuration.
        world_size: W.
        on_gpu: whether the ranks have GPUs, on which DeepSpeed's own Adam runs unless `torch_adam` is asked for.
    """
    zero = config.get("zero_optimization") or {}

    def number(key: str, default: int) -> int:
        value = zero.get(key, default)
        return default if value == "auto" or value is None else int(float(value))

    def offloaded(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") not in (None, "none")

    contiguous = zero.get("contiguous_gradients", True) not in (False, None)
    overlap = zero.get("overlap_comm") is True and number("stage", 0) < 3
    accumulate = str((config.get("data_types") or {}).get("grad_accum_dtype") or "")
    torch_adam = ((config.get("optimizer") or {}).get("params") or {}).get("torch_adam", not on_gpu)
    temporaries = 0 if not torch_adam else 1 if on_gpu else 2
    return ZeroSettings(
        stage=number("stage", 0),
        world_size=world_size,
        reduce_bucket=number("reduce_bucket_size", _BUCKET),
        num_buckets=(2 if overlap else 1) if contiguous else 0,
        prefetch_bucket=number("stage3_prefetch_bucket_size", _PREFETCH),
        max_live=number("stage3_max_live_parameters", _MAX_LIVE),
        persistent=number("stage3_param_persistence_threshold", _PERSISTENT),
        accumulate_float32=accumulate in ("fp32", "float32"),
        offload_optimizer=offloaded("offload_optimizer"),
        offload_parameters=offloaded("offload_param"),
        adam_temporaries=temporaries,
    )


def model_states(parameters: Parameters, settings: ZeroSettings, weight_bytes: int) -> States:
    """Return the bytes of a rank, by formulas derived from DeepSpeed's allocations (benchmarks/memory.py).

    Args:
        parameters: parameters of the model.
        settings: ZeRO settings.
        weight_bytes: bytes of one weight, 2 or 4.
    """
    world = settings.world_size if settings.stage else 1
    trained, share = parameters.trained, -(-parameters.trained // world)
    width, largest = weight_bytes, parameters.largest
    half = width < _FLOAT32
    accumulated = _FLOAT32 if settings.accumulate_float32 else width
    buckets, reducing = (
        width * settings.num_buckets * settings.reduce_bucket,
        width * min(settings.reduce_bucket, trained),
    )
    adam = settings.adam_temporaries * _FLOAT32
    weights = parameters.weight_bytes(width) + parameters.buffers
    optimizer = share * (2 * _FLOAT32 + (_FLOAT32 if half or settings.stage else 0))
    gathered = always = host = always_buckets = forward_buckets = backward_buckets = reduced = 0
    training, saving_host = largest * width, max(trained * width, share * _FLOAT32)  # the flat tensors
    if settings.stage == 0:
        gradients, reducing, saving_host = trained * width, 0, largest * _FLOAT32
        flat = min(trained, _FLATTENED) * width
        step = max(flat, trained * _FLOAT32 + largest * adam) if half else max(flat, largest * adam)
    elif settings.stage == 1 and half and settings.accumulate_float32:  # BF16_Optimizer keeps all of them in float32
        gradients, always, reducing = trained * (width + _FLOAT32), trained * _FLOAT32, 0
        step = share * adam
    elif settings.stage == 1:
        buckets = buckets // width * accumulated
        gradients, forward_buckets, backward_buckets = trained * accumulated, buckets, buckets
        step = max(buckets, share * _FLOAT32, share * (_FLOAT32 + adam) - gradients)
    elif settings.stage == 2:
        gradients, reduced, backward_buckets = share * accumulated, share * width, buckets
        step = share * (_FLOAT32 + adam) - gradients  # which are freed as they are added up
    else:
        persistent = parameters.below(settings.persistent) * width
        weights = -(-parameters.total * width // world) + persistent + parameters.buffers
        gradients = always = share * accumulated
        always_buckets = min(1, settings.num_buckets) * width * settings.reduce_bucket
        at_once = settings.max_live + settings.prefetch_bucket + parameters.layer
        # A single rank uses its part as it is.
        gathered = 0 if world == 1 else min(parameters.total * width - persistent, at_once * width)
        saving_host = max(share * _FLOAT32, persistent)
        training, reducing = 2 * largest * width, 0
        step = persistent + share * (_FLOAT32 + adam)
    if settings.offload_optimizer:
        host = optimizer + share * (accumulated + (width if half else 0))
        optimizer = 0
        if settings.stage >= 2:
            gradients, always = 0, 0
            training = reducing + 2 * largest * _FLOAT32
        step = reducing
    if settings.offload_parameters and settings.stage == 3:
        host += weights
        weights = parameters.buffers
    return States(
        weights,
        optimizer,
        gradients,
        always,
        gathered,
        training,
        max(0, step),
        host,
        always_buckets,
        forward_buckets,
        backward_buckets,
        reduced,
        reducing,
        trained <= settings.reduce_bucket,
        saving_host,
    )
