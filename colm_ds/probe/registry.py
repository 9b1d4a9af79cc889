"""Estimators by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from colm_ds.config.colm import ProbeConfig
from colm_ds.models.architecture import Architecture
from colm_ds.probe.estimators import Estimator
from colm_ds.probe.exact import ExactEstimator
from colm_ds.probe.projection import ProjectionEstimator
from colm_ds.probe.scores import ScoreEstimator
from colm_ds.probe.sketch import SketchEstimator
from colm_ds.probe.spsa import SpsaEstimator
from colm_ds.selection import AdamHistory


def make_estimator(
    config: ProbeConfig,
    architecture: Architecture,
    device: torch.device,
    *,
    seed: int,
    betas: tuple[float, float],
    eps: float,
    adam: bool,
    signal: str = "gradient",
    also: Sequence[str] = (),
    targets_from: int | None = None,
    absolute: bool = False,
) -> Estimator:
    """Make the estimator of the `"probe"` section, or that of a baseline's score.

    Args:
        config: the section.
        architecture: parts of the model.
        device: where the model runs.
        seed: seed of the run.
        betas: beta1 and beta2 of the optimizer in use.
        eps: eps of the optimizer in use.
        adam: whether gradients are compared in Adam's geometry; `spsa` and `exact` leave that to the selector.
        signal: signal that the selector needs: "gradient", or one of `SCORES`.
        also: further scores of the same pass, beside a score.
        targets_from: first position of target examples, whose gradients are not scaled; None: there are none.
        absolute: scale gradients by the history's own size, not relative to it (`sketch` with `adam`).
    """
    if signal != "gradient":
        return ScoreEstimator(architecture, device, signal, *also)
    every_step = config.refresh == "step"
    if config.estimator == "exact":
        return ExactEstimator(architecture, device)
    num_probes = config.resolved_num_probes
    if config.estimator == "sketch":
        return SketchEstimator(
            architecture,
            device,
            num_probes=num_probes,
            every_step=every_step,
            beta2=betas[1],
            seed=seed,
            adam=adam,
            targets_from=targets_from,
            absolute=absolute,
        )
    if config.estimator == "projection":
        history = AdamHistory(architecture.num_coordinates, betas, eps, device) if adam else None
        return ProjectionEstimator(
            architecture, device, num_probes=num_probes, every_step=every_step, seed=seed, history=history
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
        rank=None if config.direction_rank == "full" else config.direction_rank,
    )
