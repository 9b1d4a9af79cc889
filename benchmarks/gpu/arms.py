"""Whole steps of several arms on one model: built once, one DeepSpeed engine, a selector and a loader for every arm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.rows import GIB, PEAK_FLOPS, Part, median, release, timed
from colm_ds.config.resolve import resolve_config
from colm_ds.engine.engine import CoLMEngine
from colm_ds.engine.initialization import initialize
from colm_ds.planner.job import job_of_engine
from colm_ds.planner.plan import Planner
from colm_ds.planner.step_cost import forward_flops
from colm_ds.selection.fused import compiled_sum
from colm_ds.selection.price import backward_forwards
from colm_ds.types import SourcedDataset, StepStats

PHASES = ("data", "probe", "exchange", "select", "train", "forward", "backward", "step", "total")

WARM, MEASURED = 1, 3
"""Steps of an arm: the first allocates and compiles. A dry run measures one."""

FIRST_GUESS = 0.25
"""Share of the peak that is assumed before anything has been measured, to tell whether a row fits the time."""


@dataclass(frozen=True)
class Arm:
    """One way to take a step.

    Attributes:
        name: name of the row.
        large: r.
        coreset: b.
        colm: further keys of the `"colm"` section.
        around: makes a context in which the arm's engine is made and its steps run.
        engine: the engine that takes the steps.
    """

    name: str
    large: int
    coreset: int
    colm: dict[str, Any] = field(default_factory=dict)
    around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    engine: type[CoLMEngine] = CoLMEngine

    @property
    def section(self) -> dict[str, Any]:
        """Return the `"colm"` section."""
        return {"large_batch_size": self.large, "coreset_size": self.coreset, **self.colm}


def plain(size: int, name: str = "", **options: Any) -> Arm:
    """Return plain training on `size` examples."""
    return Arm(name or f"plain {size}", size, size, {"selector": "full"}, **options)


class Bench:
    """A model with its data, on which arms are measured one after another.

    Attributes:
        name: name of the shape, in front of every row's key.
        engine: the engine of the last arm.
    """

    def __init__(
        self, part: Part, name: str, build: Callable[[], nn.Module], dataset: SourcedDataset, micro_batch: int
    ) -> None:
        """Prepare; the model is built with the first arm that is wanted.

        Args:
            part: part that collects the rows.
            name: name of the shape.
            build: makes the model on the part's device.
            dataset: the examples.
            micro_batch: examples of a training micro-batch.
        """
        self.name = name
        self.engine: CoLMEngine | None = None
        self._part, self._build, self._dataset, self._micro_batch = part, build, dataset, micro_batch
        self._built: nn.Module | None = None
        self._inner: Any = None  # the DeepSpeed engine
        self._planner = Planner()
        self._flops_per_s = 0.0
        self._warmed = False

    def key(self, arm: Arm) -> str:
        """Return the name of an arm's row."""
        return f"{self.name}: {arm.name}"

    def run(self, arm: Arm, model_flops_guess: float = 0.0) -> dict[str, Any] | None:
        """Measure an arm, unless its row exists or would take too long.

        Args:
            arm: the arm.
            model_flops_guess: operations of one of its steps, approximately; only for the decision.

        Returns:
            The row, if it was measured.
        """
        rate = self._flops_per_s or FIRST_GUESS * PEAK_FLOPS
        building = 10.0 if self._inner is None else 1.0
        estimate_s = 0.0 if self._part.dry else (WARM + MEASURED) * model_flops_guess / rate + building
        return self._part.measure(self.key(arm), lambda: self.steps(arm), estimate_s)

    def steps(self, arm: Arm) -> dict[str, Any]:
        """Take an arm's steps and return its row."""
        device = self._part.device
        with arm.around(self.model):
            engine = self.engine_of(arm)
            warm = WARM if self._warmed else WARM + 1  # the first arm of all starts libraries too
            if device.type == "cuda" and arm.colm.get("probe", {}).get("estimator") == "spsa":
                compile_kernels(device)
            self._warmed = True
            count = warm + (1 if self._part.dry else MEASURED)
            taken = [timed(engine.train_batch, device) for _ in range(count)][warm:]
            row = self._row(arm, engine, [stats for stats, _ in taken], [seconds for _, seconds in taken])
        self._flops_per_s = row["all_flops"] / row["median_s"]
        return row

    @property
    def model(self) -> nn.Module:
        """The model, built when it is first asked for."""
        self._built = self._build() if self._built is None else self._built
        return self._built

    def engine_of(self, arm: Arm) -> CoLMEngine:
        """Return an engine for an arm, around the one DeepSpeed engine."""
        device = self._part.device
        settings = settings_of(arm.section, self._micro_batch, half=device.type == "cuda")
        if self._inner is None:
            self.engine = initialize(model=self.model, config=settings, training_data=self._dataset)[0]
            self._inner = self.engine.deepspeed_engine
            if arm.engine is CoLMEngine:
                return self.engine
        self.engine = None  # its store of hidden states is freed before the next one's is made
        self.engine = arm.engine(self._inner, resolve_config(settings, 1), self._dataset)
        return self.engine

    def close(self) -> None:
        """Free model, engine and optimizer, to which DeepSpeed's hooks hold on otherwise."""
        if self._inner is not None:
            self._inner.destroy()
        self.engine = self._inner = self._built = None
        release(self._part.device)

    def _row(self, arm: Arm, engine: CoLMEngine, stats: list[StepStats], seconds: list[float]) -> dict[str, Any]:
        batches = [engine.loader.batch(one.step) for one in stats]
        jobs = [job_of_engine(engine, batch) for batch in batches]
        parameters = self._planner.tracer(jobs[0].spec).parameters
        costs = [self._planner.time(job, None) for job in jobs]
        lora = jobs[0].spec.lora is not None
        forward = median([forward_flops(job, parameters) for job in jobs])
        # What training on b must compute: no recomputation, no probe.
        model_flops = arm.coreset * forward * (1 + backward_forwards(lora=lora, checkpointing=False))
        all_flops = median([cost.flops for cost in costs])
        typical = median(seconds)
        phases = {name: median([one.time_s.get(name, 0.0) for one in stats]) for name in PHASES}
        selecting = median([one.time_s["exchange"] + one.time_s["select"] for one in stats])
        return {
            "shape": self.name,
            "arm": arm.name,
            "r": arm.large,
            "b": arm.coreset,
            "micro_batch": self._micro_batch,
            "steps_s": seconds,
            "median_s": typical,
            "phase_s": phases,
            "exchange_and_selection_share": selecting / typical,
            "tokens_per_s": median([one.tokens / second for one, second in zip(stats, seconds, strict=True)]),
            "large_batch_tokens_per_s": median(
                [float(batch.lengths.sum()) / second for batch, second in zip(batches, seconds, strict=True)]
            ),
            "padding_fraction": median([one.padding_fraction for one in stats]),
            "forwards": median([cost.forwards for cost in costs]),
            "model_flops": model_flops,
            "all_flops": all_flops,
            "share_of_peak": model_flops / typical / PEAK_FLOPS,
            "share_of_peak_with_all_passes": all_flops / typical / PEAK_FLOPS,
            "memory_gib": {name: max(one.memory_gib[name] for one in stats) for name in stats[0].memory_gib},
            "held_gib": torch.cuda.memory_allocated() / GIB if self._part.device.type == "cuda" else None,
            "exchange_bytes": stats[0].exchange_bytes,
            "replays": engine.coreset_selector.why_not_replay is None and arm.colm.get("replay", "auto") != "off",
            "loss": stats[-1].loss,
        }


