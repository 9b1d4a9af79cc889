"""Exact optimal transport from a group of rows to all columns, both with equal masses, kept optimal as rows change.

Successive shortest paths: a row enters along the cheapest chain of moves between columns. Only columns are nodes of the
graph, so a path costs m^2 for each step, whatever the number of rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BETTER = 1e-13
"""A path must be shorter by this, relative to the largest cost, to replace another: no circles of round-off."""


class Transport:
    """An optimal plan; operations return new plans.

    Masses are whole units: lcm(k, m) in all for k rows and m columns.
    """

    def __init__(self, costs: Tensor, rows: Sequence[int]) -> None:
        """Plan from the beginning.

        Args:
            costs: float64 `[n, m]`.
            rows: the group, k of n.
        """
        self._costs = costs
        m = costs.shape[1]
        self._total = math.lcm(len(rows), m)
        self._mass = self._total // len(rows)
        self._flow = torch.zeros(len(rows), m, dtype=torch.int64)
        self._rows = [-1] * len(rows)
        self._free = torch.full((m,), self._total // m, dtype=torch.int64)
        self._tolerance = _BETTER * max(1.0, float(costs.abs().max()))
        for slot, row in enumerate(rows):
            self._enter(slot, row)

    def cost(self) -> float:
        """Return the transport's cost for masses of sum 1."""
        return float((self._flow.double() * self._costs[self._rows]).sum()) / self._total

    def without(self, row: int) -> Transport:
        """Return the plan without a row; another must enter in its place."""
        made = self._copy()
        slot = made._rows.index(row)
        made._free += made._flow[slot]
        made._flow[slot] = 0
        made._rows[slot] = -1
        return made

    def with_row(self, row: int) -> Transport:
        """Return the plan after a row entered in the place of the one that left."""
        made = self._copy()
        made._enter(made._rows.index(-1), row)
        return made

    def prices(self, rows: Sequence[int]) -> Tensor:
        """Return a dual value for each row of a whole plan, float64 `[k]`: cost less column price where mass flows.

        Columns' prices are the shortest distances between columns in the remaining graph, from all of them together.
        """
        distance = torch.zeros(self._costs.shape[1], dtype=torch.float64)
        edges = self._edges()
        for _ in range(len(distance)):
            closer = torch.minimum(distance, (distance[:, None] + edges).min(dim=0).values)
            if float((distance - closer).max()) <= self._tolerance:
                break
            distance = closer
        slots = [self._rows.index(row) for row in rows]
        reduced = torch.where(self._flow[slots] > 0, self._costs[list(rows)] - distance, torch.inf)
        return reduced.min(dim=1).values

    def _copy(self) -> Transport:
        made = object.__new__(Transport)
        made.__dict__.update(self.__dict__)
        made._flow, made._free, made._rows = self._flow.clone(), self._free.clone(), list(self._rows)
        return made

    def _edges(self) -> Tensor:
        """Return what it costs to move a unit from column j to k, by the row for which it is cheapest, `[m, m]`."""
        costs = self._costs[self._rows]
        leaving = torch.where(self._flow > 0, -costs, torch.inf)
        return (leaving[:, :, None] + costs[:, None, :]).min(dim=0).values

    def _enter(self, slot: int, row: int) -> None:
        self._rows[slot] = row
        left = self._mass
        while left:
            path = self._cheapest_path(slot)
            movers = [self._mover(j, k) for j, k in itertools.pairwise(path)]
            amount = min(
                left,
                int(self._free[path[-1]]),
                *(int(self._flow[mover, j]) for mover, j in zip(movers, path, strict=False)),
            )
            self._flow[slot, path[0]] += amount
            for mover, j, k in zip(movers, path, path[1:], strict=False):
                self._flow[mover, j] -= amount
                self._flow[mover, k] += amount
            self._free[path[-1]] -= amount
            left -= amount

    def _mover(self, j: int, k: int) -> int:
        """Return the slot of the row that moves from column j to k at the least cost."""
        costs = self._costs[self._rows]
        return int(torch.where(self._flow[:, j] > 0, costs[:, k] - costs[:, j], torch.inf).argmin())

    def _cheapest_path(self, slot: int) -> list[int]:
        """Return the columns from where a unit of a row enters to one with room (Bellman and Ford)."""
        distance = self._costs[self._rows[slot]].clone()
        before = torch.full_like(distance, -1, dtype=torch.int64)
        edges = self._edges()
        for _ in range(len(distance)):
            through, by = (distance[:, None] + edges).min(dim=0)
            shorter = through < distance - self._tolerance
            if not bool(shorter.any()):
                break
            distance = torch.where(shorter, through, distance)
            before = torch.where(shorter, by, before)
        end = int(torch.where(self._free > 0, distance, torch.inf).argmin())
        path = [end]
        while int(before[path[-1]]) >= 0 and len(path) <= len(distance):
            path.append(int(before[path[-1]]))
        return path[::-1]
