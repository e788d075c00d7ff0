"""Each subnet's demand as days of 96 quarter-hours. Looks at `grid` and `supply`.

A subnet's demand is what passes through it: the loads at its buses and at every bus that it feeds, each its
rated power times its profile. So a station's bay carries the demand of the LV grid behind it, and a subnet without
consumers of its own still has something to forecast. All subnets at once are one matrix product,
(quarter-hours x profiles) times (profiles x subnets).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray

from examples.smart_grid.grid import QUARTERS, Grid
from examples.smart_grid.supply import Supply


@dataclass(frozen=True, slots=True, kw_only=True)
class Days:
    """Demand of `subnets` from `first` on: `mw` has shape (subnets, days, 96), float32, in MW.

    `mean` and `std` are each day's, of shape (subnets, days).
    """

    subnets: list[str]
    first: date
    mw: NDArray[np.float32]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @property
    def dates(self) -> list[date]:
        return [self.first + timedelta(days=n) for n in range(self.mw.shape[1])]

    def day(self, subnet: int, day: date) -> NDArray[np.float32]:
        """The 96 values of one subnet's day, in MW. Raises `IndexError` outside the window."""
        offset = (day - self.first).days
        if offset < 0:
            raise IndexError(f"{day} is before {self.first}")
        values: NDArray[np.float32] = self.mw[subnet, offset]
        return values


def demand(grid: Grid, supply: Supply, *, days: int, subnets: int | None = None) -> Days:
    """The last `days` days of the grid's year, for `subnets` of its subnets (all that carry demand if None).

    Fewer are taken at even spaces from the sorted names, so each kind of subnet stays represented.
    """
    column = {name: n for n, name in enumerate(grid.profile_names)}
    weights: dict[str, NDArray[np.float64]] = {}
    for load in grid.loads:
        for subnet in supply.lineage.get(load.bus, ()):
            if subnet not in weights:
                weights[subnet] = np.zeros(len(column))
            weights[subnet][column[load.profile]] += load.mw
    names = sorted(weights)
    if subnets is not None and subnets < len(names):
        names = [names[n * len(names) // subnets] for n in range(subnets)]
    window = grid.profiles[-days:]
    product = window.reshape(-1, len(column)) @ np.stack([weights[name] for name in names], axis=1)
    mw = np.ascontiguousarray(product.T, dtype=np.float32).reshape(len(names), len(window), QUARTERS)
    return Days(
        subnets=names,
        first=grid.first + timedelta(days=len(grid.profiles) - len(window)),
        mw=mw,
        mean=mw.mean(axis=2),
        std=mw.std(axis=2),
    )
