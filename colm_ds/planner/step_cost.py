"""Cost of a step in matrix products, by docs/HOW.md's cost model, with the probe's tail counted for the given model."""

from __future__ import annotations

from dataclasses import dataclass

from colm_ds.planner.activations import Parameters
from colm_ds.planner.job import Job
from colm_ds.selection.price import step_forwards


@dataclass(frozen=True)
class TimePlan:
    """Cost of a step: matrix products only, no communication, no waiting.

    Attributes:
        forwards: the step in forwards of one example.
        flops: operations of the step, over all ranks.
        step_s: seconds of a step; None without a given speed.
        run_h: hours of the run; also None if the number of steps depends on the data.
    """

    forwards: float
    flops: float
    step_s: float | None
    run_h: float | None


def step_cost(job: Job, parameters: Parameters, tflops: float | None) -> TimePlan:
    """Return the cost of a step, on average over the schedule of choices, and of the run.

    Args:
        job: the job.
        parameters: the model's sizes.
        tflops: speed of one device, in 10^12 operations per second.
    """
    forward, of_probe = forward_flops(job, parameters), 0.0
    if job.probes:
        probe, large = job.colm.probe, job.colm.large_batch_size
        seen, probed = large if job.replays else large * probe.sample, large * probe.sample
        if job.colm.needs.target:
            targets = job.colm.target.batch / job.colm.target.refresh
            seen, probed = seen + targets, probed + targets
        trunk = 1.0 - _tail_flops(job, parameters) / forward
        of_probe = seen * trunk + probed * tail_passes(job) * probed_tail_flops(job, parameters) / forward
    lora, checkpointing = job.spec.lora is not None, job.spec.checkpointing
    trained = step_forwards(job.size, lora=lora, checkpointing=checkpointing, replay=False, probe=0.0)
    forwards = step_forwards(job.size, lora=lora, checkpointing=checkpointing, replay=job.replays, probe=of_probe)
    if job.probes:
        share = job.colm.schedule.share(job.steps)
        forwards = share * forwards + (1.0 - share) * trained
    if job.packs:
        forwards += trained * _packed_attention(job) / forward
    flops = forwards * forward
    seconds = None if tflops is None else flops / (tflops * 1e12 * job.zero.world_size)
    return TimePlan(forwards, flops, seconds, None if seconds is None or not job.steps else seconds * job.steps / 3600)


def tail_passes(job: Job) -> int:
    """Return the probe's passes through the last layer and the head; a backward pass of activations counts as one."""
    if job.colm.signal != "gradient":
        return 2 if "gradient_norm" in job.colm.needs.also else 1
    return 2 * job.colm.probe.resolved_num_probes if job.colm.probe.estimator == "spsa" else 2


def forward_flops(job: Job, parameters: Parameters) -> float:
    """Return the operations of one example's forward."""
    body = parameters.total - parameters.embedding - parameters.head - _idle_share(job) * parameters.experts
    attention = _layer_attention(job) * int(job.spec.text_config.num_hidden_layers)
    return 2.0 * (body + parameters.head * _labelled(job)) * job.mean_length + attention


def probed_tail_flops(job: Job, parameters: Parameters) -> float:
    """Return the operations of one pass of the probe through an example's tail.

    That is the last layer's attention at all positions, its MLP and the head at those with a loss.
    """
    gradient = job.colm.signal == "gradient"
    looked_at = _labelled(job) * (job.colm.probe.token_sample if gradient else 1.0)
    weights = _running_layer(job, parameters) - parameters.mlp + (parameters.mlp + parameters.head) * looked_at
    return 2.0 * weights * job.mean_length + _layer_attention(job)


def _tail_flops(job: Job, parameters: Parameters) -> float:
    """Return the operations of the last layer and the head in an ordinary forward of an example."""
    running = _running_layer(job, parameters) + parameters.head * _labelled(job)
    return 2.0 * running * job.mean_length + _layer_attention(job)


def _running_layer(job: Job, parameters: Parameters) -> float:
    """Return the elements of a layer that a token meets."""
    return parameters.layer - _idle_share(job) * parameters.layer_experts


def _idle_share(job: Job) -> float:
    """Return the share of the routed experts that a token does not meet; 0 for a model without."""
    config = job.spec.text_config
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    total = next((count for name in names if (count := getattr(config, name, None))), None)
    chosen = next((k for name in ("num_experts_per_tok", "moe_topk") if (k := getattr(config, name, None))), None)
    return 1.0 - min(1.0, chosen / total) if total and chosen else 0.0


def _labelled(job: Job) -> float:
    return min(1.0, sum(job.candidates) / job.mean_length) if job.candidates else job.label_share


def _layer_attention(job: Job) -> float:
    """Return the operations of queries, keys and values in one layer, for rows of one length; half, as it is causal."""
    return 2.0 * job.mean_length**2 / job.num_rows * int(job.spec.text_config.hidden_size)


def _packed_attention(job: Job) -> float:
    """Return the operations that attention does for an example in a packed row beyond those for it alone.

    With a mask every token is compared with all of the row, on both sides of it; flash attention skips other documents.
    """
    if job.spec.attention.startswith("flash"):
        return 0.0
    layers, hidden = int(job.spec.text_config.num_hidden_layers), int(job.spec.text_config.hidden_size)
    return layers * (4.0 * job.mean_length * job.row_tokens * hidden - _layer_attention(job))
