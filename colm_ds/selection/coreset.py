"""Select the coreset of a large batch from its signals (CoLM, algorithm 1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from colm_ds.errors import SelectionError
from colm_ds.randomness import private_generator
from colm_ds.selection.balanced import balanced_draw, principal_components
from colm_ds.selection.exchange import SINGLE_PROCESS, Exchange
from colm_ds.selection.facility_location import METRICS
from colm_ds.selection.gradients import Gradients
from colm_ds.selection.history import AdamHistory, mean_gradient
from colm_ds.selection.importance import importance_draw
from colm_ds.selection.large_pools import pick_medoids
from colm_ds.selection.mask import CRITERIA, mask_coordinates
from colm_ds.selection.sources import Pool, share_out
from colm_ds.selection.transfer import to_cpu, to_device
from colm_ds.selection.weights import WEIGHTS, cluster_weights, matched_weights, mean_one
from colm_ds.types import NUM_NAMED, Coreset


@dataclass(frozen=True)
class SelectionSettings:
    """Settings of the selection.

    Attributes:
        geometry: `adam` (the paper's) scales gradients by a history of selected ones, `plain` leaves them unscaled.
        metric: distance between examples: `l1` (the paper's), `euclidean` or `cosine`.
        weights: loss weights of medoids: `uniform` (the paper's), `cluster` or `matched`.
        per_source: one pool per big source, or one joint pool.
        small_share: part of b that kept small sources may fill; None: see `sources.most_kept`.
        carries: whether quotas carry over the rounding of earlier steps.
        mask_size: h, number of coordinates in which gradients are compared; None: all.
        mask_criterion: `grad` (the paper's), `weight`, `weight_grad` or `random`.
        picks: `medoids` (the paper's); `balanced` draws, whose weights are 1; or `importance`: draws by chances, whose
            weights are their inverse.
        seed: seeds the random order of small-source examples that exceed b, random masks and draws.
    """

    geometry: str = "adam"
    metric: str = "l1"
    weights: str = "uniform"
    per_source: bool = True
    small_share: float | None = 1.0
    carries: bool = False
    mask_size: int | None = None
    mask_criterion: str = "grad"
    picks: str = "medoids"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("geometry", self.geometry, ("adam", "plain")),
            ("metric", self.metric, METRICS),
            ("weights", self.weights, WEIGHTS),
            ("mask_criterion", self.mask_criterion, CRITERIA),
            ("picks", self.picks, ("medoids", "balanced", "importance")),
        ):
            if value not in allowed:
                raise SelectionError(f"{name} {value!r} is unknown. Choose one of {', '.join(allowed)}.")
        if self.mask_size is not None and self.mask_size < 1:
            raise SelectionError(f"mask_size {self.mask_size}. Choose at least 1, or None for all coordinates.")


@dataclass(frozen=True)
class Signals:
    """Results of the probe for the examples that this process probed.

    Exactly one of `gradients` and `vectors` describes the examples; with `gradients`, `vectors` may hold a short
    form of the same signal (the SPSA coefficients), used for matched weights and coherence.

    Attributes:
        positions: position in the large batch of every row, int64 `[n]`, on the CPU.
        finite: whether every example of the large batch has a finite signal, bool `[r]`; True where not probed; on the
            device of the signals.
        gradients: per-example gradients, compared in Adam geometry under a mask.
        vectors: short signals, float32 `[n, K]`; compared as they are where there are no gradients.
        parameters: value of every probed parameter, float32 `[d]`, for the weight criteria of the mask.
        parts: weight of every example in the divisor of the step's mean, float `[r]` on the CPU: its labelled tokens
            in a mean over tokens, by which its signal was multiplied; None: 1.
        unprobed: examples outside small sources that were excluded from the probe, and so from the choice, bool `[r]`.
        unseen: examples that have no signal yet, bool `[r]`: every pool's picks are shared between them and the others
            by their numbers, and theirs are random.
        widths: columns of each score in `vectors` by its name, in order, if several were asked for.
        target: signals of the target examples, float32 `[m, K]`, for selectors that compare with a target.
        target_indices: their places in the target data, `[m]`.
    """

    positions: Tensor
    finite: Tensor
    gradients: Gradients | None = None
    vectors: Tensor | None = None
    parameters: Tensor | None = None
    parts: Tensor | None = None
    unprobed: Tensor | None = None
    unseen: Tensor | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    target: Tensor | None = None
    target_indices: Sequence[int] = ()


def select_coreset(
    sources: Tensor,
    signals: Signals,
    size: int,
    *,
    small: Collection[int] = (),
    settings: SelectionSettings | None = None,
    history: AdamHistory | None = None,
    step: int = 1,
    carry: Mapping[int, float] | None = None,
    chances: Tensor | None = None,
    exchange: Exchange = SINGLE_PROCESS,
) -> Coreset:
    """Choose `size` of the r examples: all of small sources, medoids of the others.

    With an exchange over several processes all of them call this together, each with the gradients of its own
    examples; they exchange one `[d]` sum per pool, the masked columns `[n, h]` of the pool, the picks of all pools,
    and the two `[d]` sums of the history. `history` is updated with the selected examples of the pools.

    The device is synchronised once: features are computed there as if every signal were finite, and copied to the CPU
    together with the finite flags; if one is not finite, they are computed again without it.

    Args:
        sources: source id of every example, int64 `[r]`.
        signals: this process's signals; rows are needed for every example outside small sources.
        size: b.
        small: ids of small sources; empty to keep nothing by source.
        settings: settings of the selection.
        history: Adam geometry for `signals.gradients`; None compares plain gradients.
        step: 1-based step, part of every seed.
        carry: carry-over that quotas start from, by source id, if `settings.carries`; see `sources.carried_quotas`.
        chances: in proportion to which `importance` draws examples, `[r]`; None: lengths of their signals.
        exchange: the other processes.

    Returns:
        The coreset, the same on every process. Examples without a finite signal are treated as absent from the batch.

    Raises:
        SelectionError: if sizes do not fit or an example of a pool has no signal.
    """
    settings = settings or SelectionSettings()
    if signals.finite.shape != sources.shape:
        raise SelectionError(
            f"select_coreset: {len(signals.finite)} finite flags for {len(sources)} examples. Give one for each."
        )
    known = _known_finite(signals)
    finite = torch.ones(len(sources), dtype=torch.bool) if known is None else known
    while True:
        generator = private_generator(settings.seed, "selection", step)
        selectable = finite if signals.unprobed is None else finite & ~signals.unprobed.cpu()
        shares = share_out(
            sources,
            size,
            small,
            selectable=selectable,
            per_source=settings.per_source,
            small_share=settings.small_share,
            carry=(carry or {}) if settings.carries else None,
            generator=generator,
        )
        pools, drawn = _draw_unseen(shares.pools, signals.unseen, settings.seed, step)
        reader = _PoolReader(signals, settings, history, len(finite), generator, exchange)
        features = [reader.features(pool) for pool in pools]
        flags, choices = _choose(signals, finite, pools, features, chances, settings, step, exchange)
        if choices is not None:
            break
        finite = flags
    chosen = torch.cat([shares.kept, *(choice.positions for choice in choices), drawn])
    if history is not None and signals.gradients is not None and shares.pools:
        selected = chosen[len(shares.kept) :]
        history.update(signals.gradients, reader.rows_of(selected), len(selected), exchange)
    return Coreset(
        positions=chosen,
        weights=torch.cat(
            [torch.ones(len(shares.kept)), *(choice.weights for choice in choices), torch.ones(len(drawn))]
        ),
        num_kept=len(shares.kept),
        num_dropped_small=shares.num_dropped_small,
        num_nonfinite=int((~finite).sum()),
        coherence={pool.source: choice.coherence for pool, choice in zip(pools, choices, strict=True)},
        carry=shares.carry,
        nonfinite=tuple((~finite).nonzero().flatten()[:NUM_NAMED].tolist()),
    )


def _draw_unseen(pools: Sequence[Pool], unseen: Tensor | None, seed: int, step: int) -> tuple[list[Pool], Tensor]:
    """Draw the picks among examples without a signal, and leave the others to be chosen by theirs.

    Of a pool of n examples with q picks, m of them unseen, q m / n picks are drawn, rounded up or down at random with
    that mean: an unseen example is as likely as in a random choice of q.

    Args:
        pools: pools to pick from.
        unseen: see `Signals`.
        seed: seed of the run.
        step: 1-based step.

    Returns:
        The pools of examples with a signal that have picks left, and the drawn positions, ascending in each pool.
    """
    if unseen is None:
        return list(pools), torch.empty(0, dtype=torch.int64)
    seen_pools, drawn = [], [torch.empty(0, dtype=torch.int64)]
    for pool in pools:
        generator = private_generator(seed, "unseen", step, pool.source)
        new = pool.positions[unseen[pool.positions]]
        size = len(pool.positions)
        count, rest = divmod(pool.quota * len(new), size)
        count += int(torch.randint(size, (), generator=generator)) < rest
        drawn.append(new[torch.randperm(len(new), generator=generator)[:count]].sort().values)
        if pool.quota > count:
            known = pool.positions[~unseen[pool.positions]]
            seen_pools.append(replace(pool, positions=known, quota=pool.quota - count))
    return seen_pools, torch.cat(drawn)


def _known_finite(signals: Signals) -> Tensor | None:
    """Return which examples are finite if that is known without synchronising a device, else None."""
    return signals.finite if signals.finite.device.type == "cpu" else None


@dataclass(frozen=True)
class _Choice:
    """The medoids of one pool: positions `[quota]`, weights `[quota]`, coherence."""

    positions: Tensor
    weights: Tensor
    coherence: float


def _choose(
    signals: Signals,
    supposed: Tensor,
    pools: Sequence[Pool],
    features: Sequence[tuple[Tensor, Tensor]],
    chances: Tensor | None,
    settings: SelectionSettings,
    step: int,
    exchange: Exchange,
) -> tuple[Tensor, list[_Choice] | None]:
    """Pick the medoids of every pool on the main process's CPU, from one copy, and broadcast the choice.

    Args:
        signals: signals whose flags say which examples are finite.
        supposed: flags that the pools were made from, bool `[r]`.
        pools: pools to pick from.
        features: for each pool the features to compare `[n, h]` and those to match by weights `[n, K]`, on the signals'
            device.
        chances: see `select_coreset`.
        settings: settings of the selection.
        step: 1-based step, seeds draws.
        exchange: the other processes.

    Returns:
        Which examples are finite, and the choice in each pool, or None if the pools were made from other flags.
    """
    widths = [2 * pool.quota + 1 for pool in pools]
    outcome = torch.zeros(1 + sum(widths), dtype=torch.float64)  # whether the flags hold, then each pool's
    finite = supposed
    if exchange.is_main:
        finite, *tensors = to_cpu([signals.finite, *(tensor for pair in features for tensor in pair)])
        outcome[0] = float(torch.equal(finite, supposed))
        if outcome[0]:
            parts = outcome[1:].split(widths)
            for pool, part, compared, raw in zip(pools, parts, tensors[::2], tensors[1::2], strict=True):
                if settings.picks == "balanced":
                    part.copy_(_draw_balanced(pool, raw, settings, step))
                elif settings.picks == "importance":
                    part.copy_(_draw_by_importance(pool, raw, signals.parts, chances, settings, step))
                else:
                    part.copy_(_pick_pool(pool, compared, raw, signals.parts, settings))
            if settings.picks == "importance" and pools:  # scaled in each pool, few draws would have a bias
                weights = [part[pool.quota : -1] for pool, part in zip(pools, parts, strict=True)]
                together = mean_one(torch.cat(weights)).split([pool.quota for pool in pools])
                for own, scaled in zip(weights, together, strict=True):
                    own.copy_(scaled)
    exchange.broadcast(outcome)
    if not outcome[0]:
        return exchange.broadcast(finite.to(torch.uint8)).bool(), None
    parts = outcome[1:].split(widths)
    return finite, [
        _Choice(part[: pool.quota].long(), part[pool.quota : -1].float(), float(part[-1]))
        for pool, part in zip(pools, parts, strict=True)
    ]


def _draw_balanced(pool: Pool, raw: Tensor, settings: SelectionSettings, step: int) -> Tensor:
    """Return positions `[quota]`, weights of 1 and coherence of a balanced draw, float64 `[2 quota + 1]`."""
    generator = private_generator(settings.seed, "balanced", step, pool.source)
    places = balanced_draw(principal_components(raw), pool.quota, generator)
    ones = torch.ones(pool.quota, dtype=torch.float64)
    return torch.cat([pool.positions[places].double(), ones, _coherence(raw)])


def _draw_by_importance(
    pool: Pool, raw: Tensor, parts: Tensor | None, chances: Tensor | None, settings: SelectionSettings, step: int
) -> Tensor:
    """Return positions, weights of any mean and coherence of a draw by importance, float64 `[2 quota + 1]`."""
    generator = private_generator(settings.seed, "importance", step, pool.source)
    sizes = torch.ones(len(raw)) if parts is None else parts[pool.positions]
    likely = raw.double().norm(dim=1) if chances is None else chances[pool.positions]
    if pool.quota < len(raw):
        places, weights = importance_draw(raw, likely, sizes, pool.quota, generator)
    else:
        places, weights = torch.arange(len(raw)), torch.ones(len(raw))
    return torch.cat([pool.positions[places].double(), weights.double(), _coherence(raw)])


def _pick_pool(pool: Pool, compared: Tensor, raw: Tensor, parts: Tensor | None, settings: SelectionSettings) -> Tensor:
    """Return positions `[quota]`, weights `[quota]` and coherence of a pool's medoids, float64 `[2 quota + 1]`."""
    medoids = pick_medoids(compared, pool.quota, settings.metric)
    weights = torch.ones(pool.quota)
    if settings.weights == "cluster":
        weights = cluster_weights(medoids.cluster_sizes)
    elif settings.weights == "matched":
        counted = torch.ones(len(raw)) if parts is None else parts[pool.positions]
        target = raw.double().sum(dim=0) / counted.double().sum()
        weights = matched_weights(raw[medoids.indices], target, counted[medoids.indices])
    return torch.cat([pool.positions[medoids.indices].double(), weights.double(), _coherence(raw)])


class _PoolReader:
    """Turn signals into features, one pool after another."""

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
        self._row_of[signals.positions] = torch.arange(len(signals.positions))

    def rows_of(self, positions: Tensor) -> Tensor:
        """Return the rows of this process among the positions, int64, on the signals' device."""
        rows = self._row_of[positions]
        return to_device(rows[rows >= 0], self._signals.finite.device)

    def features(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Return the features to compare and those to match by weights, each with a row per example."""
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
        """Return whether only the signs of c_i differ: with one direction and no history every |u_ij| is 1 up to eps.

        The l1 distance of the signs is the limit eps -> 0, without the round-off that would break ties.
        """
        vectors, history = self._signals.vectors, self._history
        return vectors is not None and vectors.shape[1] == 1 and history is not None and history.count == 0

    def _mask(self, gradients: Gradients, rows: Tensor, total: int) -> Tensor:
        settings, d = self._settings, gradients.num_coordinates
        device = self._signals.finite.device
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
        """Gather one row for every position of the pool, in its order, from the process that has it."""
        mine = self._row_of[pool.positions] >= 0
        if self._exchange.num_processes > 1:
            return self._exchange.gather_rows(rows, to_device(mine.nonzero().flatten(), rows.device), len(mine))
        if not bool(mine.all()):
            missing = pool.positions[~mine].tolist()
            raise SelectionError(f"no signal for positions {missing[:8]}. Probe every example outside small sources.")
        return rows


def _coherence(vectors: Tensor) -> Tensor:
    """Return |mean g| / mean |g|, float64 `[1]`; 0 if all are zero."""
    lengths = vectors.double().norm(dim=1).mean()
    mean = vectors.double().mean(dim=0).norm()
    return (mean / lengths if float(lengths) > 0 else torch.zeros_like(mean)).reshape(1)
