"""Report a plan as numbers and as the text that `colm-ds plan` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from colm_ds.memory.breakdown import PARTS
from colm_ds.memory.meter import GIB
from colm_ds.planner.job import Job
from colm_ds.planner.plan import MemoryPlan, Planner
from colm_ds.planner.suggestions import at_stage, list_changes, make_fit

BATCH_SIZES = (16, 32, 64, 128, 256)
"""Values of b in a comparison."""


def plan_report(
    job: Job, *, gpu_memory_gib: float, reserve_gib: float = 2.0, tflops: float | None = None
) -> dict[str, Any]:
    """Return all planned numbers of a job, ready for JSON.

    Args:
        job: the job.
        gpu_memory_gib: memory of one device.
        reserve_gib: part of it that is reserved: context, communication buffers, fragmentation.
        tflops: speed of one device, in 10^12 operations per second; None leaves out seconds.
    """
    planner, budget = Planner(), int((gpu_memory_gib - reserve_gib) * GIB)
    parameters = planner.tracer(job.spec).parameters
    b, r, world = job.size, job.colm.large_batch_size, job.zero.world_size
    steps = accumulation_steps(job)
    arms = {f"plain {b}": job.plain(b)}
    if r != b or job.probes:
        arms[f"{job.colm.selector} {b} of {r}"] = job
        if job.probes:
            arms[f"tokens {b} of {4 * b}"] = job.by_tokens()
        wide = math.ceil(job.plain(r).rows_of_step / steps)
        arms[f"plain {r}, equal micro-batch"] = job.plain(r)
        arms[f"plain {r}, equal accumulation steps"] = replace(job, micro_batch=wide).plain(r)
    changes = [
        {
            "override": change.override,
            "saved_gib": change.saved / GIB,
            "peak_gib": change.plan.peak / GIB,
            "fits": change.plan.peak <= budget,
        }
        for change in list_changes(planner, job)
    ]
    count = 4 if job.spec.quantization is None else 3
    stages = [planner.memory(job if stage == job.zero.stage else _stage(job, stage)) for stage in range(count)]
    fitting = make_fit(planner, job, budget)
    whole = planner.memory(job, whole_logits=True).peaks["backward"] - planner.memory(job).peaks["backward"]
    return {
        "num_gpus": world,
        "gpu_memory_gib": gpu_memory_gib,
        "reserve_gib": reserve_gib,
        "length": job.length,
        "mean_length": job.mean_length,
        "candidate_tokens": list(job.candidates),
        "rows_per_example": job.num_rows,
        "parameters": {"total": parameters.total, "trained": parameters.trained},
        "dtype": str(job.spec.dtype).removeprefix("torch."),
        "quantization": job.spec.quantization,
        "stage": job.zero.stage,
        "checkpointing": job.spec.checkpointing,
        "replay": job.replays,
        "packed_row_tokens": job.row_tokens if job.packs else None,
        "arms": {name: _arm(planner, arm, budget, tflops) for name, arm in arms.items()},
        "stages": [
            {"stage": n, "peak_gib": plan.peak / GIB, "fits": plan.peak <= budget} for n, plan in enumerate(stages)
        ],
        "changes": changes,
        "chunked_loss_saves_gib": whole / GIB,
        "to_fit": None if fitting is None else fitting[0],
    }


def comparison(
    job: Job, batch_sizes: Sequence[int] = BATCH_SIZES, *, gpu_memory_gib: float, reserve_gib: float = 2.0
) -> dict[str, Any]:
    """Compare peak memory by b (the paper's Fig. 2c) for plain b, CoLM b of r and plain r, with r / b as in the job.

    If the job probes, also for b of 4 b chosen by token embeddings.

    Two protocols: the job's number of accumulation steps for every b (micro-batches grow with b), and the job's
    micro-batch for every b (accumulation steps grow).

    Args:
        job: the job.
        batch_sizes: values of b.
        gpu_memory_gib: memory of one device.
        reserve_gib: part of it that is reserved.
    """
    planner, steps = Planner(), accumulation_steps(job)
    ratio = job.colm.large_batch_size / job.size

    def peak(changed: Job, equal_steps: bool) -> float:
        rows = changed.rows_of_step
        micro = math.ceil(rows / steps) if equal_steps else min(job.micro_batch, rows)
        return planner.memory(replace(changed, micro_batch=micro)).peak / GIB

    rows = []
    for b in batch_sizes:
        r = round(b * ratio)
        colm = job.with_colm(coreset_size=b, large_batch_size=r)
        row: dict[str, Any] = {"b": b, "r": r}
        for name, equal_steps in (("equal_steps", True), ("equal_micro_batch", False)):
            row[name] = {
                "plain_b_gib": peak(job.plain(b), equal_steps),
                "colm_gib": peak(colm, equal_steps),
                "plain_r_gib": peak(job.plain(r), equal_steps),
            }
            if job.probes:
                row[name]["tokens_gib"] = peak(colm.by_tokens(), equal_steps)
        rows.append(row)
    return {
        "accumulation_steps": steps,
        "micro_batch": job.micro_batch,
        "limit_gib": gpu_memory_gib - reserve_gib,
        "rows": rows,
    }


def accumulation_steps(job: Job) -> int:
    """Return the micro-batches of a step on one rank."""
    return math.ceil(job.rows_of_step / job.rows_at_once(job.micro_batch))


_COLUMNS = (
    "steps: micro-batches in a step; in: phase of the peak; forwards: price of a step in passes of an example; "
    "s/step and h: by --tflops"
)


def format_plan(report: dict[str, Any]) -> str:
    """Format the plan as text."""
    sizes = report["parameters"]
    room = report["gpu_memory_gib"] - report["reserve_gib"]
    replay = ", replay" if report["replay"] else ""
    packed = report["packed_row_tokens"]
    rows_of = "" if packed is None else f", packed into rows of {packed}"
    held = f" (frozen linear maps in {report['quantization']})" if report["quantization"] else ""
    lines = [
        f"{sizes['total'] / 1e9:.2f}e9 parameters, {sizes['trained'] / 1e6:.1f}e6 trained, {report['dtype']}{held}, "
        f"ZeRO-{report['stage']}, activation checkpointing {'on' if report['checkpointing'] else 'off'}{replay}",
        f"{report['num_gpus']} GPUs of {report['gpu_memory_gib']:g} GiB, of which {room:g} are planned with; "
        f"examples of {report['length']} tokens (mean {report['mean_length']:g}){_candidates_text(report)}{rows_of}",
        "",
    ]
    rows = [["", "micro-batch", "steps", "peak GiB", "in", "fits", "largest micro-batch", "forwards", "s/step", "h"]]
    for name, arm in report["arms"].items():
        times = arm["time"]
        rows.append(
            [
                name,
                str(arm["micro_batch"]),
                str(arm["accumulation_steps"]),
                f"{arm['peak_gib']:.2f}",
                arm["peak_phase"],
                "yes" if arm["fits"] else "no",
                str(arm["largest_micro_batch"] or "none"),
                f"{times['forwards']:.0f}",
                "-" if times["step_s"] is None else f"{times['step_s']:.2f}",
                "-" if times["run_h"] is None else f"{times['run_h']:.2f}",
            ]
        )
    lines += [*_table(rows), _COLUMNS, "", *_phase_tables(report), ""]
    lines.append("ZeRO stage: " + ", ".join(_stage_text(stage) for stage in report["stages"]))
    lines.append(
        f"The loss in chunks, always on, saves {report['chunked_loss_saves_gib']:.2f} GiB of the backward pass."
    )
    lines += ["", "Other changes, one at a time (GiB saved at the largest peak):"]
    changes = [
        [
            change["override"],
            f"{change['saved_gib']:+.2f}",
            f"{change['peak_gib']:.2f}",
            "" if change["fits"] else "too much",
        ]
        for change in report["changes"]
    ]
    lines += _table(changes)
    needed = report["to_fit"]
    if needed is None:
        lines += ["", "Nothing here makes it fit: use more GPUs or a smaller model."]
    elif needed:
        lines += ["", "To fit: " + " ".join(needed)]
    return "\n".join(lines)


def format_comparison(report: dict[str, Any]) -> str:
    """Format a comparison as text; * marks what does not fit."""
    lines = []
    for name, head in (
        (
            "equal_steps",
            f"{report['accumulation_steps']} accumulation steps whatever the batch (micro-batches grow)",
        ),
        ("equal_micro_batch", f"micro-batch {report['micro_batch']} whatever the batch (accumulation steps grow)"),
    ):
        arms = {
            "plain_b_gib": "plain b",
            "tokens_gib": "tokens b of 4b",
            "colm_gib": "CoLM b of r",
            "plain_r_gib": "plain r",
        }
        arms = {key: title for key, title in arms.items() if all(key in row[name] for row in report["rows"])}
        rows = [["b", "r", *arms.values(), "CoLM saves of plain r"]]
        for row in report["rows"]:
            values = row[name]
            saved = 1 - values["colm_gib"] / values["plain_r_gib"]
            marked = [f"{values[key]:.2f}{'*' if values[key] > report['limit_gib'] else ''}" for key in arms]
            rows.append([str(row["b"]), str(row["r"]), *marked, f"{100 * saved:.0f}%"])
        lines += [f"Peak GiB per GPU, {head}:", *_table(rows), ""]
    return "\n".join([*lines, f"* more than {report['limit_gib']:g} GiB"])


def _arm(planner: Planner, job: Job, budget: int, tflops: float | None) -> dict[str, Any]:
    plan, times = planner.memory(job), planner.time(job, tflops)
    return {
        "micro_batch": job.micro_batch,
        "accumulation_steps": accumulation_steps(job),
        "peak_gib": plan.peak / GIB,
        "peak_phase": plan.peak_phase,
        "fits": plan.peak <= budget,
        "largest_micro_batch": planner.largest_micro_batch(job, budget),
        "phases_gib": gib(plan),
        "host_gib": plan.host / GIB,
        "saving_host_gib": plan.saving_host / GIB,
        "time": {"forwards": times.forwards, "flops": times.flops, "step_s": times.step_s, "run_h": times.run_h},
    }


def gib(plan: MemoryPlan) -> dict[str, dict[str, float]]:
    """Return a plan's phases in GiB."""
    return {phase: {part: size / GIB for part, size in parts.items()} for phase, parts in plan.phases.items()}


def _stage(job: Job, stage: int) -> Job:
    return replace(job, zero=at_stage(job.zero, stage))


def _candidates_text(report: dict[str, Any]) -> str:
    count, rows = len(report["candidate_tokens"]), report["rows_per_example"]
    return f", {count} candidates in {rows} row{'s' if rows > 1 else ''}" if count else ""


def _stage_text(stage: dict[str, Any]) -> str:
    return f"{stage['stage']} {stage['peak_gib']:.2f} GiB{'' if stage['fits'] else ' (too much)'}"


def _phase_tables(report: dict[str, Any]) -> list[str]:
    """Format the phases by parts of the job itself: the arm with a choice, or the only one."""
    name = list(report["arms"])[min(1, len(report["arms"]) - 1)]
    arm = report["arms"][name]
    parts = [part for part in PARTS if any(phase[part] > 0 for phase in arm["phases_gib"].values())]
    rows = [["GiB", *parts, "sum"]]
    for phase, values in arm["phases_gib"].items():
        rows.append([phase, *(f"{values[part]:.2f}" for part in parts), f"{sum(values.values()):.2f}"])
    host = f"Host memory of each rank: {arm['host_gib']:.2f} GiB, and {arm['saving_host_gib']:.2f} during a save."
    return [f"{name}, by phase:", *_table(rows), *([host] if arm["host_gib"] or arm["saving_host_gib"] else [])]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
