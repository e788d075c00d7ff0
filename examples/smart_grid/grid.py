"""A SimBench grid as plain tuples: what is there and what is switched on. Looks at `simbench` only.

`simbench.get_simbench_net` reads the CSV files of the package: 10 s on one core for the whole German
benchmark grid, `1-EHVHVMVLV-mixed-all-0-sw` (37,587 buses, 35,647 loads), 2 s more to import it. Nothing is
cached: a first run costs the same as every other.

Generators are left out: the agents forecast demand. The grid has no storages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

QUARTERS = 96
"""Quarter-hours in a day."""

Table = Any
"""A pandas DataFrame; pandas ships no types."""


class Bus(NamedTuple):
    """A node at one voltage. `subnet` is SimBench's `bus.subnet`: an LV grid, an MV feeder, a station's bay."""

    name: str
    subnet: str
    kv: float


class Load(NamedTuple):
    """A consumer at `bus` that draws `mw` times the profile of that name."""

    name: str
    bus: int
    mw: float
    profile: str


class Line(NamedTuple):
    """A cable or overhead line. `closed`: in service, and no switch at either end is open."""

    name: str
    buses: tuple[int, int]
    km: float
    kind: str
    closed: bool


class Transformer(NamedTuple):
    """Joins two voltages; `buses` is (high side, low side)."""

    name: str
    buses: tuple[int, int]
    mva: float
    kind: str
    closed: bool


class Source(NamedTuple):
    """Where power enters: SimBench's external grids."""

    name: str
    bus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Elements name their buses by position in `buses`.

    `profiles` has shape (days, 96, profiles): relative demand by wall-clock day and quarter-hour, from `first`.
    """

    code: str
    buses: list[Bus]
    loads: list[Load]
    lines: list[Line]
    transformers: list[Transformer]
    sources: list[Source]
    couplers: list[tuple[int, int]]
    profile_names: list[str]
    profiles: NDArray[np.float64]
    first: date


def read(code: str) -> Grid:
    """Read a SimBench grid by its code. Blocks for seconds: call it in a thread."""
    import simbench  # 2 s to import, and only here is it needed

    net = simbench.get_simbench_net(code)
    at = {index: position for position, index in enumerate(net.bus.index)}
    opened = net.switch[~net.switch.closed]
    open_lines = set(opened.element[opened.et == "l"])
    open_transformers = set(opened.element[opened.et == "t"])
    coupled = net.switch[(net.switch.et == "b") & net.switch.closed]
    names = sorted(net.load.profile.unique())
    first, profiles = by_wall_clock(
        net.profiles["load"].time,
        net.profiles["load"][[f"{name}_pload" for name in names]].to_numpy(np.float64),
    )
    return Grid(
        code=code,
        buses=[Bus(*row) for row in _rows(net.bus, "name", "subnet", "vn_kv")],
        loads=[
            Load(name, at[bus], mw, profile)
            for name, bus, mw, profile in _rows(net.load, "name", "bus", "p_mw", "profile")
        ],
        lines=[
            Line(name, (at[a], at[b]), km, kind, in_service and index not in open_lines)
            for index, name, a, b, km, kind, in_service in _rows(
                net.line.reset_index(), "index", "name", "from_bus", "to_bus", "length_km", "std_type", "in_service"
            )
        ],
        transformers=[
            Transformer(name, (at[a], at[b]), mva, kind, in_service and index not in open_transformers)
            for index, name, a, b, mva, kind, in_service in _rows(
                net.trafo.reset_index(), "index", "name", "hv_bus", "lv_bus", "sn_mva", "std_type", "in_service"
            )
        ],
        sources=[Source(name, at[bus]) for name, bus in _rows(net.ext_grid, "name", "bus")],
        couplers=[(at[a], at[b]) for a, b in _rows(coupled, "bus", "element")],
        profile_names=names,
        profiles=profiles,
        first=first,
    )


def by_wall_clock(stamps: Sequence[str], values: NDArray[np.float64]) -> tuple[date, NDArray[np.float64]]:
    """Rows stamped in German local time, as shape (days, 96, columns): every day has 96 quarter-hours.

    The hour that is missing on the last Sunday of March is interpolated; the one that happens twice on the
    last Sunday of October is the mean of the two. Without this every day of summer would start an hour late.
    """
    import pandas as pd

    times = pd.to_datetime(pd.Series(stamps), format="%d.%m.%Y %H:%M")
    midnight = times.iloc[0].normalize()
    slots = ((times - midnight).dt.total_seconds() // 900).to_numpy(np.int64)
    days = int(slots.max()) // QUARTERS + 1
    filled = np.zeros((days * QUARTERS, values.shape[1]))
    counts = np.zeros(days * QUARTERS)
    np.add.at(filled, slots, values)
    np.add.at(counts, slots, 1)
    known = counts > 0
    filled[known] /= counts[known, None]
    every = np.arange(days * QUARTERS)
    for column in filled.T:
        column[~known] = np.interp(every[~known], every[known], column[known])
    return midnight.date(), filled.reshape(days, QUARTERS, -1)


def _rows(table: Table, *columns: str) -> zip[tuple[Any, ...]]:
    """The columns of a table, row by row, as Python values."""
    return zip(*(table[column].tolist() for column in columns), strict=True)