def compile_kernels(device: torch.device) -> None:
    """Compile the kernel of one direction's geometry, which a selector needs from its second step on.

    Sizes and tensors differ from each other where those of training do: equal ones would be compiled apart.
    """
    compiled_sum()(*(torch.ones(size, device=device) for size in (3, 64, 64, 64, 5)))


def settings_of(section: dict[str, Any], micro_batch: int, *, half: bool) -> dict[str, Any]:
    """Return a DeepSpeed configuration: stage 2 as in `ds_configs/zero2.json`, PyTorch's AdamW.

    DeepSpeed's own Adam would be compiled at its first use.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 20_000_000,
        },
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.0, "torch_adam": True}},
        "steps_per_print": 10**9,
        "colm": section,
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the rows of whole steps as a table for the terminal."""
    lines = [f"{'row':58} {'s/step':>8} {'to r':>6} {'/ideal':>6} {'tok/s':>9} {'peak':>6} {'sel.':>6} {'GiB':>6}"]
    for row in rows:
        if "median_s" in row:
            more = relative(row, rows)
            ratio = "" if more["to_plain_large"] is None else f"{more['to_plain_large']:.3f}"
            ideal = "" if more["over_ideal"] is None else f"{more['over_ideal']:.3f}"
            lines.append(
                f"{row['key'][:58]:58} {row['median_s']:8.3f} {ratio:>6} {ideal:>6} {row['tokens_per_s']:9.0f} "
                f"{row['share_of_peak']:6.1%} {row['exchange_and_selection_share']:6.2%} "
                f"{row['memory_gib']['peak']:6.2f}"
            )
    return "\n".join(lines)


def relative(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return a row's time over plain training's on its large batch, and over the ideal of the cost model.

    A forward's time is that of plain training on r, the same batches, over what the cost model counts for it.
    """
    wanted = f"{row['shape']}: plain {reference_size(rows, row)}"
    references = [one for one in rows if one["key"] == wanted and one["device"] == row["device"]]
    if not references:
        return {"to_plain_large": None, "over_ideal": None}
    reference = references[0]["median_s"]
    ideal = reference / references[0]["forwards"] * row["forwards"]
    return {"to_plain_large": row["median_s"] / reference, "over_ideal": row["median_s"] / ideal}


def reference_size(rows: list[dict[str, Any]], row: dict[str, Any]) -> int:
    """Return r of a coreset's row; for plain training that of the shape's coresets, or its own where there are none."""
    if row["r"] > row["b"]:
        return int(row["r"])
    sizes = [one["r"] for one in rows if one.get("shape") == row["shape"] and one["r"] > one["b"]]
    return min(sizes, default=int(row["r"]))
