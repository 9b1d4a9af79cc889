"""One whole selection: from the signals of a large batch to its coreset (CoLM, algorithm 1)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection.exchange import SINGLE_PROCESS, Exchange
from colm_ds.selection.facility_location import METRICS
from colm_ds.selection.gradients import Gradients
from colm_ds.selection.history import AdamHistory, mean_gradient
from colm_ds.selection.mask import CRITERIA, mask_coordinates
from colm_ds.selection.sources import Pool, share_out
from colm_ds.selection.two_round import pick_medoids
from colm_ds.selection.weights import WEIGHTS, cluster_weights, matched_weights
from colm_ds.types import NUM_NAMED, Coreset


@dataclass(frozen=True)
class SelectionSettings:
    """How medoids are chosen.

    Attributes:
        geometry: `adam` (the paper's) scales gradients by a history of selected ones, `plain` leaves them.
        metric: distance between examples: `l1` (the paper's), `euclidean` or `cosine`.
        weights: loss weights of medoids: `uniform` (the paper's), `cluster` or `matched`.
        per_source: one pool per big source, or one joint pool.
        mask_size: h, coordinates in which gradients are compared; None compares all of them.
        mask_criterion: `grad` (the paper's), `weight`, `weight_grad` or `random`.
        seed: seeds the random order of small-source examples that exceed b, and random masks.
    """

    geometry: str = "adam"
    metric: str = "l1"
    weights: str = "uniform"
    per_source: bool = True
    mask_size: int | None = None
    mask_criterion: str = "grad"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("geometry", self.geometry, ("adam", "plain")),
            ("metric", self.metric, METRICS),
            ("weights", self.weights, WEIGHTS),
            ("mask_criterion", self.mask_criterion, CRITERIA),
        ):
            if value not in allowed:
                raise SelectionError(f"{name} {value!r} is unknown. Choose one of {', '.join(allowed)}.")
        if self.mask_size is not None and self.mask_size < 1:
            raise SelectionError(f"mask_size {self.mask_size}. Choose at least 1, or None for all coordinates.")


@dataclass(frozen=True)
class Signals:
    """What the probe found out about the examples that this process probed.

    Exactly one of `gradients` and `vectors` describes the examples; with `gradients`, `vectors` may hold a short
    form of the same signal (the SPSA coefficients), used for matched weights and coherence.

    Attributes:
        positions: position in the large batch of every row, int64 `[n]`.
        finite: whether every example of the large batch has a finite signal, bool `[r]`; True where not probed.
        gradients: per-example gradients, compared in Adam geometry under a mask.
        vectors: short signals, float32 `[n, K]`; compared as they are where there are no gradients.
        parameters: value of every probed parameter, float32 `[d]`, for the weight criteria of the mask.
        unprobed: examples outside small sources that were left out of the probe, and so of the choice, bool `[r]`.
    """

    positions: Tensor
    finite: Tensor
    gradients: Gradients | None = None
    vectors: Tensor | None = None
    parameters: Tensor | None = None
    unprobed: Tensor | None = None


def select_coreset(
    sources: Tensor,
    signals: Signals,
    size: int,
    *,
    small: Collection[int] = (),
    settings: SelectionSettings | None = None,
    history: AdamHistory | None = None,
    step: int = 1,
    exchange: Exchange = SINGLE_PROCESS,
) -> Coreset:
    """Choose `size` of the r examples: all of small sources, medoids of the others.

    With an exchange over several processes all of them call this together, each with the gradients of its own
    examples; what travels are one `[d]` sum per pool, the masked columns `[n, h]` of the pool, its picks, and the two
    `[d]` sums of the history. `history` is updated with the selected examples of the pools.

    Args:
        sources: source id of every example, int64 `[r]`.
        signals: this process's signals; rows are needed for every example outside small sources.
        size: b.
        small: ids of small sources; empty to keep nothing by source.
        settings: how medoids are chosen.
        history: Adam geometry for `signals.gradients`; None compares plain gradients.
        step: 1-based step, seeds what is random.
        exchange: the other processes.

    Returns:
        The coreset, the same on every process. Examples without a finite signal are treated as absent from the batch.

    Raises:
        SelectionError: if sizes do not fit or an example of a pool has no signal.
    """
    settings = settings or SelectionSettings()
    finite = signals.finite.cpu()
    if finite.shape != sources.shape:
        raise SelectionError(
            f"select_coreset: {len(finite)} finite flags for {len(sources)} examples. Give one for every example."
        )
    generator = private_generator(settings.seed, "selection", step)
    selectable = finite if signals.unprobed is None else finite & ~signals.unprobed.cpu()
    shares = share_out(sources, size, small, selectable=selectable, per_source=settings.per_source, generator=generator)
    reader = _PoolReader(signals, settings, history, len(finite), generator, exchange)
    chosen, weights = [shares.kept], [torch.ones(len(shares.kept))]
    coherence: dict[int, float] = {}
    for pool in shares.pools:
        picks, pick_weights, coherence[pool.source] = reader.medoids(pool)
        chosen.append(picks)
        weights.append(pick_weights)
    if history is not None and signals.gradients is not None and shares.pools:
        selected = torch.cat(chosen[1:])
        rows = reader.rows_of(selected)
        history.update(signals.gradients, rows, len(selected), exchange)
    return Coreset(
        positions=torch.cat(chosen),
        weights=torch.cat(weights),
        num_kept=len(shares.kept),
        num_dropped_small=shares.num_dropped_small,
        num_nonfinite=int((~finite).sum()),
        coherence=coherence,
        nonfinite=tuple((~finite).nonzero().flatten()[:NUM_NAMED].tolist()),
    )


class _PoolReader:
    """Turns signals into features of one pool after the other."""

    def __init__(
        self,
        signals: Signals,
        settings: SelectionSettings,
        history: AdamHistory | None,
        batch_size: int,
        generator: torch.Generator,
        exchange: Exchange,
    ) -> None:
        if signals.gradients is None and signals.vectors is None:
            raise SelectionError("select_coreset: no signals. Give gradients or vectors of the probed examples.")
        self._signals = signals
        self._settings = settings
        self._history = history
        self._generator = generator
        self._exchange = exchange
        self._row_of = torch.full((batch_size,), -1, dtype=torch.int64)
        self._row_of[signals.positions.cpu()] = torch.arange(len(signals.positions))

    def rows_of(self, positions: Tensor) -> Tensor:
        """Rows of this process among the positions, int64, on the signals' device."""
        rows = self._row_of[positions]
        return rows[rows >= 0].to(self._signals.positions.device)

    def medoids(self, pool: Pool) -> tuple[Tensor, Tensor, float]:
        """Positions of the pool's medoids `[quota]`, their weights `[quota]` and the pool's coherence."""
        features, raw = self._features(pool)
        outcome = torch.zeros(2 * pool.quota + 1, dtype=torch.float64)
        if self._exchange.is_main:
            settings = self._settings
            medoids = pick_medoids(features, pool.quota, settings.metric)
            weights = torch.ones(pool.quota)
            if settings.weights == "cluster":
                weights = cluster_weights(medoids.cluster_sizes)
            elif settings.weights == "matched":
                weights = matched_weights(raw[medoids.indices], raw.mean(dim=0))
            picks = pool.positions[medoids.indices.cpu()]
            outcome = torch.cat([picks.double(), weights.cpu().double(), _coherence(raw)])
        outcome = self._exchange.broadcast(outcome)
        picks, weights = outcome[: pool.quota].long(), outcome[pool.quota : -1].float()
        return picks, weights, float(outcome[-1])

    def _features(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """What examples are compared by, and the signal that matched weights match, both with a row per example."""
        signals = self._signals
        rows = self.rows_of(pool.positions)
        if signals.gradients is None:
            assert signals.vectors is not None
            vectors = self._gather(signals.vectors[rows], pool)
            return vectors, vectors
        gradients = signals.gradients
        if self._only_signs_count():
            assert signals.vectors is not None
            raw = self._gather(signals.vectors[rows], pool)
            return raw.sign(), raw
        index = self._mask(gradients, rows, len(pool.positions))
        columns = self._gather(gradients.columns(rows, index), pool)
        features = columns if self._history is None else self._history.normalise(columns.clone(), index)
        raw = columns if signals.vectors is None else self._gather(signals.vectors[rows], pool)
        return features, raw

    def _only_signs_count(self) -> bool:
        """With one direction and no history yet every |u_ij| is 1 but for eps: what differs is the sign of c_i.

        The l1 distance of the signs is the limit eps -> 0, without the round-off that would choose among equals.
        """
        vectors, history = self._signals.vectors, self._history
        return vectors is not None and vectors.shape[1] == 1 and history is not None and history.count == 0

    def _mask(self, gradients: Gradients, rows: Tensor, total: int) -> Tensor:
        settings, d = self._settings, gradients.num_coordinates
        device = self._signals.positions.device
        if settings.mask_size is None or settings.mask_size >= d:
            return torch.arange(d, device=device)
        mean = torch.zeros(d, device=device)
        if settings.mask_criterion in ("grad", "weight_grad"):
            mean = mean_gradient(gradients, rows, total, self._exchange, self._history)
        index = torch.zeros(settings.mask_size, dtype=torch.int64, device=device)
        if self._exchange.is_main:
            index = mask_coordinates(
                settings.mask_criterion,
                settings.mask_size,
                mean=mean,
                parameters=self._signals.parameters,
                generator=self._generator,
            )
        return self._exchange.broadcast(index)

    def _gather(self, rows: Tensor, pool: Pool) -> Tensor:
        """One row for every position of the pool, in its order, from whichever process has it."""
        mine = self._row_of[pool.positions] >= 0
        if self._exchange.num_processes > 1:
            return self._exchange.gather_rows(rows, mine.nonzero().flatten().to(rows.device), len(mine))
        if not bool(mine.all()):
            missing = pool.positions[~mine].tolist()
            raise SelectionError(f"no signal for positions {missing[:8]}. Probe every example outside small sources.")
        return rows


def _coherence(vectors: Tensor) -> Tensor:
    """|mean g| / mean |g|, float64 `[1]` on the CPU; 0 where all are zero."""
    lengths = vectors.double().norm(dim=1).mean()
    mean = vectors.double().mean(dim=0).norm()
    return (mean / lengths if float(lengths) > 0 else torch.zeros_like(mean)).reshape(1).cpu()
