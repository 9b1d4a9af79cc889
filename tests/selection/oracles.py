"""The selection formulas, the paper's and ours, written out plainly in float64, and stand-ins for what feeds them.

Nothing here calls the code under test, and nothing is written for speed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from hypothesis import settings
from scipy.optimize import minimize
from torch import Tensor

property_test = settings(deadline=None, derandomize=True)
"""For tests with `given`: no time limit per example (machines are shared), the same examples in every run."""

TIE = 1e-9
"""Gains this close to the best, relative to n times the largest similarity, are ties."""


# Sources and quotas (points 1 and 2)


def small_sources(counts: Mapping[str, int]) -> set[str]:
    """Sources with fewer than |V| / c examples."""
    average = Fraction(sum(counts.values()), len(counts))
    return {source for source, count in counts.items() if count < average}


def quotas(counts: Sequence[int], total: int) -> list[int]:
    """Largest remainder in exact fractions; ties to the lower id."""
    available = sum(counts)
    shares = [Fraction(total * count, available) if available else Fraction(0) for count in counts]
    whole = [math.floor(share) for share in shares]
    order = sorted(range(len(counts)), key=lambda q: (whole[q] - shares[q], q))
    for q in order[: total - sum(whole)]:
        whole[q] += 1
    return whole


def nearest_whole_shares(counts: Sequence[int], total: int) -> list[int]:
    """Of all whole shares within the caps, those nearest to the exact ones; ties give more to lower ids."""
    available = sum(counts)
    options = [q for q in itertools.product(*[range(count + 1) for count in counts]) if sum(q) == total]

    def distance(option: tuple[int, ...]) -> Fraction:
        return sum(
            ((Fraction(total * count, available) - q) ** 2 for q, count in zip(option, counts, strict=True)),
            start=Fraction(0),
        )

    least = min(map(distance, options))
    return list(max(option for option in options if distance(option) == least))


# Facility location (point 6)


def similarity(features: np.ndarray, metric: str) -> np.ndarray:
    """C - distance, or the cosine, by loops over pairs; `[n, n]`."""
    features = np.asarray(features, dtype=np.float64)
    n = len(features)
    value = np.zeros((n, n))
    for i, j in itertools.product(range(n), range(n)):
        a, b = features[i], features[j]
        if metric == "l1":
            value[i, j] = np.abs(a - b).sum()
        elif metric == "euclidean":
            value[i, j] = math.sqrt(((a - b) ** 2).sum())
        else:
            lengths = math.sqrt((a**2).sum()) * math.sqrt((b**2).sum())
            value[i, j] = (a * b).sum() / lengths if lengths > 0 else 0.0
    return value if metric == "cosine" or n == 0 else value.max() - value


def objective(similarities: np.ndarray, picks: Sequence[int]) -> float:
    """F(S) = sum over i of max over s in S of similarity[i, s]; 0 for the empty set."""
    return float(similarities[:, list(picks)].max(axis=1).sum()) if len(picks) else 0.0


def greedy(similarities: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """Picks and gains of the plain greedy, every gain from two values of F; ties to the lowest index."""
    n = len(similarities)
    tolerance = TIE * n * float(np.abs(similarities).max(initial=0.0))
    picks: list[int] = []
    gains: list[float] = []
    for _ in range(k):
        before = objective(similarities, picks)
        gain = {c: objective(similarities, [*picks, c]) - before for c in range(n) if c not in picks}
        top = max(gain.values())
        choice = min(c for c, value in gain.items() if value >= top - tolerance)
        picks.append(choice)
        gains.append(gain[choice])
    return picks, gains


def best_objective(similarities: np.ndarray, k: int) -> float:
    """The largest F of any k examples, by trying all."""
    return max(objective(similarities, picks) for picks in itertools.combinations(range(len(similarities)), k))


def cluster_sizes(similarities: np.ndarray, picks: Sequence[int]) -> list[int]:
    """How many examples have each pick as their most similar one; a pick has itself, others the earliest of equals."""
    sizes = [0] * len(picks)
    for i in range(len(similarities)):
        sizes[picks.index(i) if i in picks else int(np.argmax(similarities[i, list(picks)]))] += 1
    return sizes


def k_medians_cost(points: Sequence[float], k: int) -> float:
    """Least sum of |x - nearest medoid| for k medoids on a line: dynamic programme over contiguous groups."""
    ordered = sorted(points)
    n = len(ordered)

    def group_cost(start: int, stop: int) -> float:
        middle = ordered[(start + stop) // 2]
        return sum(abs(x - middle) for x in ordered[start:stop])

    cost = [[math.inf] * (n + 1) for _ in range(k + 1)]
    cost[0][0] = 0.0
    for groups in range(1, k + 1):
        for stop in range(1, n + 1):
            cost[groups][stop] = min(cost[groups - 1][start] + group_cost(start, stop) for start in range(stop))
    return cost[k][n]


# Adam geometry (point 4), mask (point 5), weights (point 7)


@dataclass
class Moments:
    """History of the selected examples as dense float64 vectors."""

    m: np.ndarray
    v: np.ndarray
    t: int = 1  # of the next step
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @classmethod
    def zeros(cls, d: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Moments:
        return cls(np.zeros(d), np.zeros(d), 1, betas, eps)

    def _with(self, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        beta1, beta2 = self.betas
        return beta1 * self.m + (1 - beta1) * gradients, beta2 * self.v + (1 - beta2) * gradients**2

    def geometry(self, gradients: np.ndarray) -> np.ndarray:
        """u_i = mhat_i / (sqrt(vhat_i) + eps), `[n, d]`."""
        m_i, v_i = self._with(gradients)
        mhat, vhat = m_i / (1 - self.betas[0] ** self.t), v_i / (1 - self.betas[1] ** self.t)
        return mhat / (np.sqrt(vhat) + self.eps)

    def update(self, selected: np.ndarray) -> None:
        """m <- mean of m_i, v <- mean of v_i over the selected; nothing if there are none."""
        if len(selected):
            m_i, v_i = self._with(selected)
            self.m, self.v, self.t = m_i.mean(axis=0), v_i.mean(axis=0), self.t + 1


def mask(mean: np.ndarray, h: int) -> np.ndarray:
    """The h coordinates of largest |mean|, ascending; ties to the lowest index."""
    return np.sort(np.argsort(-np.abs(mean), kind="stable")[:h])


def matched(
    picks: np.ndarray,
    target: np.ndarray,
    sizes: np.ndarray | None = None,
    ridge: float = 0.1,
    upper: float = 4.0,
) -> np.ndarray:
    """argmin of |sum w_s d_s / k|^2 + lambda |w - 1|^2 over 0 <= w <= upper, sum w = k, by a general solver."""
    k = len(picks)
    parts = np.ones(k) if sizes is None else np.asarray(sizes, dtype=np.float64)
    beyond = (np.asarray(picks, dtype=np.float64) - parts[:, None] * np.asarray(target, dtype=np.float64)) / k
    gram = beyond @ beyond.T
    penalty = ridge * gram.diagonal().mean()
    if k <= 2 or penalty <= 0:
        return np.ones(k)
    hessian = gram / penalty + np.eye(k)
    found = minimize(
        lambda w: 0.5 * w @ hessian @ w - w.sum(),
        np.ones(k),
        jac=lambda w: hessian @ w - 1.0,
        bounds=[(0.0, upper)] * k,
        constraints={"type": "eq", "fun": lambda w: w.sum() - k, "jac": lambda w: np.ones(k)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return found.x


def coherence(signals: np.ndarray) -> float:
    """|mean g| / mean |g|."""
    lengths = np.sqrt((signals**2).sum(axis=1)).mean()
    return float(np.sqrt((signals.mean(axis=0) ** 2).sum()) / lengths) if lengths > 0 else 0.0


# One whole selection (points 1, 2 and 4 to 7)


@dataclass
class Choice:
    """What `select` chose: positions in order, their weights, and coherence by pool."""

    positions: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    num_kept: int = 0
    coherence: dict[int, float] = field(default_factory=dict)


def select(
    sources: Sequence[int],
    size: int,
    *,
    gradients: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    small: Collection[int] = (),
    metric: str = "l1",
    weights: str = "uniform",
    per_source: bool = True,
    h: int | None = None,
    moments: Moments | None = None,
) -> Choice:
    """A coreset of a large batch in which every example has a signal and small sources fit; updates `moments`."""
    kept = [i for i, source in enumerate(sources) if source in small]
    rest = [i for i, source in enumerate(sources) if source not in small]
    choice = Choice(list(kept), [1.0] * len(kept), len(kept))
    ids = sorted({sources[i] for i in rest}) if per_source else [-1]
    members = [[i for i in rest if source in (-1, sources[i])] for source in ids]
    picks_left = min(size - len(kept), len(rest))
    selected: list[int] = []
    for source, pool, quota in zip(ids, members, quotas([len(pool) for pool in members], picks_left), strict=True):
        if quota == 0:
            continue
        if gradients is not None:
            u = moments.geometry(gradients[pool]) if moments else gradients[pool]
            if moments and moments.t == 1 and vectors is not None and vectors.shape[1] == 1:
                u = np.sign(gradients[pool])  # one probe and no history: the limit eps -> 0, with all its ties
            index = mask(u.mean(axis=0), h or u.shape[1])
            features, raw = u[:, index], gradients[pool][:, index]
            if vectors is not None:
                raw = vectors[pool]
        else:
            assert vectors is not None
            features = raw = vectors[pool]
        similarities = similarity(features, metric)
        picks, _ = greedy(similarities, quota)
        chosen = [pool[pick] for pick in picks]
        selected += chosen
        if weights == "cluster":
            sizes = np.array(cluster_sizes(similarities, picks), dtype=np.float64)
            choice.weights += list(sizes / sizes.mean())
        elif weights == "matched":
            choice.weights += list(matched(raw[picks], raw.mean(axis=0)))
        else:
            choice.weights += [1.0] * quota
        choice.coherence[source] = coherence(raw)
    if gradients is not None and moments is not None:
        moments.update(gradients[selected])
    choice.positions += selected
    return choice


# Stand-ins


class FixedDirections:
    """K directions held in memory."""

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.num_coordinates = z.shape[1]

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.z[:, start:stop]

    def columns(self, index: Tensor) -> Tensor:
        return self.z[:, index]


def low_rank_matrix(coefficients: Tensor, z: Tensor) -> np.ndarray:
    """g_i = mean over k of c_ik z_k as a float64 matrix, `[n, d]`."""
    return coefficients.double().numpy() @ z.double().numpy() / z.shape[0]


def randn(*shape: int, seed: int) -> Tensor:
    """Normal numbers from a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
