"""Suggest changes that need less memory, with what each saves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from colm_ds.planner.job import Job
from colm_ds.planner.plan import MemoryPlan, Planner
from colm_ds.planner.zero_states import ZeroSettings

_SHORT = 32
"""Tokens below which examples are not cut further."""

_OUR_BUCKET = 20_000_000
_OUR_MAX_LIVE = 300_000_000
_OUR_PERSISTENT = 100_000
"""As in ds_configs/."""


@dataclass(frozen=True)
class Change:
    """One change of a recipe.

    Attributes:
        override: the change, `key=value`.
        kind: changes of the same kind exclude each other.
        plan: memory with it.
        saved: bytes by which the peak falls; negative if it rises.
        job: the job with it.
    """

    override: str
    kind: str
    plan: MemoryPlan
    saved: int
    job: Job


def list_changes(planner: Planner, job: Job, phase: str | None = None) -> list[Change]:
    """Return every single change that a recipe allows, the largest saving first.

    Args:
        planner: planner of the changed jobs.
        job: the job to change.
        phase: phase whose peak counts; default: that of the largest peak.
    """

    def height(plan: MemoryPlan) -> int:
        return plan.peak if phase is None else plan.peaks.get(phase, 0)

    peak = height(planner.memory(job))
    changes = []
    for override, kind, changed in _changes(job):
        plan = planner.memory(changed)
        changes.append(Change(override, kind, plan, peak - height(plan), changed))
    return sorted(changes, key=lambda change: -change.saved)


def best_of_each_key(changes: list[Change]) -> list[Change]:
    """Return the change of every key of a recipe that saves most, without those that save nothing."""
    best: dict[str, Change] = {}
    for change in changes:
        if change.saved > 0:
            best.setdefault(change.override.split("=")[0], change)
    return list(best.values())


def make_fit(planner: Planner, job: Job, budget: int) -> tuple[list[str], Job] | None:
    """Return changes, in order of cost, with which the job fits into a budget of bytes; None if there are none.

    Args:
        planner: planner of the changed jobs.
        job: the job to fit.
        budget: bytes on a device.
    """
    taken: list[str] = []
    for step in (
        *("probe", "checkpointing", "replay", "micro-batch", "stage", "offload"),
        *("micro-batch", "micro-batch", "micro-batch", "micro-batch", "length"),
    ):
        plan = planner.memory(job)
        if plan.peak <= budget:
            return taken, job
        better = [change for change in list_changes(planner, job) if change.kind == step and change.saved > 0]
        if not better or (step == "probe" and plan.peak_phase != "probe"):
            continue
        chosen = next((change for change in reversed(better) if change.plan.peak <= budget), better[0])
        taken = [*(text for text in taken if text.split("=")[0] != chosen.override.split("=")[0]), chosen.override]
        job = chosen.job
    return (taken, job) if planner.memory(job).peak <= budget else None


def _changes(job: Job) -> Iterator[tuple[str, str, Job]]:
    spec, zero = job.spec, job.zero
    if (now := job.rows_at_once(job.micro_batch)) > 1:
        half = now // 2
        yield f"micro_batch_size={half}", "micro-batch", replace(job, micro_batch=half)
    if not spec.checkpointing:
        changed = replace(job, spec=replace(spec, checkpointing=True))
        yield "model.activation_checkpointing=true", "checkpointing", changed
    if spec.dtype == torch.float32:
        yield "model.dtype=bfloat16", "dtype", replace(job, spec=replace(spec, dtype=torch.bfloat16))
    if job.replays:
        yield "colm.replay=off", "replay", job.with_colm(replay="off")
        if job.colm.replay != "offload" and spec.device_type == "cuda":
            yield "colm.replay=offload", "replay", job.with_colm(replay="offload")
    if job.probes:
        tokens, one = job.colm.probe.resolved_max_tokens(spec.device_type), job.padded_length
        tokens = min(tokens, math.ceil(job.colm.large_batch_size / zero.world_size) * one)  # at most all of them
        if tokens > one:
            fewer = job.colm.probe.model_copy(update={"max_tokens": max(one, tokens // 2)})
            yield f"colm.probe.max_tokens={fewer.max_tokens}", "probe", job.with_colm(probe=fewer)
    last = 3 if spec.quantization is None else 2  # see `check_adapters`
    for stage in range(zero.stage + 1, last + 1):
        yield f"deepspeed=ds_configs/zero{stage}.json", "stage", replace(job, zero=at_stage(zero, stage))
    for stage in (2, 3):
        if last >= stage >= zero.stage and not zero.offload_optimizer:
            away = replace(at_stage(zero, stage), offload_optimizer=True, offload_parameters=stage == 3)
            yield f"deepspeed=ds_configs/zero{stage}_offload.json", "offload", replace(job, zero=away)
    if zero.stage and zero.num_buckets and zero.reduce_bucket > _OUR_BUCKET:
        smaller = replace(zero, reduce_bucket=_OUR_BUCKET)
        yield f"{job.bucket_key}={_OUR_BUCKET}", "bucket", replace(job, zero=smaller)
    if job.length > _SHORT:
        shorter = job.length // 2
        changed = replace(job, length=shorter)
        mean = min(job.mean_length, changed.padded_length)
        yield f"{job.length_key}={shorter}", "length", replace(changed, mean_length=mean)


def at_stage(zero: ZeroSettings, stage: int) -> ZeroSettings:
    """Return the settings of a file of ds_configs/ for a stage, without offload."""
    return replace(
        zero,
        stage=stage,
        reduce_bucket=_OUR_BUCKET,
        num_buckets=1,
        persistent=_OUR_PERSISTENT,
        prefetch_bucket=_OUR_BUCKET,
        max_live=_OUR_MAX_LIVE,
        accumulate_float32=stage > 0,
        offload_optimizer=False,
        offload_parameters=False,
    )
