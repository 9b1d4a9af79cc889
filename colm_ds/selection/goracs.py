"""GORACS: a group of examples near a target set in optimal transport, less a reward for gradients (2025, ITRA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_ds.selection.draws import TIE, first_largest
from colm_ds.selection.options import option
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector
from colm_ds.selection.simcore import unit_rows
from colm_ds.selection.transport import Transport


def group_costs(examples: Tensor, target: Tensor, gradient_norms: Tensor, reward: float) -> Tensor:
    """Return distance over the largest one, less lambda times gradient norm over the largest, scaled to [0, 1].

    Args:
        examples: features `[n, h]`.
        target: features `[m, h]`.
        gradient_norms: `[n]`.
        reward: lambda.

    Returns:
        float64 `[n, m]`; all 0 if they are equal.
    """
    distance = torch.cdist(examples.double(), target.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return scaled_costs(distance, gradient_norms, reward)


def scaled_costs(distance: Tensor, gradient_norms: Tensor, reward: float) -> Tensor:
    """Combine distances `[n, m]` and gradient norms `[n]` as `group_costs` does; float64 `[n, m]`."""
    norms = gradient_norms.double()
    costs = distance / distance.max().clamp_min(1e-300) - reward * (norms / norms.max().clamp_min(1e-300))[:, None]
    low, high = costs.min(), costs.max()
    return (costs - low) / (high - low) if float(high - low) > 0.0 else torch.zeros_like(costs)


def cover(costs: Tensor, count: int) -> Tensor:
    """Pick greedily the row that lowers the sum over columns of the smallest cost most; ties to the lower row.

    Once no row lowers it any more, the minima are forgotten, and the rows that are left cover the columns again.

    Args:
        costs: `[n, m]`.
        count: at most n.

    Returns:
        Rows in pick order, int64 `[count]`.
    """
    wide = costs.double()
    scale = float(wide.abs().max()) * wide.shape[1] if wide.numel() else 0.0
    free = torch.ones(len(wide), dtype=torch.bool)
    picks: list[int] = []
    nearest: Tensor | None = None
    while len(picks) < count:
        totals = (wide if nearest is None else torch.minimum(wide, nearest)).sum(dim=1)
        chosen = first_largest(torch.where(free, -totals, -torch.inf), scale)
        if nearest is not None and float(nearest.sum() - totals[chosen]) <= TIE * scale:
            nearest = None
            continue
        picks.append(chosen)
        free[chosen] = False
        nearest = wide[chosen] if nearest is None else torch.minimum(nearest, wide[chosen])
    return torch.tensor(picks, dtype=torch.int64)


def swap_scores(costs: Tensor, members: Sequence[int], prices: Tensor) -> Tensor:
    """Estimate from the transport's dual how much every row costs the group, float64 `[n]`: small ones belong into it.

    Args:
        costs: `[n, m]`.
        members: rows of the group, at least 2.
        prices: dual value of each member, `[len(members)]`.
    """
    n, m = costs.shape
    size = len(members)
    reduced = costs[list(members)] - prices[:, None]
    two = torch.topk(reduced, 2, dim=0, largest=False)
    others = two.values[0].expand(n, m).clone()  # cheapest offer by another member
    best = two.indices[0]
    own = torch.tensor(list(members))[best]
    others[own, torch.arange(m)] = two.values[1]
    place = math.ceil(m / size)
    gap = costs - others
    own_price = torch.topk(gap, place, dim=1).values[:, -1]
    return (gap - own_price[:, None]).clamp_max(0.0).mean(dim=1) + own_price / size


def refine(costs: Tensor, rows: Tensor, swaps: int, cut: int) -> Tensor:
    """Swap members for outsiders while that lowers the exact transport to the columns.

    Args:
        costs: `[n, m]`.
        rows: the group, int64 `[k]`.
        swaps: accepted swaps at most.
        cut: members and outsiders that are tried, by `swap_scores`.

    Returns:
        The group, int64 `[k]`, its transport at most what it was.
    """
    members = rows.tolist()
    if len(members) < 2 or len(members) == len(costs):
        return rows
    wide = costs.double()
    plan = Transport(wide, members)
    tolerance = TIE * max(1.0, float(wide.abs().max()))
    for _ in range(swaps):
        scores = swap_scores(wide, members, plan.prices(members))
        inside = torch.zeros(len(wide), dtype=torch.bool)
        inside[members] = True
        leave = torch.sort(torch.where(inside, -scores, torch.inf), stable=True).indices[: min(cut, len(members))]
        enter = torch.sort(torch.where(inside, torch.inf, scores), stable=True).indices[
            : min(cut, len(wide) - len(members))
        ]
        improved = _first_better(plan, leave.tolist(), enter.tolist(), tolerance)
        if improved is None:
            break
        plan, gone, came = improved
        members[members.index(gone)] = came
    return torch.tensor(members, dtype=torch.int64)


def _first_better(
    plan: Transport, leave: Sequence[int], enter: Sequence[int], tolerance: float
) -> tuple[Transport, int, int] | None:
    """Return the first swap that lowers the transport by more than a tolerance, with the plan after it."""
    before = plan.cost()
    for gone in leave:
        without = plan.without(gone)
        for came in enter:
            after = without.with_row(came)
            if after.cost() < before - tolerance:
                return after, gone, came
    return None


@dataclass(frozen=True)
class GoracsOptions:
    """Options of `goracs`."""

    reward: float = option(0.1, "lambda: weight of gradient norms against distances", low=0.0)
    swaps: int = option(10, "accepted swaps at most", low=0)
    cut: int = option(3, "members and outsiders tried in each", low=1)


class GoracsSelector(PoolSelector):
    """A group of examples whose hidden states are near the target's in optimal transport."""

    name = "goracs"
    signal: str | None = "hidden"
    also = ("gradient_norm",)
    needs_target = True
    Options = GoracsOptions

    def pick(self, pool: PoolExamples, quota: int, generator: torch.Generator) -> Picks:
        """See `PoolSelector.pick`."""
        costs = group_costs(
            unit_rows(pool.named("hidden")),
            unit_rows(pool.target_named("hidden")),
            pool.named("gradient_norm")[:, 0],
            self.options.reward,
        )
        return Picks(refine(costs, cover(costs, quota), self.options.swaps, self.options.cut))
