"""Exact optimal transport from a group of rows to all columns, both with equal masses, kept optimal as rows change.

Successive shortest paths: a row enters along the cheapest chain of moves between columns. Only columns are nodes of the
graph, so a path costs m^2 for each step, whatever the number of rows; only the edges of columns that a path passed are
computed again. While a plan is built, a row whose cheapest column has room goes there at once: a cheaper chain would
begin at a dearer column and save by moves into room, of which the plan of fewer rows has none left. Where a row left,
there may be some.
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
        self._of_rows = torch.zeros(len(rows), m, dtype=torch.float64)
        self._edges = torch.full((m, m), torch.inf, dtype=torch.float64)  # cost of moving a unit from column j to k
        self._free = torch.full((m,), self._total // m, dtype=torch.int64)
        self._tolerance = _BETTER * max(1.0, float(costs.abs().max()))
        for slot, row in enumerate(rows):
            self._enter(slot, row, is_built=False)

    def cost(self) -> float:
        """Return the transport's cost for masses of sum 1."""
        return float((self._flow.double() * self._of_rows).sum()) / self._total

    def without(self, row: int) -> Transport:
        """Return the plan without a row; another must enter in its place."""
        made = self._copy()
        slot = made._rows.index(row)
        columns = made._flow[slot].nonzero().flatten()
        made._free += made._flow[slot]
        made._flow[slot] = 0
        made._rows[slot] = -1
        made._update_edges(columns)
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
        for _ in range(len(distance)):
            closer = torch.minimum(distance, (distance[:, None] + self._edges).min(dim=0).values)
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
        made._of_rows, made._edges = self._of_rows.clone(), self._edges.clone()
        return made

    def _update_edges(self, columns: Tensor) -> None:
        """Compute what it costs to move a unit from these columns to each, by the row for which it is cheapest."""
        leaving = torch.where(self._flow[:, columns] > 0, -self._of_rows[:, columns], torch.inf)
        self._edges[columns] = (leaving[:, :, None] + self._of_rows[:, None, :]).min(dim=0).values

    def _enter(self, slot: int, row: int, *, is_built: bool = True) -> None:
        self._rows[slot], self._of_rows[slot] = row, self._costs[row]
        nearest = int(self._of_rows[slot].argmin())
        left = self._mass
        while left:
            at_once = not is_built and int(self._free[nearest]) > 0
            path = [nearest] if at_once else self._cheapest_path(slot)
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
            self._update_edges(torch.tensor(path))

    def _mover(self, j: int, k: int) -> int:
        """Return the slot of the row that moves from column j to k at the least cost."""
        costs = self._of_rows
        return int(torch.where(self._flow[:, j] > 0, costs[:, k] - costs[:, j], torch.inf).argmin())

    def _cheapest_path(self, slot: int) -> list[int]:
        """Return the columns from where a unit of a row enters to one with room (Bellman and Ford)."""
        distance = self._of_rows[slot].clone()
        before = torch.full_like(distance, -1, dtype=torch.int64)
        for _ in range(len(distance)):
            through, by = (distance[:, None] + self._edges).min(dim=0)
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
