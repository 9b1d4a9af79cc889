"""Memory of the selection: histories, directions, gradients, masked columns, hidden states for replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from colm_ds.config.colm import CoLMSection
from colm_ds.models.architecture import Architecture
from colm_ds.selection.large_pools import compared_at_once

_CACHED_DIRECTIONS = 32 << 20  # maximum kept by colm_ds.probe.directions


@dataclass(frozen=True)
class SelectionBytes:
    """Bytes on a rank.

    Attributes:
        kept: bytes between steps.
        probing: bytes beside the micro-batch during the probe.
        selecting: bytes during the choice.
    """

    kept: int
    probing: int
    selecting: int


def selection_bytes(colm: CoLMSection, architecture: Architecture, world_size: int) -> SelectionBytes:
    """Return the bytes of the configured selector.

    Args:
        colm: the `"colm"` section.
        architecture: parts of the model; the probed matrices have d entries in total.
        world_size: W; rank 0 selects for all.
    """
    signal, probe, r = colm.signal, colm.probe, colm.large_batch_size
    if signal is None:
        return SelectionBytes(0, 0, 0)
    d, k, hidden_size = architecture.num_coordinates, probe.resolved_num_probes, architecture.hidden_size
    edges = sum(target.out_features + target.in_features for target in architecture.targets)
    at_once = compared_at_once(r, colm.coreset_size or r, colm.metric)
    similarity = 3 * 8 * at_once**2  # float64, with temporaries of the distances
    if signal != "gradient":
        width = (hidden_size if signal == "hidden" else 1) + len(colm.needs.also)
        return SelectionBytes(0, 4 * r * width, 4 * r * width + similarity)
    h = min(d, hidden_size if colm.mask.size == "auto" else colm.mask.size)
    if probe.estimator == "sketch":
        return SelectionBytes(4 * edges * (1 + k), 4 * r * (k + edges), 4 * r * k + similarity)
    history = 2 * 4 * d
    columns = 3 * 4 * r * h
    sums = 8 * d + 2 * 4 * d + 4 * d  # mean in float64, both increments, one chunk of rows
    if probe.estimator in ("exact", "projection"):
        matrix = math.ceil(r / world_size) * d * 4
        return SelectionBytes(history, matrix, matrix + columns + sums + similarity)
    directions = min(4 * k * d, _CACHED_DIRECTIONS)
    return SelectionBytes(history + directions, 4 * r * k + 4 * d, columns + sums + similarity)


def replay_bytes(examples: int, length: int, num_layers: int, hidden_size: int, weight_bytes: int) -> int:
    """Return the bytes of hidden states after every layer but the last, of examples of one length."""
    return examples * length * (num_layers - 1) * hidden_size * weight_bytes
