"""Plan a step before it runs: peak of every phase by parts, largest micro-batch that fits, seconds per step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from colm_ds.memory.breakdown import PARTS
from colm_ds.planner.activations import ModelSpec, Tracer, TrainingActivations
from colm_ds.planner.job import Job
from colm_ds.planner.selection_state import replay_bytes, selection_bytes
from colm_ds.planner.step_cost import TimePlan, step_cost
from colm_ds.planner.zero_states import States, model_states
from colm_ds.probe.tokens import WIDTH


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank's device.

    Attributes:
        phases: bytes by phase and part (`PARTS`).
        host: bytes in host memory of this rank (offload).
        saving_host: further bytes there while a checkpoint is written: its largest tensor from a GPU to disk.
    """

    phases: dict[str, dict[str, int]]
    host: int
    saving_host: int = 0

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes by phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        """The phase of the largest peak."""
        peaks = self.peaks
        return max(peaks, key=lambda phase: peaks[phase])

    @property
    def peak(self) -> int:
        """The largest peak."""
        return max(self.peaks.values())


@dataclass
class Planner:
    """Planner of jobs; shapes of one model are run once for all of them.

    Attributes:
        limit_s: seconds of this thread's work from the first look at a model, after which `memory` raises TimeoutError.
    """

    limit_s: float = math.inf
    _tracers: dict[tuple[object, ...], Tracer] = field(default_factory=dict)

    def tracer(self, spec: ModelSpec) -> Tracer:
        """Return the tracer of a model's shapes."""
        lora = None if spec.lora is None else spec.lora.model_dump_json()
        key: tuple[object, ...] = id(spec.config), spec.dtype, spec.attention, lora, spec.checkpointing
        key += spec.device_type, spec.quantization, spec.double_quant
        if key not in self._tracers:
            self._tracers[key] = Tracer(spec, time.thread_time() + self.limit_s)
        return self._tracers[key]

    def memory(self, job: Job, *, whole_logits: bool = False) -> MemoryPlan:
        """Return the peak of every phase by parts.

        Args:
            job: the job.
            whole_logits: do not compute the loss in chunks.
        """
        tracer = self.tracer(job.spec)
        states, width = self.states(job), job.spec.dtype.itemsize
        kept, probing, selecting = self._selection(job)
        replay_all, replay_kept = self._replay(job, width)
        rows = job.training_rows(job.micro_batch)
        stage3 = job.zero.stage == 3
        active = tracer.training(rows, replay=job.replays, whole_logits=whole_logits, stage3=stage3)
        held = {"weights": states.weights, "optimizer": states.optimizer, "selection": kept}
        before = {**held, "gradients": states.always_gradients, "communication": states.always_buckets}
        training = {**held, "gradients": states.gradients, "replay": replay_kept}
        training |= {"communication": states.always_buckets + states.forward_buckets}
        phases = {}
        if job.probes:
            probe = probing + self._probe(job, tracer)
            phases["probe"] = {**before, "replay": replay_all, "probe": probe, "rest": states.gathered}
            phases["exchange"] = {**before, "replay": replay_all, "probe": probing}
            phases["select"] = {**before, "replay": replay_all, "probe": selecting}
        phases["forward"] = {**training, "activations": active.forward, "rest": states.gathered}
        phases["backward"] = _backward(training, states, active, job.spec.checkpointing)
        phases["step"] = {**training, "communication": states.always_buckets, "rest": states.step}
        phases["save"] = before
        whole = {phase: {part: parts.get(part, 0) for part in PARTS} for phase, parts in phases.items()}
        host = states.host + (replay_all if job.colm.replay == "offload" and job.replays else 0)
        return MemoryPlan(whole, host, states.saving_host if job.spec.device_type == "cuda" else 0)

    def states(self, job: Job) -> States:
        """Return the bytes of weights, gradients and optimizer states."""
        return model_states(self.tracer(job.spec).parameters, job.zero, job.spec.dtype.itemsize)

    def time(self, job: Job, tflops: float | None) -> TimePlan:
        """Return the cost of a step and of the run; `tflops` is the speed that one device achieves."""
        return step_cost(job, self.tracer(job.spec).parameters, tflops)

    def largest_micro_batch(self, job: Job, budget: int) -> int:
        """Return the examples of the largest micro-batch whose peak is within a budget of bytes; 0 if none is."""
        most = job.rows_of_step

        def peak(count: int) -> int:
            return self.memory(replace(job, micro_batch=count)).peak

        guess = 1
        if most > 1 and (left := budget - peak(1)) > 0:  # nearly linear, so that few sizes have to be looked at
            guess += left // max(1, peak(2) - peak(1))
        return largest_that(lambda count: peak(count) <= budget, most, guess)

    def _probe(self, job: Job, tracer: Tracer) -> int:
        probe = job.colm.probe
        most = probe.resolved_max_tokens(job.spec.device_type)
        share = math.ceil(job.colm.large_batch_size / job.zero.world_size)
        rows = job.rows(max(1, min(share, most // job.padded_length)))
        estimator = "score"
        if job.colm.signal == "gradient":
            estimator = probe.estimator
            rows = replace(rows, labels=math.ceil(rows.labels * probe.token_sample))
        on_cpu = job.spec.device_type == "cpu"
        double = probe.precision == "float64" or (probe.precision == "auto" and on_cpu)
        tail_dtype = torch.float64 if double else torch.float32
        return tracer.probe(rows, estimator, probe.resolved_num_probes, tail_dtype, probe.layer)

    def _selection(self, job: Job) -> tuple[int, int, int]:
        if job.colm.signal == "gradient" and job.colm.probe.estimator == "tokens":
            on_device = job.spec.device_type == "cpu"  # token vectors are in host memory
            return (4 * WIDTH * int(job.spec.text_config.vocab_size) if on_device else 0), 0, 0
        if not job.probes:
            return 0, 0, 0
        architecture = self.tracer(job.spec).architecture(job.colm.probe.layer)
        selection = selection_bytes(job.colm, architecture, job.zero.world_size)
        return selection.kept, selection.probing, selection.selecting

    def _replay(self, job: Job, width: int) -> tuple[int, int]:
        """Return the bytes of hidden states of all probed examples, and of the chosen ones, on the device."""
        if not job.replays or job.colm.replay == "offload":
            return 0, 0
        layers, hidden = int(job.spec.text_config.num_hidden_layers), int(job.spec.text_config.hidden_size)

        def of(size: int) -> int:
            return replay_bytes(
                math.ceil(size / job.zero.world_size), math.ceil(job.mean_length), layers, hidden, width
            )

        return of(job.colm.large_batch_size), of(job.size)


def _backward(
    training: Mapping[str, int], states: States, active: TrainingActivations, checkpointing: bool
) -> dict[str, int]:
    """Return the peak of the backward pass by parts: at the loss, in the layers, or at the end, when it reduces.

    Stage 2 allocates its buckets with the first gradient, after the loss's own tensors are freed; then reduced
    gradients are added as activations are freed, or all of them at the end.
    """
    always, late = training["communication"], states.backward_buckets - states.forward_buckets
    at_loss = {"activations": active.backward, "rest": states.gathered}
    ends = states.reduces_once
    inside = active.backward if checkpointing else active.kept + (0 if ends else states.reduced)
    copied = 0 if ends else states.reducing
    in_layers = {
        "activations": min(inside, active.backward),
        "communication": always + late + copied,
        "rest": states.gathered + states.training,
    }
    at_end = {
        "communication": always + late + states.reducing,
        "rest": states.gathered + 2 * states.training + (0 if ends else states.reduced),
    }
    cases = [dict(training) | case for case in (at_loss, in_layers, at_end)]
    return max(cases, key=lambda case: sum(case.values()))


def largest_that(fits: Callable[[int], bool], most: int, guess: int = 1) -> int:
    """Return the largest number from 1 to `most` that fits, 0 if none does.

    Args:
        fits: whether a number fits; must be monotonic.
        most: the largest number to consider.
        guess: the number to look at first; the nearer it is, the fewer calls.
    """
    low, high, look, step = 0, most + 1, guess, 1
    while high - low > 1:
        look = min(max(look, low + 1), high - 1)
        if fits(look):
            low, look = look, look + step if high > most else (look + high) // 2
        else:
            high, look = look, look - step if low == 0 else (low + look) // 2
        step *= 2
    return low
