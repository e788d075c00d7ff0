"""Which way the power comes: every bus hangs from one element, back to a source. Looks at `grid` only.

The supply tree is breadth first from the sources over closed lines, couplers and transformers. MV and LV grids are
run radially, so there it is the physical path. EHV and HV grids are meshed, so there it is one shortest
path of several, and says nothing of how power flows would share them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from examples.smart_grid.grid import Bus, Grid, Line, Source, Transformer

Supplier = Transformer | Source


class Feed(NamedTuple):
    """How a bus is fed: from the bus `parent` through a line, a transformer, or (`None`) a coupler."""

    parent: int
    through: Line | Transformer | None


@dataclass(frozen=True, slots=True)
class Supply:
    """The supply tree, by bus, in the order of the search (upstream first). A bus that no source reaches is absent.

    `supplier`: the nearest transformer or source upstream. `lineage`: the subnets that power for this bus
    passes, its own last among them or earlier.
    """

    feed: dict[int, Feed]
    supplier: dict[int, Supplier]
    lineage: dict[int, tuple[str, ...]]

    def entries(self, buses: list[Bus]) -> dict[str, int]:
        """The first bus of each subnet that power reaches."""
        entries: dict[str, int] = {}
        for bus in self.supplier:
            entries.setdefault(buses[bus].subnet, bus)
        return entries


def trace(grid: Grid) -> Supply:
    """Search the grid from its sources along everything that is closed."""
    neighbours: list[list[Feed]] = [[] for _ in grid.buses]
    for (a, b), element in _closed(grid):
        neighbours[a].append(Feed(b, element))
        neighbours[b].append(Feed(a, element))
    feed: dict[int, Feed] = {}
    supplier: dict[int, Supplier] = {source.bus: source for source in grid.sources}
    lineage: dict[int, tuple[str, ...]] = {bus: (grid.buses[bus].subnet,) for bus in supplier}
    queue = deque(supplier)
    while queue:
        bus = queue.popleft()
        for child, element in neighbours[bus]:
            if child in supplier:
                continue
            feed[child] = Feed(bus, element)
            supplier[child] = element if isinstance(element, Transformer) else supplier[bus]
            subnet = grid.buses[child].subnet
            passed = lineage[bus]
            lineage[child] = passed if subnet in passed else (*passed, subnet)
            queue.append(child)
    return Supply(feed, supplier, lineage)


def _closed(grid: Grid) -> Iterator[tuple[tuple[int, int], Line | Transformer | None]]:
    for line in grid.lines:
        if line.closed:
            yield line.buses, line
    for transformer in grid.transformers:
        if transformer.closed:
            yield transformer.buses, transformer
    for coupler in grid.couplers:
        yield coupler, None
