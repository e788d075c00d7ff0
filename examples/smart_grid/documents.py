"""The grid and its days as the mesh's documents: entities, edges, vectors. Looks at the modules that hold the data.

    source, transformer --supplies--> bus --supplies--> load, transformer
    bus --feeds--> line --feeds--> bus          the supply tree, element by element
    bus --feeds--> transformer --feeds--> bus
    bus --feeds--> bus                          over a closed coupler
    line, transformer --connects--> bus         what closes a mesh, or is switched off
    subnet --supplied_by--> transformer, source

`feeds` is the wiring, one hop an element: an LV grid is up to 74 of them deep. `supplies` says the same with the
lines left out, from a transformer straight to each bus that has no other transformer in between: what hangs on
it is two hops away, however long the cables. Each hop costs one question to every shard.

A day is an entity `day:<subnet>:<date>` with its shape as a vector in the space `load_day`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np

from examples.smart_grid.forecast import HORIZON, in_own_scale, shape
from examples.smart_grid.grid import Grid, Line, Source, Transformer
from examples.smart_grid.profiles import Days
from examples.smart_grid.supply import Supply

SPACE = "load_day"
SUPPLIES = "supplies"
SUPPLIED_BY = "supplied_by"

Document = dict[str, Any]


def of_grid(grid: Grid, supply: Supply) -> Iterator[Document]:
    """Every bus, load, line, transformer, source and subnet, with the edges that start at it."""
    feeds: dict[str, list[str]] = defaultdict(list)
    supplies: dict[str, list[str]] = defaultdict(list)
    carrying = set()
    for bus, (parent, through) in supply.feed.items():
        above, here = bus_id(grid, parent), bus_id(grid, bus)
        if through is None:
            feeds[above].append(here)
            continue
        carrying.add(through.name)
        feeds[above].append(element_id(through))
        feeds[element_id(through)].append(here)
        if isinstance(through, Transformer):
            supplies[above].append(element_id(through))
    for bus, supplier in supply.supplier.items():
        supplies[element_id(supplier)].append(bus_id(grid, bus))
    for load in grid.loads:
        supplies[bus_id(grid, load.bus)].append(f"load:{load.name}")

    def document(entity_id: str, entity_type: str, connects: tuple[int, ...] = (), **attributes: Any) -> Document:
        return {
            "entity_id": entity_id,
            "type": entity_type,
            "attributes": attributes,
            "edges": [
                *({"relation": "feeds", "target_id": target} for target in feeds[entity_id]),
                *({"relation": SUPPLIES, "target_id": target} for target in supplies[entity_id]),
                *({"relation": "connects", "target_id": bus_id(grid, bus)} for bus in connects),
            ],
        }

    for source in grid.sources:
        yield document(element_id(source), "source", name=source.name)
    for transformer in grid.transformers:
        idle = () if transformer.name in carrying else transformer.buses
        yield document(
            element_id(transformer),
            "transformer",
            idle,
            mva=transformer.mva,
            kind=transformer.kind,
            closed=transformer.closed,
        )
    for line in grid.lines:
        idle = () if line.name in carrying else line.buses
        yield document(element_id(line), "line", idle, km=line.km, kind=line.kind, closed=line.closed)
    for bus, (_, subnet, kv) in enumerate(grid.buses):
        yield document(bus_id(grid, bus), "bus", subnet=subnet, kv=kv)
    for load in grid.loads:
        subnet = grid.buses[load.bus].subnet
        yield document(f"load:{load.name}", "load", subnet=subnet, mw=load.mw, profile=load.profile)
    for subnet, entry in supply.entries(grid.buses).items():
        yield {
            "entity_id": subnet_id(subnet),
            "type": "subnet",
            "attributes": {"kv": grid.buses[entry].kv},
            "edges": [{"relation": SUPPLIED_BY, "target_id": element_id(supply.supplier[entry])}],
        }


def of_days(days: Days) -> Iterator[Document]:
    """Every day of every subnet, oldest first.

    What an agent needs of a past day comes with it, in the day's own scale: its `last` value and the `next_morning`
    that followed. The newest day has no `next_morning`: nobody knows it yet.
    """
    dates = days.dates
    for offset, day in enumerate(dates):
        today = days.mw[:, offset]
        shapes = shape(today)
        lasts = in_own_scale(today[:, -1:], today).astype(np.float64).round(4).tolist()
        mornings = (
            in_own_scale(days.mw[:, offset + 1, :HORIZON], today).astype(np.float64).round(4).tolist()
            if offset + 1 < len(dates)
            else None
        )
        for number, subnet in enumerate(days.subnets):
            attributes = {
                "subnet": subnet,
                "date": day.isoformat(),
                "weekday": day.weekday(),
                "mean_mw": float(days.mean[number, offset]),
                "std_mw": float(days.std[number, offset]),
                "last": lasts[number][0],
            }
            if mornings is not None:
                attributes["next_morning"] = mornings[number]
            yield {
                "entity_id": day_id(subnet, day),
                "type": "day",
                "attributes": attributes,
                "vectors": {SPACE: shapes[number]},
            }


def bus_id(grid: Grid, bus: int) -> str:
    return f"bus:{grid.buses[bus].name}"


def element_id(element: Line | Transformer | Source) -> str:
    return f"{type(element).__name__.lower()}:{element.name}"


def subnet_id(subnet: str) -> str:
    return f"subnet:{subnet}"


def day_id(subnet: str, day: date) -> str:
    return f"day:{subnet}:{day}"
