"""Estimators by name."""

from __future__ import annotations

import torch

from colm_ds.config import ProbeConfig
from colm_ds.probe.architecture import Architecture
from colm_ds.probe.estimators import Estimator
from colm_ds.probe.exact import ExactEstimator
from colm_ds.probe.scores import ScoreEstimator
from colm_ds.probe.sketch import SketchEstimator
from colm_ds.probe.spsa import SpsaEstimator


def make_estimator(
    config: ProbeConfig,
    architecture: Architecture,
    device: torch.device,
    *,
    seed: int,
    beta2: float,
    signal: str = "gradient",
) -> Estimator:
    """The estimator that the `"probe"` section asks for, or the one of a baseline's score.

    Args:
        config: the section.
        architecture: parts of the model.
        device: where the model runs.
        seed: seed of the run.
        beta2: of the optimizer in use.
        signal: what the selector wants: "gradient", or one of `SCORES`.
    """
    if signal != "gradient":
        return ScoreEstimator(architecture, device, signal)
    every_step = config.refresh == "step"
    if config.estimator == "exact":
        return ExactEstimator(architecture, device)
    num_probes = config.resolved_num_probes
    if config.estimator == "sketch":
        return SketchEstimator(
            architecture, device, num_probes=num_probes, every_step=every_step, beta2=beta2, seed=seed
        )
    double = config.precision == "float64" or (config.precision == "auto" and device.type == "cpu")
    return SpsaEstimator(
        architecture,
        device,
        num_probes=num_probes,
        epsilon=config.epsilon,
        every_step=every_step,
        seed=seed,
        dtype=torch.float64 if double else torch.float32,
    )
